"""Estimate the training time from the first updates."""

import statistics
import time
from typing import Any

import lightning as L

TIMED_UPDATES = 5  # number of timed updates; the slower first update is not timed


class EstimateTime(L.Callback):
    """Print an estimate of the remaining training time once, after the first updates."""

    def __init__(self) -> None:
        self._ends: list[float] | None = []  # end of each update; None once the estimate is printed

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Record the time; print the estimate once enough updates are timed."""
        if self._ends is None:
            return
        self._ends.append(time.monotonic())
        if len(self._ends) <= TIMED_UPDATES:
            return
        seconds = statistics.median(b - a for a, b in zip(self._ends, self._ends[1:], strict=False))
        self._ends = None
        if trainer.is_global_zero and trainer.max_epochs:
            updates = trainer.max_epochs * int(trainer.num_training_batches) - trainer.global_step
            print(
                f"\ntime left: {in_words(seconds * updates)} for {updates:,} updates of {seconds:.2g} s, and then measuring"
            )


def in_words(seconds: float) -> str:
    """Return a duration in words: about 40 seconds, about 7 minutes, about 3 hours, about 2.5 days."""
    for size, unit, up_to in ((1, "seconds", 100), (60, "minutes", 100), (3600, "hours", 48)):
        if seconds < up_to * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds / 86400:.1f} days"
