"""Test what a run prints while it trains: lines of a log, and a bar on a terminal."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alexnet_repro.training import progress
from alexnet_repro.training.progress import Progress, in_words
from tests.conftest import SMALL


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (12.3, "12 s"),
        (250, "4 min"),
        (5000, "83 min"),
        (11_400, "3 h 10 min"),
        (30_000, "8 h 20 min"),
        (5.5 * 86_400, "5 d 12 h"),
    ],
)
def test_durations_are_written_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_log_of_a_run_has_a_line_for_each_epoch(cwd: Path, tiny_store: Path, run_command: Any) -> None:
    status, out, err = run_command("train", *SMALL, f"data.store={tiny_store}", "epochs=3")
    assert status == 0, err
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    pattern = r"epoch \d/3  train [\d.]+%  val [\d.]+%  loss [\d.]+  [\d,]+ images/s(  left \d+ s)?"
    assert all(re.fullmatch(pattern, line) and len(line) <= 80 for line in lines)
    assert "\r" not in out + err
    assert "it/s" not in out + err


class Clock:
    """Count the seconds that a made-up run takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def made_up_run(
    callback: Progress, clock: Clock, seconds: float, epochs: int = 2, batches: int = 50, start: int = 0
) -> None:
    """Train for ``epochs`` epochs with updates of ``seconds`` and validations of 10 seconds, from batch ``start`` on."""
    model: Any = SimpleNamespace(history=[])
    trainer: Any = SimpleNamespace(
        max_epochs=epochs, num_training_batches=batches, callback_metrics={"train/loss": 2.5}, num_val_batches=[1],
        fit_loop=SimpleNamespace(restarted_mid_epoch=start > 0), current_epoch=0,
    )  # fmt: skip
    batch = SimpleNamespace(global_batch_size=100)
    callback.on_train_start(trainer, model)
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        if epoch or not start:
            callback.on_train_epoch_start(trainer, model)
        for index in range(0 if epoch else start, batches):
            clock.now += seconds
            callback.on_train_batch_end(trainer, model, None, batch, index)
        callback.on_validation_start(trainer, model)
        clock.now += 10
        callback.on_validation_end(trainer, model)
        callback.on_train_epoch_end(trainer, model)
        model.history.append({"epoch": epoch + 1, "train_error": 61.2, "val_error": 58.4, "train_loss": 2.71})
    trainer.current_epoch = epochs
    callback.on_train_end(trainer, model)


def test_long_epochs_have_a_line_a_minute_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    made_up_run(Progress(output=output), Clock(monkeypatch), seconds=5)
    lines = output.getvalue().splitlines()
    assert lines[0] == "epoch 1/2  24%  loss 2.500  20 images/s  left 7 min"  # 88 updates of 5 s
    assert lines[4] == "epoch 1/2  train 61.2%  val 58.4%  loss 2.710  20 images/s  left 4 min"  # 50 and 10 s
    assert lines[-1] == "epoch 2/2  train 61.2%  val 58.4%  loss 2.710  20 images/s"
    assert len(lines) == 2 * 5
    assert max(map(len, lines)) <= 80


def test_terminal_has_a_bar_of_80_columns_with_epoch_loss_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    for start in (0, 20):  # 20: resumed within an epoch
        output, clock = Terminal(), Clock(monkeypatch)
        made_up_run(Progress(output=output), clock, seconds=5, start=start)
        drawn = [part for part in re.split(r"[\r\n]", output.getvalue()) if part.strip()]
        bars = [part for part in drawn if "|" in part and "loss" in part]
        assert bars[-1].startswith("epoch 2/2 ")
        assert all(re.search(r"loss 2.500  20 images/s  left \d+ (s|min)", bar) for bar in bars)
        assert bars[0].startswith("epoch 1/2 ")
        assert max(map(len, drawn)) <= 80
        first = re.search(r"(\d+)%", bars[0])
        assert first is not None
        assert int(first[1]) >= 2 * start
        assert sum(part.startswith("epoch") and "train 61.2%" in part for part in drawn) == 2
