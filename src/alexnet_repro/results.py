"""What was measured: results read, and the measures that a claim may name."""

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from alexnet_repro.cli import UserError
from alexnet_repro.net import AlexNet

Result = dict[str, Any]
Measured = dict[str, float]  # by the names that a claim's value has

# What a group's results have in common, besides what a claim compares.
ALIKE = ("data", "split", "source", "net", "experiment", "recipe", "epochs", "batch_size", "lr", "options")
NEEDED = ("recipe", "ablation", "data", "net", "seed", "epochs", "centre")  # in a run's result


def read_results(*folders: Path) -> list[Result]:
    """All results in these files and below these folders, each with its "file", and with "retrieval" if report measured it.

    A run that is in several of them is taken once, from the first. Raises UserError for a damaged result.
    """
    results: dict[Any, Result] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]:
            if path.name == "retrieval.json" or path.name.startswith(("evaluation-", "job-")):
                continue
            content = read_result(path)
            if not isinstance(content, dict) or not ("centre" in content or "ratios" in content):
                continue
            if "experiment" not in content and (named := re.search(r"\+experiment=(\w+)", content.get("command", ""))):
                content["experiment"] = named[1]  # of results that are older than this field
            if (beside := path.parent / "retrieval.json").is_file():
                content["retrieval"] = read_result(beside)
            told = (*ALIKE, "ablation", "seed", "seeds", "checkpoint", "commit", "seconds", "machine")
            key = (*(str(content.get(k)) for k in told), "ten_crop" in content)
            results.setdefault(key, {**content, "file": str(path)})
    return list(results.values())


def read_result(path: Path) -> Any:
    """What such a file holds. Raises UserError if it is damaged, or if a run's result lacks what every one has."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", "mend or remove it") from None
    if isinstance(content, dict) and "centre" in content:
        missing = [key for key in NEEDED if key not in content]
        history = content.get("history") or []
        if missing or any(not {"epoch", "train_error"} <= set(epoch) for epoch in history):
            raise UserError(f"{path} lacks {', '.join(missing) or 'errors in its history'}", "mend or remove it")
    return content


def _epochs_to_25(result: Result) -> Measured | None:
    if not result.get("history"):
        return None
    reached = (epoch["epoch"] for epoch in result["history"] if epoch["train_error"] <= 25)
    return {"epochs": next(reached, math.inf)}


def _training_error(result: Result) -> Measured | None:
    return {"train_error": result["history"][-1]["train_error"]} if result.get("history") else None


def _view_gain(result: Result) -> Measured | None:
    if "ten_crop" not in result:
        return None
    return {key: result["centre"][key] - result["ten_crop"][key] for key in ("top1_error", "top5_error")}


def _specialisation(result: Result) -> Measured | None:
    content = result.get("colour_content", ())
    return {"share": abs(content[0] - content[1])} if len(content) == 2 else None


def _loading(result: Result) -> Measured | None:
    speeds = result.get("images_per_s", {})
    loaded, trained = speeds.get("loader, one core: ours"), speeds.get("step bf16: paper")
    return {"share": trained / loaded} if loaded and trained else None


def _retrieval_gain(better: str, worse: str) -> Callable[[Result], Measured | None]:
    def gain(result: Result) -> Measured | None:
        shares = result.get("retrieval", {}).get("same_class", {})
        return {"points": shares[better] - shares[worse]} if {better, worse} <= shares.keys() else None

    return gain


MEASURES: dict[str | None, Callable[[Result], Measured | None]] = {
    None: lambda result: result.get("ten_crop"),
    "one_view": lambda result: result.get("centre"),
    "one_view_minus_ten_crops": _view_gain,
    "epochs_to_25": _epochs_to_25,
    "training_error": _training_error,
    "specialisation": _specialisation,
    "loading": _loading,
    "fc7_minus_pixels": _retrieval_gain("fc7", "pixels"),
    "codes_minus_pixels": _retrieval_gain("codes of fc7", "codes of pixels"),
}


@cache
def counts() -> dict[str, Measured]:
    """Properties of the net by the name of their measure, counted on the net itself (with no memory for its weights)."""
    with torch.device("meta"):
        net, one_gpu = AlexNet(lrn=False), AlexNet(towers=1)  # normalisation has no parameters and no neurons
        neurons = {name: float(maps[0].numel()) for name, maps in net.activations(torch.empty(1, 3, 224, 224)).items()}
    neurons.pop("pool5")  # a pool's outputs are not counted as neurons in Section 3.5
    parameters = sum(p.numel() for p in net.parameters())
    shares = {
        name: 100 * sum(p.numel() for p in net.get_submodule(name).parameters()) / parameters
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5")
    }
    return {
        "neurons": neurons,
        "neurons_in_all": {"all": sum(neurons.values())},
        "input_size": {"numbers": 224 * 224 * 3},
        "parameters": {"all": parameters},
        "parameters_of_one_gpu": {"share": sum(p.numel() for p in one_gpu.parameters()) / parameters},
        "share_of_each_convolution": shares,
        "crops": {"images": 2 * (256 - 224 + 1) ** 2},
    }
