"""Errors that a command reports in a line or two, without a traceback."""


class UserError(Exception):
    """A problem that the user can solve: what is wrong and where, and what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return self.problem + (f"\n  {self.remedy}" if self.remedy else "")


class Interrupted(Exception):
    """The command was ended by Ctrl-C or a termination signal, with everything saved. Says how to resume."""


class ProcessDied(Exception):
    """A process of a run ended early, and the run with it."""
