"""Fixtures that create small image files and stores, and run the commands as a user does."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from PIL import Image

from alexnet_repro.cli import command
from alexnet_repro.configs import CONF
from alexnet_repro.data.preparation import prepare
from alexnet_repro.data.shard_writer import Example
from alexnet_repro.data.split import Split
from alexnet_repro.data.store_writer import write_store
from alexnet_repro.errors import Interrupted
from alexnet_repro.processes import cores
from alexnet_repro.training.run import train
from alexnet_repro.training.saving import KeepLast

os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests in several processes: more threads than cores would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)
FIGURES: list[str] = []  # what test_endurance.py survived


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add how much test_endurance.py does."""
    parser.addoption("--kills", type=int, default=4, help="kill runs this many times")
    parser.addoption("--images", type=int, default=300, help="read this many mutated images")
    parser.addoption("--damages", type=int, default=60, help="damage this many files")
    parser.addoption("--minutes", type=float, default=0, help="watch the memory of a run for this long")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of processes for -n auto: none but this one for slow tests, which measure time and memory."""
    return min(4, cores()) if "not slow" in config.option.markexpr else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what test_endurance.py survived."""
    for figure in FIGURES:
        terminalreporter.write_line(figure)


def picture(seed: int, width: int = 320, height: int = 280) -> NDArray[np.uint8]:
    """Return an image of smooth colours that depends on the seed, as a uint8 array of shape (height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def save_picture(path: Path, seed: int, width: int = 320, height: int = 280) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, width, height)).save(path, quality=95)


def image_folder(root: Path, train: int = 6, val: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write root/train/<class>/<i>.jpg and root/val/<class>/<i>.jpg, and return root."""
    for label, name in enumerate(classes):
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                save_picture(root / split / name / f"{i:03d}.jpg", seed=1000 * label + 100 * (split == "val") + i)
    return root


def one_image_per_file(path: Path, count: int) -> Split:
    """Write a store whose files hold one image of 8x8 pixels each, and return its split. All pixels of image i are i."""
    examples = [
        Example("train", i % 2, str(i), lambda i=i: np.full((8, 8, 3), i, np.uint8))  # type: ignore[misc]
        for i in range(count)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_repro.data.shard_writer.SHARD", 1)
        return write_store(examples, ["even", "odd"], path, image_size=8).split("train")


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty temporary folder and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "source")


@pytest.fixture(scope="session")
def small_store(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of 12 training and 6 validation images of 256x256 pixels in two classes."""
    path = tmp_path_factory.mktemp("stores") / "small"
    with initialize_config_dir(CONF, version_base="1.3"):
        prepare(compose("prepare", ["data=folder", f"source={source_folder}", f"data.store={path}"]))
    return path


@pytest.fixture(scope="session")
def trained(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run that trained a narrow net on the small store for one epoch."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    options = ["data=folder", f"data.store={small_store}", "net.width=0.25", "epochs=1", "batch_size=6", "trainer=cpu"]
    with initialize_config_dir(CONF, version_base="1.3"):
        train(compose("train", [*options, f"run={run}"]))
    return run


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process.

    run_command("train", "epochs=1") returns the exit status, standard output and standard error.
    """

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capfd.readouterr()
        status = 0
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            command(name)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            for number, handler in handlers.items():  # a command replaces them
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return status, out, err

    return run


# A small net on small images, for tests of everything but the nets: a run takes a second.
SMALL = (
    "data=folder", "data.image_size=32", "net=four_layer", "recipe=cuda_convnet", "schedule.rule=constant", "schedule.by_hand.val_joins_after=null",
    "order=reshuffled", "optim.decay_multiples=null", "augment.crop=32", "augment.random_crops=false", "trainer=cpu",
    "trainer.precision=32-true", "batch_size=6", "watch.every=0", "epochs=2",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_store(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of 12 training and 6 validation images of 32x32 pixels in two classes."""
    path = tmp_path_factory.mktemp("stores") / "tiny"
    with initialize_config_dir(CONF, version_base="1.3"):
        options = ["data=folder", "data.image_size=32", f"source={source_folder}", f"data.store={path}"]
        prepare(compose("prepare", options))
    return path


@pytest.fixture(scope="session")
def small_alexnet(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of a narrow AlexNet, with recipe=as_run, on images of 110x110 pixels."""
    folder = tmp_path_factory.mktemp("small_alexnet")
    images = ["data=folder", "data.image_size=110", f"data.store={folder / 'store'}"]
    with initialize_config_dir(CONF, version_base="1.3"):
        prepare(compose("prepare", [*images, f"source={source_folder}"]))
        train(compose("train", [*small_alexnet_options(folder), f"run={folder / 'run'}"]))
    return folder / "run"


def small_alexnet_options(folder: Path) -> list[str]:
    """Return the options of such a run, on the store in ``folder``."""
    return [
        "data=folder", "data.image_size=110", f"data.store={folder / 'store'}", "recipe=as_run", "augment.crop=96",
        "net.width=0.125", "epochs=1", "batch_size=6", "trainer=cpu", "trainer.precision=32-true", "watch.every=0",
    ]  # fmt: skip


@contextmanager
def stopping_after_an_epoch() -> Iterator[None]:
    """Ask every run in this block to stop as soon as it has saved its first epoch."""
    after_epoch = KeepLast.on_train_epoch_end

    def stop_after_epoch(self: KeepLast, *arguments: Any) -> None:
        after_epoch(self, *arguments)
        self._ask_to_stop(signal.SIGTERM, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeepLast, "on_train_epoch_end", stop_after_epoch)
        yield


@pytest.fixture(scope="session")
def stopped(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was stopped after its first of two epochs."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with initialize_config_dir(CONF, version_base="1.3"), stopping_after_an_epoch(), pytest.raises(Interrupted):
        train(compose("train", [*SMALL, f"data.store={tiny_store}", f"run={run}"]))
    return run


@pytest.fixture(scope="session")
def finished(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with initialize_config_dir(CONF, version_base="1.3"):
        train(compose("train", [*SMALL, f"data.store={tiny_store}", f"run={run}"]))
    return run
