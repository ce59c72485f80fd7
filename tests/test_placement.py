"""Test that runs on several devices equal runs on one device.

The tests use real CPU processes and gloo. They were never run on GPUs.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.nn import functional as F

from alexnet_repro.errors import IN_USE, USER_ERROR, InUse, UserError
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.colour import colour_content
from alexnet_repro.net.placement import Link, crossing_bytes, keep_tower
from alexnet_repro.training import launcher
from tests.conftest import image_folder

Run = Callable[..., tuple[int, str, str]]

VARIANTS: list[dict[str, Any]] = [
    {"classes": 7, "width": 0.25},  # an odd number: one tower has one logit more
    {"classes": 10, "communication": False, "lrn": False, "width": 0.25},
    {"classes": 10, "conv6": True, "bottleneck": 6, "width": 0.25},
    {"classes": 10, "image_size": 96, "width": 0.25},
    {"classes": 10, "conv3": False, "same_map_norm": True, "layer1_order": "norm_pool_relu", "width": 0.25},
]
IMAGES, FIRST = 3, 1  # rows 1 to 3 of a batch of 5, so that the dropout masks depend on the rows


def loss_and_net(variant: dict[str, Any], link: Link | None) -> tuple[torch.Tensor, AlexNet]:
    torch.manual_seed(1)
    net = AlexNet(init="as_run", **variant).double()
    if link is not None:
        keep_tower(net, link)
    generator = torch.Generator().manual_seed(2)
    size = variant.get("image_size", 224)
    images = 60 * torch.randn(IMAGES, 3, size, size, generator=generator, dtype=torch.float64)
    net.draw_dropout(3, 4, first=FIRST)
    logits = net(images.to(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits, torch.arange(IMAGES))
    loss.backward()
    return loss, net


def one_tower(tower: int, folder: Path) -> None:
    """Compute the loss and gradients of one tower in its own process, and save them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=tower, world_size=2)
    for number, variant in enumerate(VARIANTS):
        link = Link(None, tower)
        loss, net = loss_and_net(variant, link)
        gradients = {name: p.grad for name, p in net.named_parameters()}
        torch.save(
            {"loss": loss.detach(), "gradients": gradients, "bytes": dict(link.bytes)}, folder / f"{number}-{tower}"
        )
    dist.destroy_process_group()


def test_loss_and_gradients_of_two_towers_equal_the_whole_net(tmp_path: Path) -> None:
    mp.spawn(one_tower, (tmp_path,), nprocs=2)
    for number, variant in enumerate(VARIANTS):
        loss, net = loss_and_net(variant, None)
        towers = [torch.load(tmp_path / f"{number}-{tower}") for tower in (0, 1)]
        for tower in towers:
            torch.testing.assert_close(tower["loss"], loss, rtol=1e-12, atol=0)
            assert tower["bytes"] == crossing_bytes(net, IMAGES, element=8)
        for name, p in net.named_parameters():
            joined = torch.cat([tower["gradients"][name] for tower in towers])
            assert p.grad is not None
            assert (joined - p.grad).norm() <= 1e-11 * p.grad.norm(), (variant, name)


def test_exchanged_bytes_equal_those_of_figure_2() -> None:
    # both ways: 128 of 256 maps of 13x13, 128 of 256 of 6x6, 2048 of 4096 neurons twice; one way: 500 of 1000 logits
    expected = {"conv3": 2 * 128 * 169, "fc6": 2 * 128 * 36, "fc7": 2 * 2048, "fc8": 2 * 2048, "softmax": 500}
    assert crossing_bytes(AlexNet(), 128) == {name: 128 * 4 * numbers for name, numbers in expected.items()}
    sixth = crossing_bytes(AlexNet(conv6=True), 1)
    assert sixth["conv6"] == 4 * 2 * 128 * 36  # its input has the size of fc6's
    apart = crossing_bytes(AlexNet(communication=False), 1)
    assert apart == {"fc8": 4 * 2 * 2048, "softmax": 4 * 500}  # run 150: joined only in the last layer


def test_colour_content_of_grey_red_and_random_kernels() -> None:
    grey, red = torch.ones(2, 3, 11, 11), torch.zeros(2, 3, 11, 11)
    red[:, 0] = 1  # mean 1/3, residual (2/3, -1/3, -1/3): 6/9 of the sum of squares of 1
    assert colour_content(torch.cat([grey, red])) == pytest.approx([0, 2 / 3])
    torch.manual_seed(0)
    assert colour_content(torch.randn(96, 3, 11, 11)) == pytest.approx([2 / 3, 2 / 3], abs=0.02)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["+ablation=one_gpu"], "one_gpu has no second tower"),
        (["trainer.precision=16-mixed"], "loss scaling"),
        (["trainer.devices=3"], "needs 2 devices, not trainer.devices=3"),
        (["placement.replicas=2", "trainer.nodes=3"], "can't be shared evenly"),
        (["placement.replicas=0"], "placement.replicas=0"),
        (["trainer=gpu", "batch_size=6"], "needs 2 GPUs, but this machine has none"),
    ],
)
def test_unsupported_placements_are_refused(
    options: list[str], problem: str, small_store: Path, cwd: Path, run_command: Run
) -> None:
    if options[0] == "trainer=gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = ["data=folder", f"data.store={small_store}", "trainer=cpu", "placement=two_devices", "run=r", *options]
    status, _, err = run_command("train", *arguments)
    assert status == 2
    assert problem in err
    assert "Traceback" not in err
    assert not Path("r").exists()


def test_a_job_of_several_processes_that_fails_ends_neither_the_sweep_nor_its_number_of_threads(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job's processes share the cores; the next job may have another number of processes."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher, "sweeping", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    seen, statuses = [], iter((USER_ERROR, IN_USE, USER_ERROR))

    def fail(*_: Any) -> Callable[..., None]:
        def start(*_: Any) -> None:
            seen.append(os.environ["OMP_NUM_THREADS"])
            failure = ProcessFailure(0, 1, next(statuses), "none")
            raise ChildFailedError("train", {0: failure})

        return start

    monkeypatch.setattr(launcher, "elastic_launch", fail)
    for processes, kind in ((2, UserError), (8, InUse)):
        with pytest.raises(UserError, match="ended with the error above") as error:
            launcher._launch("train", processes, [])
        assert type(error.value) is kind
    assert seen == ["8", "2"]
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setattr(launcher, "sweeping", lambda: False)
    with pytest.raises(SystemExit) as end:
        launcher._launch("train", 2, [])
    assert end.value.code == USER_ERROR


def test_odd_number_of_processes_is_refused(
    small_store: Path, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, _, err = run_command(
        "train", "data=folder", f"data.store={small_store}", "trainer=cpu", "placement=two_devices"
    )
    assert status == 2
    assert "two towers need an even number" in err


# The following tests train a net with a quarter of the maps and neurons in up to four processes.

# 28 images in batches of 3, with a last batch of 1. Two replicas therefore get 1 and 2 images, or 0 and 1. There are 20
# updates, and the learning rate falls after the first 10.
SETUP = (
    "data=folder", "data.store=store", "trainer=cpu", "batch_size=3", "epochs=2", "watch.every=7", "net.width=0.25",
)  # fmt: skip
F64 = "trainer.precision=64-true"  # the order of summation changes results by only 1e-12, so rounding hides no other change
PAPER = ("recipe=paper", "optim.lr=0.002", "schedule.rule=by_hand", "augment.colour_noise=0.3")
AS_RUN = ("recipe=as_run", "optim.lr=0.001", "augment.share=3")
ONE: tuple[str, ...] = ()
TOWERS, REPLICAS = ("placement=two_devices",), ("placement.replicas=2",)
BOTH = TOWERS + REPLICAS


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placement")
    image_folder(folder / "source", train=14, val=2, classes=("cat", "dog"))
    command(folder, "prepare", "data=folder", "source=source", "data.store=store")
    return folder


def command(folder: Path, *arguments: str, python: tuple[str, ...] = (), threads: str | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": threads} if threads else {}
    name, *options = arguments
    line = [sys.executable, *python, "-m", f"alexnet_repro.{name}", *options]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True, mmap=True)


def difference(one: Path, other: Path) -> float:
    """Return the largest relative difference, by norm, of all parameters and momentum buffers."""
    a, b = checkpoint(one), checkpoint(other)
    assert a["global_step"] == b["global_step"]
    assert a["schedule"] == b["schedule"]
    pairs = [(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"]]
    states = [c["optimizer_states"][0] for c in (a, b)]
    assert [group["lr"] for group in states[0]["param_groups"]] == [group["lr"] for group in states[1]["param_groups"]]
    pairs += [tuple(s["state"][i]["momentum_buffer"] for s in states) for i in states[0]["state"]]  # type: ignore[misc]
    assert len(pairs) == 16 + 2 + 16
    return max(float((x.double() - y.double()).norm() / x.double().norm()) for x, y in pairs)


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def results(run: Path) -> dict[str, Any]:
    result = json.loads((run / "result.json").read_text())
    return {
        key: result[key] for key in ("centre", "ten_crop", "history", "parameters", "steps", "epochs", "colour_content")
    }


@pytest.fixture(scope="module")
def paper_one(workspace: Path) -> Path:
    command(workspace, "train", *SETUP, *PAPER, F64, "run=paper-one")
    return workspace / "paper-one"


@pytest.fixture(scope="module")
def as_run_one(workspace: Path) -> Path:
    command(workspace, "train", *SETUP, *AS_RUN, F64, "run=as_run-one")
    return workspace / "as_run-one"


def assert_same_run(one: Path, other: Path) -> None:
    assert difference(one, other) < 1e-10
    assert losses(other) == pytest.approx(losses(one), rel=1e-12)
    assert results(other) == results(one)


@pytest.mark.slow
def test_error_of_all_processes_is_reported_once(workspace: Path) -> None:
    line = [sys.executable, "-m", "alexnet_repro.train", *SETUP, *TOWERS, "optim.lr=1e20", "run=diverged"]
    done = subprocess.run(line, cwd=workspace, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error: the loss is ") == 1, done.stderr
    assert "Initializing" not in done.stdout + done.stderr


@pytest.mark.slow
def test_replicas_train_the_net_of_one_device(workspace: Path, paper_one: Path) -> None:
    command(workspace, "train", *SETUP, *PAPER, F64, *REPLICAS, "run=paper-replicas")
    assert_same_run(paper_one, workspace / "paper-replicas")
    with (paper_one / "metrics.csv").open(newline="") as file:
        assert len({row["lr"] for row in csv.DictReader(file) if row["lr"]}) == 2


@pytest.mark.slow
def test_replicas_of_two_towers_train_the_net_of_one_device(workspace: Path, as_run_one: Path) -> None:
    command(workspace, "train", *SETUP, *AS_RUN, F64, *BOTH, "run=as_run-both")
    assert_same_run(as_run_one, workspace / "as_run-both")


@pytest.mark.slow
def test_float32_differs_by_rounding(workspace: Path) -> None:
    """Rounding is amplified where it breaks a max-pooling tie the other way.

    Differences of about 1e-5 to 1e-4 of the norm of a weight were observed.
    """
    setup = (*SETUP, *AS_RUN, "trainer.precision=32-true", "epochs=1", "batch_size=6")
    command(workspace, "train", *setup, "run=f32-one")
    command(workspace, "train", *setup, *TOWERS, "run=f32-towers")
    one, towers = (checkpoint(workspace / f"f32-{name}")["state_dict"] for name in ("one", "towers"))
    for key in one:
        if key.endswith(".weight"):
            assert (one[key] - towers[key]).norm() < 1e-3 * one[key].norm(), key


def start_and_wait_for_the_first_epoch(workspace: Path, *arguments: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "alexnet_repro.train", *arguments]
    process = subprocess.Popen(line, cwd=workspace, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    run = next(a for a in arguments if a.startswith("run=")).removeprefix("run=")
    deadline = time.monotonic() + 200
    while not (workspace / run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_killed_process_ends_the_run_and_it_resumes_with_another_placement(workspace: Path, paper_one: Path) -> None:
    """A run killed on two devices and resumed on one equals an uninterrupted run, and evaluates equally on both."""
    setup = [*SETUP, *PAPER, F64, "run=killed"]
    process = start_and_wait_for_the_first_epoch(workspace, *setup, *TOWERS)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "alexnet_repro.train"], capture_output=True, text=True, check=True
    )
    began = time.monotonic()
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 1
    assert "of 2 ended with signal 9, and so did the run" in err
    assert "resume=true" in err
    assert "Traceback" not in err

    assert checkpoint(workspace / "killed")["global_step"] == 10
    command(workspace, "train", *setup, "resume=true")
    assert_same_run(paper_one, workspace / "killed")
    out = [
        command(workspace, "evaluate", "run=killed", "trainer=cpu", "views=ten_crop", *where) for where in (ONE, TOWERS)
    ]
    tables = [[line for line in text.splitlines() if "this run" in line] for text in out]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


@pytest.mark.slow
def test_run_moves_from_one_device_to_two_under_torchrun(workspace: Path, as_run_one: Path) -> None:
    setup = [*SETUP, *AS_RUN, F64, "run=moved"]
    process = start_and_wait_for_the_first_epoch(workspace, *setup)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert "resuming moved" in command(workspace, "train", *setup, *TOWERS, "resume=true", python=torchrun)
    assert_same_run(as_run_one, workspace / "moved")


@pytest.mark.slow
def test_sweep_job_runs_on_two_devices(workspace: Path) -> None:
    few = ["data=folder", "data.store=store", "trainer=cpu", "batch_size=28", "epochs=1", "watch.every=0"]
    out = command(workspace, "train", "-m", *few, *TOWERS, "+ablation=no_lrn", "hydra.sweep.dir=sweep")
    assert "1 job; this table's numbers are in" in out
    assert len(list(workspace.glob("runs/*/seed-0/result.json"))) == 1
