"""The errors that a command tells in a line or two, without a traceback."""


class UserError(Exception):
    """Something that the user can mend: what is wrong and where, and what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return self.problem + (f"\n  {self.remedy}" if self.remedy else "")


class Interrupted(Exception):
    """Ended by Ctrl-C or a termination signal, with everything saved; says how to go on."""


class ProcessDied(Exception):
    """One of a run's processes ended before its time, and so did the run."""
