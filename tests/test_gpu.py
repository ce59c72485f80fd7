"""What only a GPU can show: pytest -m gpu. Without one, these tests are skipped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SMALL, stopping_after_an_epoch
from torch.nn import functional as F

from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.build import compiled
from alexnet_repro.net.placement import Link, keep_tower
from alexnet_repro.training.checkpoints import load_checkpoint
from alexnet_repro.training.classifier import LOG_EVERY
from alexnet_repro.training.optim import PaperSGD

pytestmark = pytest.mark.gpu
Run = Callable[..., tuple[int, str, str]]
# the paper's net on twelve images: two updates per epoch
NET = ("data=folder", "batch_size=6", "epochs=2", "watch.every=0", "trainer=gpu")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]


class Updates(NamedTuple):
    """Losses of some updates, and the weights before and after them."""

    losses: list[float]
    first: dict[str, torch.Tensor]
    last: dict[str, torch.Tensor]


def updates(device: str, count: int, mode: str = "off", **options: Any) -> Updates:
    """Train the paper's net on random images with dropout, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net = AlexNet(10, init="as_run", **options).to(memory_format=torch.channels_last)
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    images, labels = 60 * torch.randn(8, 3, 224, 224), torch.arange(8)
    net, images, labels = net.to(device), images.to(device), labels.to(device)
    optimizer = PaperSGD(net.parameters(), lr=0.0001)
    forward = net if mode == "off" else compiled(net, mode)
    losses = []
    for step in range(count):
        net.draw_dropout(0, step)
        loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Updates(losses, first, {name: p.detach().cpu() for name, p in net.named_parameters()})


def assert_same_training(one: Updates, other: Updates) -> None:
    """Compare the losses, and the changes of the weights with each other, since most of a weight is its first value.

    Training amplifies rounding: with this learning rate, 20 updates on a CPU in float32 and in float64 differ by 4e-5 in the
    loss and by 1.4% in the changes. With 0.001, they differ by 2% and 25%.
    """
    assert one.losses == pytest.approx(other.losses, rel=1e-3)
    for name, first in other.first.items():
        change = other.last[name] - first
        assert change.norm() > 0, name
        assert (one.last[name] - other.last[name]).norm() < 0.1 * change.norm(), name


@pytest.mark.parametrize("same_map_norm", [False, True])
def test_gpu_equals_cpu_over_20_updates(same_map_norm: bool) -> None:
    options = {"same_map_norm": same_map_norm}
    assert_same_training(updates("cuda", 20, **options), updates("cpu", 20, **options))


@pytest.mark.parametrize("mode", ["default", "graphs"])
def test_compiled_and_graphed_updates_equal_eager_ones(mode: str) -> None:
    assert_same_training(updates("cuda", 10, mode), updates("cuda", 10))


@pytest.mark.parametrize("compile", ["off", "default", "graphs"])
def test_resumed_run_equals_uninterrupted_run(compile: str, small_store: Path, cwd: Path, run_command: Run) -> None:
    options = (*NET, f"data.store={small_store}", "trainer.deterministic=true", f"trainer.compile={compile}")
    with stopping_after_an_epoch():
        assert run_command("train", *options, "run=parts")[0] == 130
    assert run_command("train", *options, "run=parts", "resume=true")[0] == 0
    assert run_command("train", *options, "run=whole")[0] == 0
    one, other = weights(cwd / "parts"), weights(cwd / "whole")
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def test_run_of_a_sweep_equals_one_alone(small_store: Path, cwd: Path, run_command: Run) -> None:
    """The second net of a process is compiled and recorded after the graphs of the first one are gone."""
    options = (*NET, f"data.store={small_store}", "trainer.deterministic=true", "trainer.compile=graphs")
    status, _, err = run_command("train", "-m", *options, "seed=0,1", "run=sweep-${seed}")
    assert status == 0, err
    assert run_command("train", *options, "seed=1", "run=alone")[0] == 0
    one, other = weights(cwd / "sweep-1"), weights(cwd / "alone")
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def test_run_records_its_precision(small_store: Path, cwd: Path, run_command: Run) -> None:
    for options, precision in (((), "bf16-mixed"), (("trainer.precision=32-true", "trainer.tf32=true"), "32-true")):
        if not options and torch.cuda.get_device_capability() < (8, 0):
            precision = "32-true"
        run = f"r-{precision}-{len(options)}"
        status, _, err = run_command("train", *NET, f"data.store={small_store}", f"run={run}", "epochs=1", *options)
        assert status == 0, err
        result = json.loads((cwd / run / "result.json").read_text())
        assert result["precision"] == precision
        assert result["tf32"] is bool(options)
        assert torch.cuda.get_device_name() in result["hardware"]


def test_run_of_a_cpu_continues_on_a_gpu(tiny_store: Path, stopped: Path, run_command: Run) -> None:
    options = [option for option in SMALL if option != "trainer=cpu"]
    line = ("train", *options, f"data.store={tiny_store}", f"run={stopped}", "trainer=gpu", "resume=true")
    status, _, err = run_command(*line)
    assert status == 0, err


@pytest.mark.parametrize("options", [[], ["trainer.compile=graphs"], ["augment.jitter=0.3"]], ids=str)
def test_host_does_not_wait_in_an_ordinary_update(
    options: list[str], small_store: Path, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA itself raises an error if anything from the forward pass to the update makes the host wait, except to log."""
    step, done = PaperSGD.step, []

    def watched(self: PaperSGD, closure: Any = None) -> Any:  # the closure is the forward and backward pass
        done.append(len(done))
        first_or_logs = len(done) <= 3 or len(done) % LOG_EVERY == 0
        try:
            torch.cuda.set_sync_debug_mode("default" if first_or_logs else "error")
            return step(self, closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(PaperSGD, "step", watched)
    status, _, err = run_command(
        "train", *NET, f"data.store={small_store}", "batch_size=1", "optim.lr=0.0001", "run=r", *options
    )
    assert status == 0, err
    assert len(done) == 24


def one_tower(tower: int, folder: Path) -> None:
    """Compute the gradients of one tower in its own process: on its own GPU, or on the one that both share."""
    own = torch.cuda.device_count() > 1
    device = torch.device("cuda", tower if own else 0)
    torch.cuda.set_device(device)
    backend = "nccl" if own else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=tower, world_size=2)
    net, images = tower_net(device)
    keep_tower(net, Link(None, tower))
    F.cross_entropy(net(images), torch.arange(4, device=device)).backward()
    torch.save({name: p.grad.cpu() for name, p in net.named_parameters()}, folder / f"{tower}.pt")  # type: ignore[union-attr]
    dist.destroy_process_group()


def tower_net(device: torch.device) -> tuple[AlexNet, torch.Tensor]:
    torch.manual_seed(1)
    net = AlexNet(10, init="as_run").double()
    images = 60 * torch.randn(4, 3, 224, 224, dtype=torch.float64)
    net, images = net.to(device), images.to(device, memory_format=torch.channels_last)
    net.draw_dropout(3, 4)
    return net, images


def test_two_towers_equal_one_device(tmp_path: Path) -> None:
    mp.spawn(one_tower, (tmp_path,), nprocs=2)
    device = torch.device("cuda", 0)
    net, images = tower_net(device)
    F.cross_entropy(net(images), torch.arange(4, device=device)).backward()
    towers = [torch.load(tmp_path / f"{tower}.pt") for tower in (0, 1)]
    for name, p in net.named_parameters():
        assert p.grad is not None
        whole = p.grad.cpu()
        assert (torch.cat([tower[name] for tower in towers]) - whole).norm() <= 1e-11 * whole.norm(), name
