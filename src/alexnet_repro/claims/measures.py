"""Compute the measures that claims name, from one result, from a pair of results, or from the net itself."""

import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf

from alexnet_repro.claims.paper import Values
from alexnet_repro.claims.results import Result
from alexnet_repro.claims.scores import VIEWS
from alexnet_repro.configs import CONF
from alexnet_repro.net.alexnet import AlexNet


def crossing(history: Iterable[dict[str, float]], x: str, y: str, level: float, start: float | None = None) -> float:
    """Return the ``x`` at which ``y`` first falls to ``level``, interpolated linearly between epochs.

    start: the value of y at x = 0, if known. Returns infinity if y never reaches the level.
    """
    before: tuple[float, float] | None = None if start is None else (0.0, start)
    for epoch in history:
        here = float(epoch[x]), float(epoch[y])
        if here[1] <= level:
            if before is None:
                return here[0]
            share = (before[1] - level) / (before[1] - here[1]) if before[1] > here[1] else 1.0
            return before[0] + share * (here[0] - before[0])
        before = here
    return math.inf


def _epochs_to_25(result: Result) -> Values | None:
    if not result.get("history"):
        return None
    return {"epochs": crossing(result["history"], "epoch", "train_error", 25, start=90.0)}  # chance on CIFAR-10


def _training_error(result: Result) -> Values | None:
    sample = result.get("train_sample")
    return {"train_error": sample["top1_error"]} if sample else None


def _overfitting(result: Result) -> Values | None:
    sample = result.get("train_sample")
    return {"gap": result["centre"]["top1_error"] - sample["top1_error"]} if sample else None


def _view_gain(result: Result) -> Values | None:
    if "ten_crop" not in result:
        return None
    return {key: result["centre"][key] - result["ten_crop"][key] for key in ("top1_error", "top5_error")}


def _left_plateau(result: Result) -> Values | None:
    if "left_plateau" not in result:
        return None
    return {"updates": math.inf if result["left_plateau"] is None else result["left_plateau"]}


def _validation_minus_test(result: Result) -> Values | None:
    last = (result.get("history") or [{}])[-1]
    if result.get("split") != "test" or "val_top5_error" not in last:
        return None
    return {"top5_error": last["val_top5_error"] - result["centre"]["top5_error"]}


def _training_at_100(result: Result) -> Values | None:
    epoch = next((e for e in result.get("history") or [] if e["epoch"] == 100 and "train_loss" in e), None)
    return {"train_error": epoch["train_error"], "train_loss": epoch["train_loss"]} if epoch else None


RANDOM_COLOUR = 2 / 3  # expected share of colour in the energy of random RGB weights


def _specialised(result: Result) -> Values | None:
    """Return 1 if one tower is largely colour-agnostic and the other largely colour-specific, else 0.

    Largely colour-agnostic: at most half the colour content of random weights. Largely colour-specific: at least that of
    random weights.
    """
    shares = result.get("colour_content", ())
    if len(shares) != 2:
        return None
    return {"specialised": float(min(shares) <= RANDOM_COLOUR / 2 and max(shares) >= RANDOM_COLOUR)}


def _loading(result: Result) -> Values | None:
    if " x " in result.get("machine", ""):  # a GPU, whose host has other cores
        return None
    speeds = result.get("images_per_s", {})
    loaded, trained = speeds.get("loader, one core: ours"), speeds.get("step bf16: paper")
    return {"share": trained / loaded} if loaded and trained else None


FEWEST_QUERIES, FEWEST_RETRIEVED = 100, 1000  # images for which shares of a class are worth comparing


def _retrieval_gain(better: str, worse: str) -> Callable[[Result], Values | None]:
    def gain(result: Result) -> Values | None:
        found = result.get("retrieval", {})
        if found.get("queries", 0) < FEWEST_QUERIES or found.get("images", 0) < FEWEST_RETRIEVED:
            return None
        shares = found["same_class"]
        return {"points": shares[better] - shares[worse]} if {better, worse} <= shares.keys() else None

    return gain


def _view(name: str) -> Callable[[Result], Values | None]:
    return lambda result: cast(dict[str, Any], result).get(name)


MEASURES: dict[str, Callable[[Result], Values | None]] = {
    **{view: _view(view) for view in VIEWS},
    "centre_minus_ten_crop": _view_gain,
    "epochs_to_25": _epochs_to_25,
    "training_error": _training_error,
    "training_at_100": _training_at_100,
    "overfitting": _overfitting,
    "left_plateau": _left_plateau,
    "validation_minus_test": _validation_minus_test,
    "specialised": _specialised,
    "loading": _loading,
    "fc7_minus_pixels": _retrieval_gain("fc7", "pixels"),
    "codes_minus_pixels": _retrieval_gain("codes of fc7", "codes of pixels"),
}


def val_error_at_equal_training_error(run: Result, against: Result) -> Values | None:
    """Return the difference in validation error, in points, at equal training error.

    The common training error is the higher of the two runs' minima. Validation errors are interpolated between epochs.
    Returns None if either run has no validation errors.
    """
    histories = [result.get("history") or [] for result in (run, against)]
    if not all(histories) or not all("val_error" in epoch for history in histories for epoch in history):
        return None
    level = max(min(epoch["train_error"] for epoch in history) for history in histories)

    def val_error(history: list[dict[str, float]]) -> float:
        at = crossing(history, "epoch", "train_error", level)
        return float(np.interp(at, [e["epoch"] for e in history], [e["val_error"] for e in history]))

    return {"gap": val_error(histories[0]) - val_error(histories[1])}


def _at_first_rate(result: Result) -> list[dict[str, Any]]:
    """Return the epochs of a history before the learning rate first falls, or nothing if the history does not say."""
    history = result.get("history") or []
    if not all("lr" in epoch and "train_loss" in epoch for epoch in history):
        return []
    return [epoch for epoch in history if epoch["lr"] == history[0]["lr"]]


FLAT = 0.05  # largest relative fall of the training loss over the last quarter of the epochs that counts as flattened


def updates_to_common_loss(run: Result, against: Result) -> Values | None:
    """Return the ratio of the updates that two runs need to the same training loss, at the first learning rate.

    The level is 10% above the higher of the two runs' lowest losses, so that both reach it. A net that trains worse, and
    stalls at a higher loss, does not seem to converge sooner. ``not_flattened`` says when the numbers mean nothing.
    """
    histories = [_at_first_rate(result) for result in (run, against)]
    if not all(histories):
        return None
    level = 1.1 * max(min(epoch["train_loss"] for epoch in history) for history in histories)
    mine, others = (crossing(history, "steps", "train_loss", level) for history in histories)
    return {"updates": mine / others}


def not_flattened(run: Result, against: Result) -> str | None:
    """Return why two runs can't be compared by their convergence, or None if both losses have flattened."""
    for result in (run, against):
        losses = [epoch["train_loss"] for epoch in _at_first_rate(result)]
        quarter = max(1, len(losses) // 4)
        before, last = losses[:-quarter], losses[-quarter:]
        if not before or min(last) < (1 - FLAT) * min(before):
            return (
                f"cannot be tested here: after {len(losses)} epochs at the first learning rate, the training loss of "
                f"{result['ablation']} still falls"
            )
    return None


def seconds_per_update(run: Result, against: Result) -> Values | None:
    """Return the ratio of the seconds per update of two runs, or None unless both ran on GPUs of one model."""
    hardware = [result.get("hardware", "") for result in (run, against)]
    models = ["" if ", then " in used else used.partition(" x ")[2] for used in hardware]  # as in "2 x NVIDIA H200"
    if not models[0] or models[0] != models[1] or not (run.get("steps") and against.get("steps")):
        return None
    return {"seconds": run["seconds"] / run["steps"] / (against["seconds"] / against["steps"])}


PAIR_MEASURES: dict[str, Callable[[Result, Result], Values | None]] = {
    "val_error_at_equal_training_error": val_error_at_equal_training_error,
    "updates_to_common_loss": updates_to_common_loss,
    "seconds_per_update": seconds_per_update,
}


@cache
def counts() -> dict[str, Values]:
    """Compute the counted properties from the net itself, on the meta device to allocate no weights."""
    recipe, data = (OmegaConf.load(Path(CONF) / file) for file in ("recipe/paper.yaml", "data/ilsvrc2012.yaml"))
    crop, size = recipe.augment.crop, data.data.image_size
    with torch.device("meta"):
        net, one_gpu = AlexNet(lrn=False), AlexNet(towers=1)  # LRN has no parameters and no neurons
        image = torch.empty(1, 3, crop, crop)
        neurons = {name: float(maps[0].numel()) for name, maps in net.activations(image).items()}
    neurons.pop("pool5")  # Section 3.5 does not count pooling outputs as neurons
    parameters = sum(p.numel() for p in net.parameters())
    shares = {
        name: 100 * sum(p.numel() for p in net.get_submodule(name).parameters()) / parameters
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5")
    }
    places = torch.empty(size, size, device="meta").unfold(0, crop, 1).unfold(1, crop, 1)
    return {
        "neurons": neurons,
        "neurons_in_all": {"all": sum(neurons.values())},
        "input_size": {"numbers": float(image.numel())},
        "parameters": {"all": parameters},
        "parameters_of_one_gpu": {"share": sum(p.numel() for p in one_gpu.parameters()) / parameters},
        "share_of_each_convolution": shares,
        "crops": {"images": 2.0 * places.shape[0] * places.shape[1]},
    }
