"""Studies that were declared before their first run: results/studies/NAME.yaml, and what has been run of them.

A declaration fixes the arms, the seeds, the outcomes, the test, the number of looks and what makes the study void. Nothing is
compared before all of its runs are finished.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from alexnet_repro.claims.estimates import Estimate, dunnett_critical, dunnett_p, pooled
from alexnet_repro.claims.evidence import by_seed, why_refused
from alexnet_repro.claims.results import Result
from alexnet_repro.errors import UserError
from alexnet_repro.files import plain_yaml

OUTCOMES = {
    "gap": lambda result: result["centre"]["top1_error"] - result["train_sample"]["top1_error"],
    "one view": lambda result: result["centre"]["top1_error"],
    "ten crops": lambda result: result["ten_crop"]["top1_error"],
}
TITLES = {
    "gap": "error of one view minus training error, both without augmentation and dropout, points",
    "one view": "top-1 error of one view, points",
    "ten crops": "top-1 error of ten crops, points",
}


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A declaration. fixed: fields that its results have. void_below: the least mean of the first outcome in the baseline."""

    name: str
    question: str
    declared: str
    command: str
    fixed: dict[str, Any]
    arms: list[str]
    baseline: str
    seeds: list[int]
    outcomes: list[str]
    requires: str = ""
    seen_before: list[str] = field(default_factory=list)
    looks: int = 1
    stop: str = ""
    void_below: float | None = None

    def __post_init__(self) -> None:
        if self.baseline not in self.arms or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("its baseline is not one of its arms, or a seed is named twice")
        if unknown := set(self.outcomes) - set(OUTCOMES):
            raise ValueError(f"there is no outcome {', '.join(sorted(unknown))}")


def read_declared(folder: Path) -> list[Declared]:
    """Read the declarations of a folder of results. Raise UserError for one that can't be read."""
    found = []
    for path in sorted((folder / "studies").glob("*.yaml")):
        try:
            found.append(Declared(**plain_yaml(path)))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not the declaration of a study: {error}", "repair or remove it") from None
    return found


def runs_of(study: Declared, results: Iterable[Result]) -> dict[str, dict[int, Result]]:
    """Return the finished runs of a study, by arm and seed."""
    facts: list[Any] = [result for result in results if why_refused(result) is None]
    own = [r for r in facts if all(r.get(key) == value for key, value in study.fixed.items()) and not r.get("options")]
    sides = {arm: by_seed([r for r in own if r.get("ablation") == arm]) for arm in study.arms}
    return {arm: {seed: side[seed] for seed in study.seeds if seed in side} for arm, side in sides.items()}


def status(study: Declared, runs: dict[str, dict[int, Result]]) -> str:
    """Return how far a study is, in a sentence. It is judged when it is complete."""
    done, wanted = sum(map(len, runs.values())), len(study.arms) * len(study.seeds)
    if done < wanted:
        return f"{done} of {wanted} runs are finished; it is judged when all are"
    if (least := study.void_below) is not None:
        mean = float(np.mean([OUTCOMES[study.outcomes[0]](run) for run in runs[study.baseline].values()]))
        if mean < least:
            return f"void: {study.outcomes[0]} of {study.baseline} is {mean:.1f} on average, below {least:g}"
    return "complete"


def effects(study: Declared, runs: dict[str, dict[int, Result]], outcome: str) -> dict[str, Estimate]:
    """Return the effect of each arm on an outcome of a complete study, by Dunnett's test, with joint 95% intervals.

    Arms with a run that stayed on its starting plateau, or with an error that is not a number, are left out.
    """
    table = {arm: [OUTCOMES[outcome](side[seed]) for seed in study.seeds] for arm, side in runs.items()}
    trained = {
        arm: numbers
        for arm, numbers in table.items()
        if all(map(math.isfinite, numbers)) and not any(r.get("left_plateau", 0) is None for r in runs[arm].values())
    }
    others = [arm for arm in study.arms if arm in trained and arm != study.baseline]
    if study.baseline not in trained or not others:
        return {}
    rows = np.array([trained[arm] for arm in (study.baseline, *others)])
    error, freedom = pooled(rows)
    half = dunnett_critical(len(others), freedom) * error
    means = rows.mean(1) - rows[0].mean()
    found = {}
    for arm, mean in zip(others, map(float, means[1:]), strict=True):
        p = dunnett_p(mean / error, len(others), freedom) if error else float(mean == 0)
        found[arm] = Estimate(value=mean, low=mean - half, high=mean + half, p=p)
    return found
