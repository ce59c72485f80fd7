"""Errors that a command reports in a line or two, without a traceback."""

import re
from importlib.util import find_spec

# Characters that change what a terminal shows: controls, marks of writing direction, and separators of lines
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return text that a terminal shows as it is.

    Control characters become escapes such as \x1b, and bytes of file names that are not UTF-8 become \xff.
    """
    if text.isprintable():
        return text
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """An error that the user can fix: what is wrong and where, and how to fix it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        lines = [*self.problem.split("\n"), *([f"  {self.remedy}"] if self.remedy else [])]
        return "\n".join(printable(line) for line in lines)


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
