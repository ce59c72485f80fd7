"""Test the estimate of the training time with a fake clock."""

from types import SimpleNamespace
from typing import Any

import pytest

from alexnet_repro.training import estimate
from alexnet_repro.training.estimate import EstimateTime, in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (12.3, "about 12 seconds"),
        (250, "about 4 minutes"),
        (5000, "about 83 minutes"),
        (30_000, "about 8 hours"),
        (5.5 * 86_400, "about 5.5 days"),
    ],
)
def test_durations_are_written_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_estimate_is_printed_once_and_uses_the_median_update(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 102.0, 104.0, 134.0, 136.0, 138.0, 140.0, 142.0])  # one update took 30 seconds
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(clock))
    trainer: Any = SimpleNamespace(is_global_zero=True, max_epochs=10, num_training_batches=40, global_step=0)
    callback = EstimateTime()
    for step in range(1, 9):
        trainer.global_step = step
        callback.on_train_batch_end(trainer)
    # 394 updates of 2 seconds
    assert capsys.readouterr().out == "\ntime left: about 13 minutes for 394 updates of 2 s, and then measuring\n"
