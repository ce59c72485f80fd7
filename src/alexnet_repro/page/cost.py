"""Estimate what the experiment of a claim costs."""

import math
import re
from pathlib import Path

from omegaconf import OmegaConf

from alexnet_repro.claims.paper import Claim
from alexnet_repro.configs import CONF

TRAINING_IMAGES = {  # of the releases; Section 2, Section 6 and facts of CIFAR-10
    "ilsvrc2012": 1_281_167,
    "ilsvrc2010": 1_261_406,
    "imagenet_fall2009": 4_450_000,
    "cifar10": 50_000,
}
RATE = 10_000  # images per second


def cost(claim: Claim) -> str:
    """Return the cost of a claim's command as text, or "" for a command that trains nothing.

    It is the number of runs, the images that they train on, and the hours that these take at RATE images per second:
    arithmetic, not a measurement.
    """
    images = runs = 0.0
    for command in (claim.command or "").split(";"):
        if "alexnet_repro.train" not in command:
            continue
        experiment = re.search(r"\+experiment=(\w+)", command)
        conf = OmegaConf.load(Path(CONF) / "experiment" / f"{experiment[1]}.yaml") if experiment else OmegaConf.create()
        swept = {
            **(OmegaConf.select(conf, "hydra.sweeper.params") or {}),
            **{key: value for key, _, value in (part.partition("=") for part in command.replace("'", "").split())},
        }
        own = math.prod(len(str(value).split(",")) for value in swept.values())
        data = next((name for name in TRAINING_IMAGES if name in command), "")
        if experiment:
            data = next((name for name in TRAINING_IMAGES if name in OmegaConf.to_yaml(conf)), "ilsvrc2012")
        epochs = re.search(r"\bepochs=(\d+)", command)
        length = int(epochs[1]) if epochs else OmegaConf.select(conf, "epochs") or (160 if data == "cifar10" else 90)
        runs += own
        images += own * length * TRAINING_IMAGES.get(data, 0)
    if not images:
        return ""
    return f"{runs:.0f} runs, {images / 1e6:,.0f} million images: {hours(images, 1)}"


def hours(images: float, decimals: int = 0) -> str:
    """Return how long a GPU takes to train on so many images, as text."""
    return f"{images / RATE / 3600:,.{decimals}f} hours at {RATE:,} images per second (arithmetic)"
