"""Errors that a command reports in a line or two, without a traceback."""


class UserError(Exception):
    """An error that the user can fix: what is wrong and where, and how to fix it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return self.problem + (f"\n  {self.remedy}" if self.remedy else "")


class InUse(UserError):
    """Another process works in the folder of a run."""


class Interrupted(Exception):
    """Ctrl-C or a termination signal ended the command, with everything saved; says how to resume."""


class ProcessDied(Exception):
    """A process of a run died, which ended the run."""
