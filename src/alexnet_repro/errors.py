"""Errors that a command reports in a line or two, without a traceback."""

from importlib.util import find_spec


class UserError(Exception):
    """An error that the user can fix: what is wrong and where, and how to fix it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return self.problem + (f"\n  {self.remedy}" if self.remedy else "")


USER_ERROR = 2  # exit status
IN_USE = 3  # exit status of one of several processes; the one that started them ends with USER_ERROR


class InUse(UserError):
    """Another process works in the folder of a run."""


class Interrupted(Exception):
    """Ctrl-C or a termination signal ended the command, with everything saved; says how to resume."""


class ProcessDied(Exception):
    """A process of a run died, which ended the run."""


def needed(package: str, what: str, extra: str = "sharing") -> None:
    """Raise UserError, with how to install it, if an optional package is missing."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}", f"install it with pip install -e '.[{extra}]'")
