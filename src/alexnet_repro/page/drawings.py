"""Draw the figures that need only results, with their captions."""

from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from alexnet_repro.claims.finding import Finding
from alexnet_repro.claims.paper import read_claims
from alexnet_repro.claims.results import Result, kernels_of, label
from alexnet_repro.claims.study import Study
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.page import figures, plots
from alexnet_repro.page.content import source
from alexnet_repro.page.study import forest_rows, heading, title


def drawings(page: dict[str, Any], runs: list[Path]) -> dict[str, tuple[Figure, str]]:
    """Return the figures made from results alone, with captions.

    page: as returned by ``content``. The curves show ``runs``, or all results if ``runs`` is empty.
    """
    results: list[Result] = page["results"]
    found: dict[str, list[Finding]] = page["found"]
    compared: list[Study] = [line["study"] for line in page["studies"]]
    drawn: dict[str, tuple[Figure, str]] = {}
    for number, study in enumerate(compared):
        drawn[f"study-{number}" if number else "study"] = (
            plots.forest(forest_rows(study), "change in top-1 error with ten crops, points"),
            f"{heading(study, compared[0])}: error without it minus error with it ({title(study)}; n: seeds).",
        )
    if changes := deltas(found):
        drawn["ablations"] = (
            plots.forest(changes, "change in top-1 error, points"),
            "Effect of each change on the top-1 error. The paper's values hold for its own data and full protocols only; "
            "they cannot be compared with results on other data or protocols.",
        )
    figure_1_experiments = read_claims()["figure_1"].run[0]["experiment"]  # drawn in their own figure
    chosen = [r for r in results if r.get("history")]
    chosen = [
        r
        for r in chosen
        if (Path(r["file"]).parent in runs if runs else r.get("experiment") not in figure_1_experiments)
    ]
    if chosen:
        shown, left_out = chosen[: len(plots.COLOURS)], len(chosen[len(plots.COLOURS) :])
        note = f" Runs not drawn: {left_out}." if left_out else ""
        drawn["curves"] = (
            plots.training_curves([(name, r["history"]) for name, r in zip(distinct(shown), shown, strict=True)]),
            "Errors by epoch. Solid: running training error. Dashed: validation or test error of one view." + note,
        )
    races = [r for finding in found["figure_1"] for r in finding.results if r["data"] == "cifar10"]
    if races:
        drawn["figure-1"] = (
            figures.figure_1(cast(list[dict[str, Any]], races)),
            "Figure 1: training error on CIFAR-10 with ReLUs (solid) and tanh (dashed), one line per seed. "
            f"The horizontal line marks 25%. Trained on: {races[0].get('source') or 'CIFAR-10'}. Epochs to 25% (updates): {to_25(races)}.",
        )
    drawn |= first_layer(results)
    if shares := colours(compared, [line["study"] for line in page["baselines"]]):
        drawn["colours"] = (
            plots.colour_shares(shares),
            "Figure 3, in every run of the study and of the full-size net: the share of colour in the energy of the first layer's "
            "kernels, a line for each seed. The paper says that one tower becomes largely colour-agnostic and the other "
            "colour-specific. Empty circles: nets with one tower.",
        )
    drawn["figure-2"] = (
        figures.figure_2(AlexNet()),
        "Figure 2, drawn from the net itself: two towers, the size of each layer's output, and the communication between "
        "two devices.",
    )
    return drawn


def distinct(results: list[Result]) -> list[str]:
    """Return the label of each result, with its file if another one has the same label."""
    labels = [label(r) for r in results]
    return [
        f"{own}, {source(r)['file']}" if labels.count(own) > 1 else own for own, r in zip(labels, results, strict=True)
    ]


def first_layer(results: list[Result]) -> dict[str, tuple[Figure, str]]:
    """Return Figure 3 of the full-size net with the most epochs whose kernels are saved beside its result."""
    full = [r for r in results if r.get("net") == "alexnet" and r.get("scale") == "full" and r["ablation"] == "none"]
    for result in sorted(full, key=lambda r: (-r["epochs"], r["seed"])):
        if result.get("colour_content") and (kernels := kernels_of(result)) is not None:
            whose = (
                f"the full-size net on {result['data']} (recipe={result['recipe']}, {result['epochs']} epochs, "
                f"{result['precision']}, seed {result['seed']})"
            )
            return {"figure-3": kernels_drawn(torch.from_numpy(kernels), result["colour_content"], whose)}
    return {}


def kernels_drawn(kernels: Tensor, shares: list[float], whose: str) -> tuple[Figure, str]:
    """Return Figure 3 of these kernels (maps, 3, h, w), with a caption that says whose they are.

    shares: of colour, of each tower.
    """
    told = ", ".join(f"{100 * share:.0f}%" for share in shares)
    caption = f"Figure 3: the first-layer kernels of {whose}. Share of colour in the kernels' energy, by tower: {told} (random weights: 67%)."
    return figures.figure_3(kernels, len(shares)), caption


def colours(compared: list[Study], alone: list[Study]) -> dict[str, list[list[float]]]:
    """Return the shares of colour of the towers: of the baselines that stand alone, then of the largest study's runs.

    A study's baseline comes before its ablations.
    """
    found = {title(study): study.colours["none"] for study in alone}
    for study in compared[:1]:
        found |= {"baseline": study.colours["none"], **study.colours}
        del found["none"]
    return {name: shares for name, shares in found.items() if shares}


def to_25(races: list[Result]) -> str:
    """Return the epochs and updates to 25% training error of each run, by net and activation, as text."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for race in sorted(races, key=lambda race: (race["net"], race["activation"], race["seed"])):
        reached = next((epoch for epoch in race["history"] if epoch["train_error"] <= 25), None)
        cost = (str(reached["epoch"]), str(reached.get("steps", "?"))) if reached else ("never", "never")
        lines.setdefault(f"{race['net']}, {race['activation']}", []).append(cost)
    columns = {name: [", ".join(column) for column in zip(*costs, strict=True)] for name, costs in lines.items()}
    return "; ".join(f"{name} {epochs} ({updates})" for name, (epochs, updates) in columns.items())


def deltas(found: dict[str, list[Finding]]) -> list[dict[str, Any]]:
    """Return the rows of the forest plot: the measured differences in ten-crop top-1 error."""
    lines = []
    for name, findings in found.items():
        for finding in findings:
            claim = finding.claim
            if claim.kind != "difference" or claim.measure != "ten_crop":
                continue
            if finding.shared.get("experiment") == "ablations":  # in the study's own figure
                continue
            top1, shared = finding.estimates["top1_error"], finding.shared
            parts = (shared.get("ablation") or name, shared["data"], shared["recipe"])
            lines.append(
                {
                    "label": ", ".join(str(part) for part in parts) + f" (n={len(finding.seeds)})",
                    "value": top1.value,
                    "interval": None if top1.low is None else (top1.low, top1.high),
                    "paper": None if finding.proxy else claim.value.get("top1_error"),
                }
            )
    return lines
