"""Test that the watchman warns if something is wrong, and only then."""

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_repro.data.shard_writer import Example
from alexnet_repro.data.store_writer import write_store
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.training import progress
from alexnet_repro.training import trainer as trainer_module
from alexnet_repro.training.classifier import LOG_EVERY, Classifier
from alexnet_repro.training.optim import PaperSGD
from alexnet_repro.training.progress import Progress
from alexnet_repro.training.watch import Watchman, update_sizes

Run = Callable[..., tuple[int, str, str]]
SHORT = ("train", "data=folder", "trainer=cpu", "trainer.precision=32-true", "batch_size=6", "epochs=1", "run=r")


def test_nan_loss_ends_the_run(cwd: Path, small_store: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classifier.loss
    monkeypatch.setattr(Classifier, "loss", lambda self, batch: original(self, batch) * float("nan"))
    status, _, err = run_command(*SHORT, f"data.store={small_store}")
    assert status == 2
    assert "the loss is nan after 1 updates" in err
    assert "less than optim.lr=0.01" in err
    assert not (cwd / "r/checkpoints/last.ckpt").exists()


@pytest.mark.filterwarnings("default")
def test_plateau_gives_one_warning(
    cwd: Path, small_store: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"data.store={small_store}", "optim.lr=1e-9", "batch_size=2", "watch.plateau_steps=4")
    # a constant loss: with the paper's initialisation, the logits of two classes differ only by dropout noise
    monkeypatch.setattr(Classifier, "loss", lambda self, batch: (self.net.fc8.weight * 0).sum() + np.log(2))
    with pytest.warns(UserWarning, match="still on its starting plateau") as caught:
        assert run_command(*SHORT, *options)[0] == 0
    assert sum("plateau" in str(warning.message) for warning in caught) == 1


def test_images_that_look_normalised_give_a_warning(cwd: Path, run_command: Run) -> None:
    def flat(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(120, 124, (256, 256, 3)).astype(np.uint8)

    examples = [
        Example(split, label, f"{split}{label}{i}", lambda s=label + 2 * i: flat(s))  # type: ignore[misc]
        for split in ("train", "val")
        for label in (0, 1)
        for i in range(3)
    ]
    write_store(examples, ["a", "b"], Path("flat"))
    with pytest.warns(UserWarning, match="training images have a standard deviation of"):
        assert run_command(*SHORT, "data.store=flat", "augment.colour_noise=0")[0] == 0


@pytest.mark.slow
def test_summaries_are_written_to_metrics_csv_and_can_be_turned_off(
    cwd: Path, small_store: Path, run_command: Run
) -> None:
    for every, expected in (("1", 2), ("0", 0)):
        assert run_command(*SHORT, f"data.store={small_store}", f"watch.every={every}", f"run=every-{every}")[0] == 0
        rows = list(csv.DictReader((cwd / f"every-{every}/metrics.csv").open()))
        assert len([row for row in rows if row.get("activation/conv1")]) == expected
        assert len([row for row in rows if row.get("update/fc7")]) == expected
    rows = list(csv.DictReader((cwd / "every-1/metrics.csv").open()))
    silent = [float(row["silent/conv1"]) for row in rows if row["silent/conv1"]]
    assert all(0 < share < 1 for share in silent)


@pytest.mark.slow
def test_summaries_cost_less_than_one_percent() -> None:
    """Compare the time of one summary with that of 100 updates, the interval in conf/train.yaml."""
    net = AlexNet(10).to(memory_format=torch.channels_last)
    optimizer = PaperSGD(net.parameters(), lr=1e-6)
    images, labels = torch.randn(32, 3, 224, 224) * 60, torch.randint(0, 10, (32,))

    def update() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    def summary() -> None:
        with torch.no_grad():
            for x in net.activations(images).values():
                x.abs().mean().item()
                (x == 0).float().mean().item()
        update_sizes(net, optimizer)

    def seconds(what: Callable[[], None]) -> float:
        what()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            what()
            times.append(time.perf_counter() - start)
        return min(times)  # other processes may run beside

    share = seconds(summary) / (100 * seconds(update))
    print(f"summaries cost {100 * share:.2f}% of training")
    assert share < 0.01


def test_update_sizes_equal_the_change_of_the_weights() -> None:
    torch.manual_seed(0)
    net = AlexNet(2)
    optimizer = PaperSGD(net.parameters(), lr=0.01)
    for lr in (0.01, 0.001):
        optimizer.param_groups[0]["lr"] = lr
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        before = {name: p.detach().double() for name, p in net.named_parameters()}
        optimizer.step()
        sizes = update_sizes(net, optimizer)
    assert list(sizes) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    for name, p in net.named_parameters():
        if name.endswith("weight"):
            change = (p.detach().double() - before[name]).norm() / p.detach().double().norm()
            assert sizes[name.removesuffix(".weight")] == pytest.approx(change.item(), rel=1e-3), name


@pytest.mark.slow
def test_update_at_which_the_loss_leaves_the_plateau_is_recorded(
    cwd: Path, small_store: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean loss of the last 50 updates is below 95% of ln 2 at that update.

    The result is the same after resuming, and if a GPU delivers losses ten at a time.
    """
    losses = [np.log(2)] * 60 + [0.6 * np.log(2)] * 40
    means = [np.mean(losses[max(0, n - 50) : n]) for n in range(1, 101)]
    expected = next(n for n, mean in enumerate(means, 1) if n >= 50 and mean < 0.95 * np.log(2))
    for stop in (0, 55, 64):
        watchman = Watchman(500, 0)
        watchman._threshold = 0.95 * float(np.log(2))
        for update, loss in enumerate(losses, 1):
            watchman._pending.append(torch.tensor(loss))
            watchman._updates = update
            if update % 10 == 0:
                watchman._record()
            if update == stop:
                state = watchman.state_dict()
                watchman = Watchman(500, 0)
                watchman._threshold = 0.95 * float(np.log(2))
                watchman.load_state_dict(state)
        assert watchman.left_plateau == expected
    scale = iter(losses)
    monkeypatch.setattr(
        Classifier, "loss", lambda self, batch: (self.net.fc8.weight * 0).sum() + torch.tensor(next(scale, 0.1))
    )
    status, _, err = run_command("train", "data=folder", f"data.store={small_store}", "trainer=cpu", "run=r",
                                 "trainer.precision=32-true", "batch_size=1", "epochs=6", "watch.every=0")  # fmt: skip
    assert status == 0, err
    assert json.loads(Path("r/result.json").read_text())["left_plateau"] == expected


class Reads(TorchDispatchMode):
    """Record the number of updates done whenever the host reads a value from the device, for which it has to wait."""

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__()
        self.trainer, self.at = trainer, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.at.append(self.trainer.global_step)
        return func(*args, **(kwargs or {}))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_host_does_not_wait_in_an_ordinary_update(
    cwd: Path, tiny_store: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count on a CPU what would make the host wait for a GPU. Every tenth update logs; epochs have twelve."""
    fit, reads = L.Trainer.fit, []

    def counted(trainer: L.Trainer, *args: Any, **options: Any) -> None:
        with Reads(trainer) as mode:
            fit(trainer, *args, **options)
        reads.extend(mode.at)

    monkeypatch.setattr(L.Trainer, "fit", counted)
    monkeypatch.setattr(progress, "DRAW_EVERY", 0.0)
    monkeypatch.setattr(trainer_module, "Progress", lambda every: Progress(every, Terminal()))
    options = ("train", *SMALL, f"data.store={tiny_store}", "batch_size=1")
    assert run_command(*options, "run=on_cpu")[0] == 0
    assert set(reads) == set(range(25))  # the test sees what it counts
    reads.clear()
    monkeypatch.setattr(Classifier, "waits", lambda self: True)
    monkeypatch.setattr(trainer_module, "Progress", lambda every: Progress(LOG_EVERY, Terminal()))
    assert run_command(*options, "run=on_gpu")[0] == 0
    # the first update looks at the images, 10 and 20 log, the bar is drawn at the tenth of each epoch, 12 and 24 end one
    assert set(reads) == {0, 10, 12, 20, 22, 24}
