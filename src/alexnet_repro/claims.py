"""The verdict that follows from what the paper claims (paper.py) and from what was measured (results.py).

No verdict is written by hand. A claim is decided by the results that its ``run`` and ``against`` pick, gathered in groups
that are alike in everything else, with a 95% interval (Student's t over seeds) where there are several seeds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from scipy.stats import t as student

from alexnet_repro.paper import Claim
from alexnet_repro.results import ALIKE, MEASURES, Measured, Result, counts

WORST_FIRST = ("other way", "other value", "within noise", "right way, other size", "reproduced")
PROXY = "proxy: "


@dataclass
class Finding:
    """What one group of results says of a claim: means over seeds and their interval, by measure."""

    verdict: str
    values: Measured
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # where there are at least two seeds
    seeds: list[int] = field(default_factory=list)
    alike: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @property
    def is_proxy(self) -> bool:
        """Whether it was measured on something else than the paper's data."""
        return self.verdict.startswith(PROXY)


def findings(claim: Claim, results: Iterable[Result]) -> list[Finding]:
    """What the results say of a claim, one finding for each group of them; on the paper's own data first, then proxies."""
    if claim["kind"] == "count":
        values = counts()[claim["measure"]]
        return [Finding(_verdict(claim, values, {}, proxy=False), values)]
    if claim["kind"] == "quoted" or not ("run" in claim or claim.get("measure") == "loading"):
        return []
    measure = MEASURES[claim.get("measure")]
    sides = (claim.get("run", {}), claim.get("against"))
    free = {*(sides[0] | (sides[1] or {})), *(("lr", "epochs") if "fastest" in claim else ())} - {"net", "experiment"}
    groups: dict[tuple[Any, ...], tuple[list[Result], list[Result]]] = defaultdict(lambda: ([], []))
    for result in results:
        if measure(result) is None:
            continue
        experiment = (result.get("experiment") or "").removesuffix("_rates")
        facts = result | {"options": " ".join(result.get("options", ())), "experiment": experiment}
        alike = tuple((key, facts.get(key)) for key in ALIKE if key not in free)
        for side, wanted in enumerate(sides):
            if wanted is not None and _is(result, wanted):
                which = result["ablation"] if isinstance(wanted.get("ablation"), list) else None
                groups[(which, *alike)][side].append(result)
    found = []
    for (which, *of_group), (run, against) in groups.items():
        common = dict(of_group) | ({"ablation": which} if which else {})
        if "against" in claim:
            against = against or groups.get((None, *of_group), ([], []))[1]
            found += _compare(claim, run, against, common)
        elif run and not (claim["kind"] == "number" and _is_proxy(claim, common)):
            # a number on other data can't be set beside the paper's
            by_seed = {tuple(r["seeds"]) if "seeds" in r else r.get("seed", 0): measure(r) or {} for r in run}
            found.append(_summarise(claim, by_seed, common, run))
    return sorted(found, key=lambda f: (f.is_proxy, -len(f.seeds), -(f.alike.get("epochs") or 0)))


def _is_proxy(claim: Claim, common: dict[str, Any]) -> bool:
    """Whether such results are of something else than the claim: other data, a shorter protocol, options of one's own."""
    data, split = common.get("data"), common.get("split")
    same_data = data in ("ilsvrc2010", "ilsvrc2012") if claim["data"] == "imagenet" else data == claim["data"]
    same_split = claim["split"] not in ("val", "test") or split in (None, claim["split"])
    whole = (common.get("epochs") or math.inf) >= 0.9 * claim.get("epochs", 0)
    return not (same_data and same_split and whole) or bool(common.get("options"))


def _is(result: Result, wanted: dict[str, Any]) -> bool:
    return all(
        result.get(key) in value if isinstance(value, list) else result.get(key) == value
        for key, value in ({"members": None} | wanted).items()  # a single net, unless an ensemble is wanted
    )


def _compare(claim: Claim, run: list[Result], against: list[Result], alike: dict[str, Any]) -> list[Finding]:
    """The finding of two sides, seed by seed; none if no seed has both."""
    measure = MEASURES[claim.get("measure")]
    sides = [_fastest(side) if "fastest" in claim else {r["seed"]: r for r in side} for side in (run, against)]
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        return []
    ratio = claim["kind"] == "ratio"
    changes = {}
    for seed in seeds:
        one, other = (measure(side[seed]) or {} for side in sides)
        changes[seed] = {key: one[key] / other[key] if ratio else one[key] - other[key] for key in one}
    return [_summarise(claim, changes, alike, [side[seed] for seed in seeds for side in sides])]


def _fastest(side: list[Result]) -> dict[int, Result]:
    """By seed, the results with the learning rate that was fastest for the first seed: of as many epochs, the lower error."""
    measure = MEASURES["epochs_to_25"]
    first = min((r["seed"] for r in side), default=None)
    tried = [
        ((measure(r) or {})["epochs"], r["history"][-1]["train_error"], r["lr"]) for r in side if r["seed"] == first
    ]
    best = min(tried)[2] if tried else None
    return {r["seed"]: r for r in side if r["lr"] == best}


def _summarise(claim: Claim, by_seed: dict[Any, Measured], alike: dict[str, Any], results: list[Result]) -> Finding:
    """Mean over seeds and its 95% interval; of ratios the geometric mean, 0 or infinite where one side never got there."""
    measured = list(by_seed.values())
    values, intervals = {}, {}
    there, back = (_log, math.exp) if claim["kind"] == "ratio" else (float, float)
    for key in measured[0]:
        numbers = [there(of[key]) for of in measured]
        mean = statistics.fmean(numbers)
        values[key] = back(mean)
        if len(numbers) > 1 and math.isfinite(mean):
            half = float(student.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / math.sqrt(len(numbers))
            intervals[key] = (back(mean - half), back(mean + half))
    word = _verdict(claim, values, intervals, _is_proxy(claim, alike))
    return Finding(word, values, intervals, sorted(by_seed), alike, results)


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio else -math.inf


def _verdict(claim: Claim, values: Measured, intervals: dict[str, tuple[float, float]], proxy: bool) -> str:
    """By the claim's rule. Where a claim has several measures the first one decides, the top-1 error; of counts, all."""
    paper: Measured = claim.get("value") or {}
    if claim["kind"] == "count":
        within, at_most = claim.get("within", 0), claim.get("direction") == "less"
        right = (
            values[key] <= value if at_most else abs(values[key] - value) <= within * value
            for key, value in paper.items()
        )
        return "reproduced" if all(right) else "other value"
    first = next(iter(paper or values))
    value = values[first]
    if claim["kind"] == "number":
        return "reproduced" if abs(value - paper[first]) <= claim["within"] else "other value"
    neutral = 1.0 if claim["kind"] == "ratio" else claim.get("threshold", 0.0)
    more = claim["direction"] == "more" if "direction" in claim else paper[first] > neutral
    if claim["kind"] == "ratio" and value in (0, math.inf):  # one side never got there
        outcome = "other way" if (value > neutral) != more else "within noise"
    elif first not in intervals and claim.get("measure") != "loading":  # a speed is a median of repeats already
        outcome = "within noise"
    else:
        low, high = intervals.get(first, (value, value))
        outcome = "within noise" if low <= neutral <= high else "right" if (value > neutral) == more else "other way"
    if proxy:
        return PROXY + {"right": "agrees", "other way": "disagrees"}.get(outcome, outcome)
    if outcome == "right":
        outcome = "reproduced" if _size_is_right(claim, value) else "right way, other size"
    return outcome


def _size_is_right(claim: Claim, value: float) -> bool:
    if not claim.get("value"):
        return True
    paper = next(iter(claim["value"].values()))
    if claim["kind"] == "ratio":
        return max(value / paper, paper / value) <= claim["within"]
    if claim.get("direction") == "more":
        return value >= paper - claim["within"]
    return abs(value - paper) <= claim["within"]


def deciding(claim: Claim, found: list[Finding]) -> Finding | None:
    """The finding on the paper's own data that decides a claim; None if there is none.

    Of each net, each recipe and each ablation that it is claimed of, the largest group of results counts; of these the worst
    decides, but groups of one seed only where no group has more.
    """
    own = [finding for finding in found if not finding.is_proxy]
    variants = claim.get("run", {}).get("ablation")
    if isinstance(variants, list) and {finding.alike["ablation"] for finding in own} != set(variants):
        return None  # it is claimed of each of them
    sure = {finding.alike.get("ablation") for finding in own if len(finding.seeds) > 1}
    own = [finding for finding in own if len(finding.seeds) > 1 or finding.alike.get("ablation") not in sure]
    alike = ("net", "recipe", "ablation")
    largest = {tuple(finding.alike.get(key) for key in alike): finding for finding in reversed(own)}
    return min(largest.values(), key=lambda finding: WORST_FIRST.index(finding.verdict), default=None)


def verdict(claim: Claim, found: list[Finding]) -> str:
    """A claim's verdict: that of the finding that decides it."""
    if claim["kind"] == "quoted":
        return "quoted"
    if claim["kind"] == "picture" and "measure" not in claim:
        return "to be looked at"
    finding = deciding(claim, found)
    return finding.verdict if finding else "not run"
