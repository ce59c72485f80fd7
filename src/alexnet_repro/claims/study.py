"""The ablation study (+experiment=ablations): what changes if one ingredient of the recipe is removed or replaced.

A study is one model for each measure, with an effect of each ablation and of each seed, and one variance. Each ablation is
compared with the baseline by Dunnett's test. The 95% intervals and the p values of differences hold for all ablations together;
where the scores of the test images are saved, they include the sampling error of these images. Ablations whose net did not train
are described, and not tested. docs/results.md names the rules that changed after the first run of the study.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from alexnet_repro.claims.estimates import (
    LEVEL,
    SEEDS_NEEDED,
    Estimate,
    compared,
    dunnett_critical,
    dunnett_p,
    estimate,
    image_variance,
    pooled,
)
from alexnet_repro.claims.evidence import by_seed, why_refused
from alexnet_repro.claims.measures import MEASURES, crossing
from alexnet_repro.claims.paper import Claim, read_claims
from alexnet_repro.claims.results import SHARED_KEYS, Result, differences_by_image, shared_key
from alexnet_repro.configs import CONF

EXPERIMENT = "ablations"
PAPER_EPOCHS = 90  # Section 5: "roughly 90 cycles through the training set"
TRAINING_LEVEL = 50.0  # running training error, in percent, up to which updates are counted


@dataclass(frozen=True, kw_only=True)
class Column:
    """A measure of the study: the column of its error in the scores of each image, if it is a mean over images."""

    name: str
    title: str
    kind: str  # difference or ratio
    of: Callable[[Result], float | None]
    view: str | None = None
    score: int = 0


def _error(view: str, key: str) -> Callable[[Result], float | None]:
    return lambda result: cast(dict[str, Any], result).get(view, {}).get(key)


def _measure(name: str) -> Callable[[Result], float | None]:
    return lambda result: next(iter((MEASURES[name](result) or {}).values()), None)


def _updates_to_level(result: Result) -> float | None:
    history = result.get("history") or []
    return crossing(history, "steps", "train_error", TRAINING_LEVEL) if history else None


COLUMNS = (
    Column(name="ten_crop", title="top-1 error, ten crops", kind="difference", of=_error("ten_crop", "top1_error"), view="ten_crop"),
    Column(name="centre", title="top-1 error, one view", kind="difference", of=_error("centre", "top1_error"), view="centre"),
    Column(name="log_loss", title="log-loss, ten crops, nats", kind="difference", of=_error("ten_crop", "log_loss"), view="ten_crop", score=2),
    Column(name="training", title="training error", kind="difference", of=_measure("training_error")),
    Column(name="overfitting", title="overfitting", kind="difference", of=_measure("overfitting")),
    Column(name="updates", title=f"updates to {TRAINING_LEVEL:.0f}% training error", kind="ratio", of=_updates_to_level),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Change:
    """The effect of an ablation: its estimates by column, ablation minus baseline, or their ratio."""

    ablation: str
    seeds: list[int]
    estimates: dict[str, Estimate]
    claim: Claim | None  # what the paper says of this ablation
    stuck: int = 0  # number of runs whose loss never left the plateau of guessing

    @property
    def is_trained(self) -> bool:
        """Whether every run left the plateau of guessing and has finite errors, of enough seeds to be tested."""
        return not self.stuck and len(self.seeds) >= SEEDS_NEEDED and math.isfinite(self.estimates["ten_crop"].value)

    @property
    def distinct(self) -> bool:
        """Whether the ten-crop error, of enough seeds, differs from the baseline's by Dunnett's test."""
        return self.is_tested and (self.estimates["ten_crop"].p or 0.0) < LEVEL

    @property
    def is_tested(self) -> bool:
        """Whether the ten-crop error has a p value, which needs enough seeds and numbers that are not NaN."""
        return self.estimates["ten_crop"].p is not None


@dataclass(frozen=True, kw_only=True)
class Study:
    """The changes of all ablations in one group of comparable results."""

    shared: dict[str, Any]  # recipe, data, scale, epochs, precision ...
    baseline: dict[str, Estimate]  # the baseline's own errors, by column
    seeds: list[int]  # of the baseline
    changes: list[Change]
    seconds: list[float]  # duration of each run
    of_epochs: int  # of the whole schedule, of which the runs may do a part
    hardware: list[str]
    colours: dict[str, list[list[float]]]  # shares of colour in conv1's kernels, by ablation: of each seed and tower


def studies(results: Iterable[Result]) -> list[Study]:
    """Return the studies that compare ablations with a baseline, those with the most runs first."""
    found = [_study(shared, runs) for shared, runs in _groups(results) if _ablations(runs)]
    return sorted(found, key=lambda study: -sum(len(c.seeds) for c in study.changes))


def baselines(results: Iterable[Result]) -> list[Study]:
    """Return the studies that have only a baseline so far: the recipe's own net."""
    return [_study(shared, runs) for shared, runs in _groups(results) if "none" in runs and not _ablations(runs)]


Runs = dict[str, dict[int, Result]]  # of a study: results by ablation and seed


def _groups(results: Iterable[Result]) -> Iterator[tuple[dict[str, Any], Runs]]:
    """Yield what the runs of each study share, and the runs."""
    groups: dict[tuple[Any, ...], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if (
            result.get("experiment") == EXPERIMENT
            and "members" not in result
            and {"ten_crop", "seconds"} <= set(result)
            and why_refused(result) is None
        ):
            groups[shared_key(result)][result["ablation"]].append(result)
    for key, sides in groups.items():
        yield dict(zip(SHARED_KEYS, key, strict=True)), {name: by_seed(side) for name, side in sides.items()}


def _ablations(runs: Runs) -> list[str]:
    """Return the ablations that have a seed in common with the baseline."""
    return [name for name, side in runs.items() if name != "none" and set(side) & set(runs.get("none", {}))]


def _study(shared: dict[str, Any], runs: Runs) -> Study:
    baseline = runs["none"]
    every = [run for side in runs.values() for run in side.values()]
    changes = [_change(name, runs[name], baseline) for name in _ablations(runs)]
    for column in (column for column in COLUMNS if column.kind == "difference"):
        _compare(column, changes, runs)
    return Study(
        shared=shared,
        baseline=_own_numbers(list(baseline.values())),
        seeds=sorted(baseline),
        changes=sorted(changes, key=lambda change: -_finite(change.estimates["ten_crop"].value)),
        seconds=[run["seconds"] for run in every],
        of_epochs=max(run.get("of_epochs") or PAPER_EPOCHS for run in every),
        hardware=sorted({run["hardware"] for run in every if "hardware" in run}),
        colours={
            name: [run["colour_content"] for run in side.values() if run.get("colour_content")]
            for name, side in runs.items()
        },
    )


def _compare(column: Column, changes: list[Change], runs: Runs) -> None:
    """Give the changes of a column their joint intervals and p values, by Dunnett's test."""
    tested = [change for change in changes if change.is_trained and column.name in change.estimates]
    for change in changes:
        if (own := change.estimates.get(column.name)) and not change.is_trained:
            change.estimates[column.name] = replace(own, p=None)
    seeds = sorted(set.intersection(*(set(change.seeds) for change in tested))) if tested else []
    tested = [change for change in tested if change.seeds == seeds]  # others keep their own estimates
    if len(seeds) < SEEDS_NEEDED or not tested:
        return
    sides = [runs["none"], *(runs[change.ablation] for change in tested)]
    table = np.array([[column.of(side[seed]) for seed in seeds] for side in sides], np.float64)
    error, freedom = pooled(table)
    critical = dunnett_critical(len(tested), freedom)
    for change in tested:
        images = _images(column, seeds, runs[change.ablation], runs["none"])
        own_error = math.sqrt(error**2 + (0.0 if images is None else image_variance(images)))
        value = change.estimates[column.name].value
        p = dunnett_p(value / own_error, len(tested), freedom) if own_error else float(value == 0)
        half = critical * own_error
        change.estimates[column.name] = Estimate(value=value, low=value - half, high=value + half, p=p)


def _own_numbers(runs: list[Result]) -> dict[str, Estimate]:
    measured = {column.name: [n for n in map(column.of, runs) if n is not None] for column in COLUMNS}
    return {name: estimate("number", numbers, None) for name, numbers in measured.items() if len(numbers) == len(runs)}


def _change(ablation: str, side: dict[int, Result], baseline: dict[int, Result]) -> Change:
    seeds = sorted(set(side) & set(baseline))
    estimates = {}
    for column in COLUMNS:
        pairs = [(column.of(side[seed]), column.of(baseline[seed])) for seed in seeds]
        if all(one is not None and other is not None for one, other in pairs):
            numbers = [compared(column.kind, one, other) for one, other in pairs]  # type: ignore[arg-type]
            found = estimate(column.kind, numbers, _images(column, seeds, side, baseline))
            estimates[column.name] = found if len(seeds) >= SEEDS_NEEDED else replace(found, p=None)
    stuck = sum(side[seed].get("left_plateau", 0) is None for seed in seeds)
    return Change(ablation=ablation, seeds=seeds, estimates=estimates, claim=_claim_of(ablation), stuck=stuck)


def _images(
    column: Column, seeds: list[int], side: dict[int, Result], baseline: dict[int, Result]
) -> NDArray[np.float64] | None:
    """Return the difference of each test image, (seeds, images), or None if the scores are not saved."""
    if column.view is None or len(seeds) < 2:
        return None
    differences = differences_by_image([(side[seed], baseline[seed]) for seed in seeds], column.view)
    if differences is None:
        return None
    return (1 if column.score == 2 else 100) * differences[:, :, column.score]


def _claim_of(ablation: str) -> Claim | None:
    """Return the claim that conf/ablation names for this ablation."""
    file = Path(CONF) / "ablation" / f"{ablation}.yaml"
    name = OmegaConf.load(file).ablation.get(ablation) if file.is_file() else None
    return read_claims().get(name) if name else None


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.copysign(1e9, value)
