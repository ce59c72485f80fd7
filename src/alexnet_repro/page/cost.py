"""Estimate what the experiment of a claim costs."""

import itertools
import shlex
from functools import cache
from typing import Any

from omegaconf import DictConfig

from alexnet_repro.claims.paper import Claim
from alexnet_repro.composition import composed

TRAINING_IMAGES = {  # of the releases: Section 2 and Section 6; for CIFAR-10, batches 1 to 4
    "ilsvrc2012": 1_281_167,
    "ilsvrc2010": 1_261_406,
    "imagenet_fall2009": 4_450_000,
    "imagenet_fall2011": 15_000_000,
    "cifar10": 40_000,
}
JOINING = 10_000  # images of CIFAR-10's batch 5, which can join the training images
RATE = 10_000  # images per second


def cost(claim: Claim) -> str:
    """Return the cost of a claim's command as text, or "" for a command that trains nothing.

    It is the number of runs, the images that they train on, and the hours that these take at RATE images per second:
    arithmetic, not a measurement.
    """
    commands = [shlex.split(command) for command in (claim.command or "").split(";")]
    runs = [run for command in commands if "alexnet_repro.train" in command for run in _runs(command)]
    if not runs:
        return ""
    trained = [_composed(tuple(part for part in run if not part.startswith("seed="))) for run in runs]
    images = sum(_images(cfg) for cfg in trained)
    most = "at most " if any(cfg.stop_at is not None for cfg in trained) else ""
    return f"{len(runs)} runs, {most}{images / 1e6:,.0f} million images: {hours(images, 1)}"


def hours(images: float, decimals: int = 0) -> str:
    """Return how long a GPU takes to train on so many images, as text."""
    return f"{images / RATE / 3600:,.{decimals}f} hours on a GPU that trains on {RATE:,} images per second (arithmetic)"


def _runs(command: list[str]) -> list[list[str]]:
    """Return the options of each run of a sweep: the product of all values on the command line and in the experiment."""
    given = dict(part.split("=", 1) for part in command if "=" in part)
    experiment = [f"{key}={value}" for key, value in given.items() if key == "+experiment"]
    swept: dict[str, Any] = {**(_composed(tuple(experiment)).hydra.sweeper.params or {}), **given}
    values = [[f"{key}={value}" for value in str(listed).split(",")] for key, listed in swept.items()]
    return [list(run) for run in itertools.product(*values)]


@cache
def _composed(options: tuple[str, ...]) -> DictConfig:
    return composed("train", options, with_hydra=True)


def _images(cfg: DictConfig) -> float:
    """Return the number of images that a run trains on, with repetition."""
    images = cfg.epochs * TRAINING_IMAGES[cfg.data.name]
    schedule = cfg.schedule.by_hand
    if cfg.data.name == "cifar10" and schedule.val_joins_after is not None:
        images += JOINING * cfg.epochs * (1 - schedule.val_joins_after / schedule.of_epochs)
    return float(images)
