"""Present the ablation study: a table, a forest plot's rows, and its reading in sentences."""

import csv
import io
import math
from typing import Any

from alexnet_repro.claims.estimates import SEEDS_NEEDED, Estimate
from alexnet_repro.claims.evidence import why_proxy
from alexnet_repro.claims.paper import read_claims
from alexnet_repro.claims.results import SHARED_KEYS
from alexnet_repro.claims.study import COLUMNS, TRAINING_LEVEL, Change, Study
from alexnet_repro.page.cost import TRAINING_IMAGES, hours
from alexnet_repro.page.intervals import bar, reach
from alexnet_repro.page.wording import PRECISIONS

NAMES = {  # what was done, in words
    "tanh": "tanh instead of ReLU, at the same learning rate",
    "no_lrn": "no response normalisation",
    "non_overlapping_pooling": "pooling windows that do not overlap",
    "one_gpu": "one tower with half the kernels",
    "no_communication": "two towers that meet only in the last layer",
    "no_dropout": "no dropout",
    "no_colour_noise": "no colour noise",
    "no_crops": "no crops and reflections",
    "no_conv3": "without conv3",
    "no_conv4": "without conv4",
    "no_conv5": "without conv5",
    "no_weight_decay": "no weight decay",
    "zero_biases": "all biases start at 0",
}
ON_THE_PAGE = ("ten_crop", "training", "overfitting", "updates")  # the columns of its table; the CSV has them all
SCALES = {"proxy": "a small net on small images", "full": "the full-size net"}


def presented(study: Study) -> dict[str, Any]:
    """Return what the templates show of a study."""
    far = reach(numbers_shown(study))
    bounds = (-far, far)
    return {
        "title": title(study),
        "baseline": baseline(study),
        "columns": [column.title for column in COLUMNS],
        "shown": [place for place, column in enumerate(COLUMNS) if column.name in ON_THE_PAGE],
        "lines": [_line(change, bounds) for change in study.changes],
        "sentences": sentences(study),
        "cost": cost(study),
        "proxy": is_proxy(study),
        "csv": as_csv(study),
    }


def is_proxy(study: Study) -> bool:
    """Return whether a study's numbers may not stand beside the paper's, by the rule of the verdicts."""
    baseline = read_claims()["table1_cnn" if study.shared["data"] == "ilsvrc2010" else "one_cnn"]
    return why_proxy(baseline, study.shared) is not None


def title(study: Study) -> str:
    """Return where the study was done."""
    facts = study.shared
    parts = [
        facts["data"],
        SCALES[facts["scale"]],
        f"recipe={facts['recipe']}",
        f"{facts['epochs']} epochs",
        PRECISIONS.get(facts["precision"], facts["precision"]),
    ]
    return ", ".join(str(part) for part in (*parts, facts["options"]) if part)  # fmt: skip


def heading(study: Study, first: Study) -> str:
    """Return the heading of a study, which says in what it differs from the first one."""
    if study is first:
        return "What each ingredient of the recipe is worth"
    others = [f"{key}={study.shared[key]}" for key in SHARED_KEYS if study.shared[key] != first.shared[key]]
    told = f"The same with {' '.join(others)}"
    for name, word in PRECISIONS.items():
        told = told.replace(f"with precision={name}", f"in {word}")
    return told


def baseline(study: Study) -> str:
    """Return the baseline's own errors."""
    own = study.baseline
    told = [f"top-1 error of {own['ten_crop'].value:.1f}% with ten crops and {own['centre'].value:.1f}% with one view"]
    if "log_loss" in own:
        told.append(f"a log-loss of {own['log_loss'].value:.3f} nats")
    if "training" in own:
        told.append(f"a training error of {own['training'].value:.1f}%")
    return f"{_joined(told)}, {_seeds(study.seeds)}"


def cost(study: Study) -> str:
    """Return the measured duration of the runs, and, as arithmetic, that of the same runs on ILSVRC-2012."""
    count, seconds = len(study.seconds), study.seconds
    told = (
        f"{count} runs of {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes took {sum(seconds) / 3600:.1f} hours "
        f"({', '.join(study.hardware) or 'unknown hardware'})."
    )
    images = count * study.of_epochs * TRAINING_IMAGES["ilsvrc2012"]
    return told + (
        f" With the full-size net on ILSVRC-2012, {study.of_epochs} epochs each, they would take {hours(images)}."
    )


def failures(study: Study) -> list[str]:
    """Return a sentence about each ablation with runs that failed to train."""
    return [
        f"With {_listed([c])}, the training loss of {c.stuck} of {len(c.seeds)} runs stayed above 95% of that of guessing: these "
        f"runs failed to train, so that their errors do not measure the effect in a trained net."
        for c in study.changes
        if c.stuck and len(c.seeds) >= SEEDS_NEEDED
    ]


def sentences(study: Study) -> list[str]:
    """Return the reading of a study: which ablations raise or lower the ten-crop error, and which do neither."""
    changes = [change for change in study.changes if change.is_tested]
    worse = [c for c in changes if c.distinct and c.estimates["ten_crop"].value > 0]
    better = [c for c in changes if c.distinct and c.estimates["ten_crop"].value < 0]
    rest = [c for c in changes if not c.distinct]
    number = f"{len(changes)} comparison{'s' * (len(changes) > 1)}"
    told = []
    if worse:
        told.append(f"Corrected for {number}, the ten-crop error is higher with {_listed(worse)}.")
    if better:
        told.append(f"Corrected for {number}, the ten-crop error is lower with {_listed(better)}.")
    if rest:
        ends = [ends for c in rest if (ends := _ends(c.estimates["ten_crop"]))]
        told.append(
            f"No effect was detected for {_joined([c.ablation for c in rest])}: the 95% intervals contain 0 and lie between "
            f"{min(low for low, _ in ends):+.1f} and {max(high for _, high in ends):+.1f} points."
        )
    told += failures(study)
    untested = [c for c in study.changes if not c.is_tested and not c.stuck]
    if few := [c.ablation for c in untested if len(c.seeds) < SEEDS_NEEDED]:
        told.append(f"Not tested: {_joined(few)}, with fewer than {SEEDS_NEEDED} seeds.")
    if undefined := [c.ablation for c in untested if len(c.seeds) >= SEEDS_NEEDED]:
        told.append(f"Not tested: {_joined(undefined)}, with a result that is not a number.")
    return told


def markdown(study: Study, columns: tuple[str, ...] = ()) -> str:
    """Return the study as a Markdown table with these of its columns, or with all."""
    shown = presented(study)
    places = [place for place, column in enumerate(COLUMNS) if column.name in columns or not columns]
    head = ["ablation", "the paper, on ImageNet", *(shown["columns"][p] for p in places), "p (Dunnett)", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for line in shown["lines"]:
        own = [line["cells"][place] for place in places]
        cells = [f"{cell['value']} ({cell['interval']})" if cell["interval"] else cell["value"] for cell in own]
        lines.append("| " + " | ".join([line["label"], line["paper"] or "-", *cells, line["p"] or "-", line["seeds"]]) + " |")  # fmt: skip
    return "\n".join(lines)


def numbers_shown(study: Study) -> list[tuple[float, ...]]:
    """Return the change of the ten-crop error and the ends of its interval, for each ablation."""
    changes = [change.estimates["ten_crop"] for change in study.changes]
    return [(found.value, *(_ends(found) or ())) for found in changes]


def forest_rows(study: Study) -> list[dict[str, Any]]:
    """Return the rows of the study's forest plot, without the paper's values if it is a proxy."""
    own = presented(study)
    return [
        {
            "label": f"{change.ablation} (n={len(change.seeds)})",
            "value": change.estimates["ten_crop"].value,
            "interval": _ends(change.estimates["ten_crop"]),
            "paper": None if own["proxy"] or not change.claim else change.claim.value.get("top1_error"),
        }
        for change in study.changes
    ]


def as_csv(study: Study) -> str:
    """Return the study's estimates as CSV: one row for each ablation and column."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["ablation", "measure", "kind", "estimate", "low", "high", "p_dunnett", "seeds"])
    for change in study.changes:
        for column in COLUMNS:
            if e := change.estimates.get(column.name):
                p = e.p if column.name == "ten_crop" else None
                row = [change.ablation, column.title, column.kind, e.value, e.low, e.high, p, " ".join(map(str, change.seeds))]  # fmt: skip
                writer.writerow(row)
    return out.getvalue()


def _line(change: Change, bounds: tuple[float, float]) -> dict[str, Any]:
    ten = change.estimates["ten_crop"]
    cells = []
    for column in COLUMNS:
        found = change.estimates.get(column.name)
        if found is None:
            cells.append({"value": "-", "interval": ""})
            continue
        ends = _ends(found)
        interval = f"{_number(column.kind, ends[0], column.score)} to {_number(column.kind, ends[1], column.score)}" if ends else ""  # fmt: skip
        interval = interval.replace(" times", "")  # which stands beside the value
        cells.append({"value": _number(column.kind, found.value, column.score), "interval": interval})
    return {
        "name": change.ablation,
        "label": f"{change.ablation}: {NAMES[change.ablation]}" if change.ablation in NAMES else change.ablation,
        "paper": _said(change),
        "cells": cells,
        "p": "" if ten.p is None else f"{ten.p:.3f}" if ten.p >= 0.001 else "< 0.001",
        "class": "bad" if change.distinct and ten.value > 0 else "good" if change.distinct else "none",
        "seeds": ", ".join(map(str, change.seeds)),
        "bar": bar(ten, bounds, 0.0),
    }


def _said(change: Change) -> str:
    claim = change.claim
    if claim is None:
        return ""
    if claim.kind == "difference" and claim.measure == "ten_crop":
        return f"{claim.value['top1_error']:+.1f}" if claim.value else f"over {claim.at_least:+.1f}"
    return claim.says.rstrip(".")


def _number(kind: str, value: float, score: int) -> str:
    if not math.isfinite(value):
        return "never" if math.isinf(value) else "not in every run" if kind == "ratio" else "not a number"
    if kind == "ratio" and not value:
        return "the baseline never"
    return f"{value:.2f} times" if kind == "ratio" else f"{value:+.3f}" if score == 2 else f"{value:+.1f}"


def _ends(found: Estimate) -> tuple[float, float] | None:
    return None if found.low is None or found.high is None else (found.low, found.high)


def _listed(changes: list[Change]) -> str:
    parts = []
    for change in changes:
        found = change.estimates["ten_crop"]
        ends = _ends(found)
        between = f", {ends[0]:+.1f} to {ends[1]:+.1f}" if ends else ""
        parts.append(f"{change.ablation} ({found.value:+.1f} points{between})")
    return _joined(parts)


def _joined(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


DIFFERENCES = (
    "Differences are ablation minus baseline, in points, with 95% intervals that hold for all ablations of the study together "
    "(Dunnett). The intervals reflect the variation between seeds, pooled over the ablations that trained, and, for the test "
    "error and log-loss, also the sampling of the test images. Overfitting is the error of one view minus "
    "the training error, both measured without dropout and random crops."
)
READING = (
    f"{DIFFERENCES} Updates are those until the running training error falls to {TRAINING_LEVEL:.0f}%, as a multiple of the "
    f"baseline's."
)
