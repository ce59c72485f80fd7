"""Ensembles (Table 2): which runs they consist of, and the weights of their mean."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from alexnet_repro.claims.results import read_result
from alexnet_repro.claims.scores import MEASURED, top_k_misses
from alexnet_repro.errors import UserError
from alexnet_repro.training.run_folder import finished_result, named

FINE_TUNED = ("fine_tuned", "log_4_ilsvrc2012")  # last steps of conf/pretraining
STEP = 0.05  # of the weights, as in the 2012 script


def chosen_runs(cfg: DictConfig) -> list[Path]:
    """Return the run folders that ``run`` or ``runs`` names.

    A folder of several runs in ``runs`` stands for all finished runs in it. Raises UserError if no run is named, if
    both options are given, or if a run is named twice.
    """
    chosen = cfg.runs if cfg.run is None else cfg.run
    folders = named(chosen)
    if not folders or (cfg.run is not None and cfg.runs is not None):
        raise UserError(
            "say which run to evaluate: run=FOLDER, or runs=[FOLDER,FOLDER] for an ensemble",
            "for example run=runs/paper/seed-0, or runs=runs/paper for all its seeds",
        )
    runs = []
    for folder in folders:
        seeds = [] if (folder / "config.yaml").exists() else sorted(folder.glob("*/result.json"))
        runs += [result.parent for result in seeds] if seeds and cfg.run is None else [folder]
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"runs={cfg.runs} names a run twice", "name each run of an ensemble once")
    return runs


def common_facts(runs: list[Path]) -> dict[str, Any]:
    """Return how the runs of an ensemble were trained, with their number and seeds.

    Words that differ between runs are joined by "and", numbers are left out. Raises UserError for an unfinished run.
    """
    results = [read_result(finished_result(run), "centre") for run in runs]
    facts: dict[str, Any] = {"members": len(runs), "seeds": [result["seed"] for result in results]}
    if pretrained := sum(result.get("pretraining") in FINE_TUNED for result in results):
        facts["pretrained_members"] = pretrained
    plain = [result for result in results if result.get("pretraining") not in FINE_TUNED] or results
    for key in ("ablation", "recipe", "experiment", "scale", "source", "net", "batch_size", "lr"):
        found = [result.get(key) for result in (plain if key == "experiment" else results)]
        different = sorted({str(value) for value in found})
        several = None if key in ("batch_size", "lr") else " and ".join(different)
        facts[key] = found[0] if len(different) == 1 else several
    facts["options"] = sorted({option for result in results for option in result.get("options", ())})
    if len({result.get("images_sha256", result.get("store_sha256")) for result in results}) > 1:
        print("note: the runs were trained on different stores; make sure that none saw the images that are measured")
    # members may have different protocols: what counts is the shortest of those that did not do all of theirs
    cut = [result["epochs"] for result in results if result["epochs"] != result.get("of_epochs")]
    epochs = min(cut) if cut else max(result["epochs"] for result in results)
    return facts | {"seed": results[0]["seed"], "epochs": epochs}


def ensemble_claim(facts: dict[str, Any]) -> str | None:
    """Return the claim that an ensemble with these facts tests, or None."""
    if (facts["ablation"], facts["net"]) != ("none", "alexnet") or "weights" in facts:  # the paper averages
        return None
    return {(5, 0): "five_cnns", (7, 2): "seven_cnns"}.get((facts["members"], facts.get("pretrained_members", 0)))


def gain(members: list[Tensor], ensemble: Tensor) -> dict[str, dict[str, float]]:
    """Return by how much averaging lowers each error: the members' mean minus the ensemble's, with a 95% interval.

    The interval is over the test images, for these nets. members: scores (N, 3) of each net, as from ``scores.score``.
    ensemble: the same of the mean. Errors are in points, the log-loss is in nats.
    """
    lower = torch.stack(members).double().mean(0) - ensemble.double()
    half_width = 1.96 * lower.std(0) / len(lower) ** 0.5
    found = {}
    for column, name in enumerate(MEASURED):
        unit = 100 if name.endswith("error") else 1
        value, half = unit * float(lower[:, column].mean()), unit * float(half_width[column])
        found[name] = {"value": round(value, 4), "low": round(value - half, 4), "high": round(value + half, 4)}
    return found


def weighted_mean(members: list[Tensor], weights: list[float] | None = None) -> Tensor:
    """Return the mean (N, classes) of the softmax outputs of several nets, each (N, classes)."""
    weights = weights or [1.0] * len(members)
    mean = torch.zeros_like(members[0])
    for softmax, weight in zip(members, weights, strict=True):
        mean.add_(softmax, alpha=weight / sum(weights))
    return mean


def fitted(members: list[Tensor], labels: Tensor) -> tuple[list[float], Tensor]:
    """Fit the weights on every second image; return them and the indices of the other images, for measuring.

    The 2012 script searched by coordinate descent over weights from 0 to 1 in steps of 0.05 for the lowest top-5 error
    on the validation images, and then measured on the same images.

    members: softmax outputs (N, classes). labels: (N,).
    """
    images = torch.arange(len(labels))
    fit, measured = images[::2], images[1::2]
    outputs, own = [softmax[fit] for softmax in members], labels[fit]
    grid = [round(STEP * i, 2) for i in range(round(1 / STEP) + 1)]
    weights = [1.0] * len(members)
    lowest = _top5(weights, outputs, own)
    improved = True
    while improved:
        improved = False
        for member in range(len(members)):
            for value in grid:
                tried = [*weights[:member], value, *weights[member + 1 :]]
                if any(tried) and (error := _top5(tried, outputs, own)) < lowest:
                    weights, lowest, improved = tried, error, True
    return weights, measured


def _top5(weights: list[float], members: list[Tensor], labels: Tensor) -> float:
    return float(top_k_misses(weighted_mean(members, weights), labels, 5).mean())
