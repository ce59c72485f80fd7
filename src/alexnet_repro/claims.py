"""What the paper claims (paper.yaml), what was measured (results), and the verdict that follows from both.

No verdict is written by hand. A claim is decided by the results that its ``run`` and ``against`` pick, gathered in groups
that are alike in everything else, with a 95% interval (Student's t over seeds) where there are several seeds.
"""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from scipy.stats import t as student

from alexnet_repro.cli import UserError
from alexnet_repro.net import AlexNet

Claim = dict[str, Any]
Result = dict[str, Any]

# What a group's results have in common, besides what a claim compares.
ALIKE = ("data", "split", "source", "net", "experiment", "recipe", "epochs", "batch_size", "lr", "options")
NEEDED = ("recipe", "ablation", "data", "net", "seed", "epochs", "centre")  # in a run's result
WORST_FIRST = ("other way", "within noise", "right way, other size", "reproduced")
PROXY = "proxy: "


@dataclass
class Finding:
    """What one group of results says of a claim: means over seeds and their interval, by measure."""

    verdict: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # where there are at least two seeds
    seeds: list[int] = field(default_factory=list)
    alike: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @property
    def is_proxy(self) -> bool:
        """Whether it was measured on something else than the paper's data."""
        return self.verdict.startswith(PROXY)


def read_claims() -> dict[str, Claim]:
    """paper.yaml: every claim by its name, in the paper's order."""
    claims: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "paper.yaml"))
    return claims


def read_results(*folders: Path) -> list[Result]:
    """All results below these folders, as result.json holds them, each with its "file", and with "retrieval" if report measured it.

    A run that is in several of them is taken once, from the first. Raises UserError for a damaged result.
    """
    results: dict[Any, Result] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            if path.name == "retrieval.json" or path.name.startswith(("evaluation-", "job-")):
                continue
            content = _read(path)
            if not isinstance(content, dict) or not ("centre" in content or "ratios" in content):
                continue
            missing = [key for key in NEEDED if key not in content] if "centre" in content else []
            history = content.get("history") or []
            if missing or any(not {"epoch", "train_error"} <= set(epoch) for epoch in history):
                raise UserError(f"{path} lacks {', '.join(missing) or 'errors in its history'}", "mend or remove it")
            if "experiment" not in content and (named := re.search(r"\+experiment=(\w+)", content.get("command", ""))):
                content["experiment"] = named[1]  # of results that are older than this field
            if (beside := path.parent / "retrieval.json").is_file():
                content["retrieval"] = _read(beside)
            key = tuple(str(content.get(k)) for k in (*ALIKE, "ablation", "seed", "commit", "seconds", "machine"))
            results.setdefault(key, {**content, "file": str(path)})
    return list(results.values())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", "mend or remove it") from None


def _epochs_to_25(result: Result) -> dict[str, float] | None:
    if not result.get("history"):
        return None
    reached = (epoch["epoch"] for epoch in result["history"] if epoch["train_error"] <= 25)
    return {"epochs": next(reached, math.inf)}


def _training_error(result: Result) -> dict[str, float] | None:
    return {"train_error": result["history"][-1]["train_error"]} if result.get("history") else None


def _view_gain(result: Result) -> dict[str, float] | None:
    if "ten_crop" not in result:
        return None
    return {key: result["centre"][key] - result["ten_crop"][key] for key in ("top1_error", "top5_error")}


def _specialisation(result: Result) -> dict[str, float] | None:
    content = result.get("colour_content", ())
    return {"share": abs(content[0] - content[1])} if len(content) == 2 else None


def _loading(result: Result) -> dict[str, float] | None:
    speeds = result.get("images_per_s", {})
    loaded, trained = speeds.get("loader, one core: ours"), speeds.get("step bf16: paper")
    return {"share": trained / loaded} if loaded and trained else None


def _retrieval_gain(better: str, worse: str) -> Callable[[Result], dict[str, float] | None]:
    def gain(result: Result) -> dict[str, float] | None:
        shares = result.get("retrieval", {}).get("same_class", {})
        return {"points": shares[better] - shares[worse]} if {better, worse} <= shares.keys() else None

    return gain


MEASURES: dict[str | None, Callable[[Result], dict[str, float] | None]] = {
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


def counts(measure: str) -> dict[str, float]:
    """A property of the net, counted on the net itself (with no memory for its weights)."""
    with torch.device("meta"):
        net, one_gpu = AlexNet(lrn=False), AlexNet(towers=1)  # normalisation has no parameters and no neurons
        neurons = {name: float(maps[0].numel()) for name, maps in net.activations(torch.empty(1, 3, 224, 224)).items()}
    neurons.pop("pool5")  # a pool's outputs are not counted as neurons in Section 3.5
    parameters = sum(p.numel() for p in net.parameters())
    shares = {
        name: 100 * sum(p.numel() for p in net.get_submodule(name).parameters()) / parameters
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5")
    }
    known: dict[str, dict[str, float]] = {
        "neurons": neurons,
        "neurons_in_all": {"all": sum(neurons.values())},
        "input_size": {"numbers": 224 * 224 * 3},
        "parameters": {"all": parameters},
        "parameters_of_one_gpu": {"share": sum(p.numel() for p in one_gpu.parameters()) / parameters},
        "share_of_each_convolution": shares,
        "crops": {"images": 2 * (256 - 224 + 1) ** 2},
    }
    return known[measure]


def findings(claim: Claim, results: Iterable[Result]) -> list[Finding]:
    """What the results say of a claim, one finding for each group of them; on the paper's own data first, then proxies."""
    if claim["kind"] == "count":
        values = counts(claim["measure"])
        return [Finding(_verdict(claim, values, {}, proxy=False), values)]
    if claim["kind"] == "quoted" or not ("run" in claim or claim.get("measure") == "loading"):
        return []
    measure = MEASURES[claim.get("measure")]
    sides = (claim.get("run", {}), claim.get("against"))
    free = {*(sides[0] | (sides[1] or {})), *(("lr", "epochs") if "fastest" in claim else ())} - {"net"}
    groups: dict[tuple[Any, ...], tuple[list[Result], list[Result]]] = defaultdict(lambda: ([], []))
    for result in results:
        if measure(result) is None:
            continue
        facts = result | {"options": " ".join(result.get("options", ()))}
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
        elif run:
            proxy = _is_proxy(claim, common)
            if not (proxy and claim["kind"] == "number"):  # an error on other data can't be set beside the paper's
                found.append(_summarise(claim, {r.get("seed", 0): r for r in run}, common, proxy, measure))
    return sorted(found, key=lambda f: (f.is_proxy, -(f.alike.get("epochs") or 0), -len(f.seeds)))


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
        for key, value in wanted.items()
    )


def _compare(claim: Claim, run: list[Result], against: list[Result], alike: dict[str, Any]) -> list[Finding]:
    """The finding of two sides, seed by seed; none if no seed has both."""
    measure = MEASURES[claim.get("measure")]
    sides = [_fastest(side, measure) if "fastest" in claim else {r["seed"]: r for r in side} for side in (run, against)]
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        return []
    ratio = claim["kind"] == "ratio"

    def change(pair: Result) -> dict[str, float]:
        one, other = (measure(result) or {} for result in pair["pair"])
        return {key: one[key] / other[key] if ratio else one[key] - other[key] for key in one}

    pairs = {seed: {"pair": (sides[0][seed], sides[1][seed])} for seed in seeds}
    finding = _summarise(claim, pairs, alike, _is_proxy(claim, alike), change)
    finding.results = [result for pair in pairs.values() for result in pair["pair"]]
    return [finding]


def _fastest(side: list[Result], measure: Callable[[Result], dict[str, float] | None]) -> dict[int, Result]:
    """By seed, the results with the learning rate that was fastest for the first seed."""
    first = min((r["seed"] for r in side), default=None)
    tried = [((measure(r) or {})["epochs"], r["lr"]) for r in side if r["seed"] == first]
    best = min(tried)[1] if tried and min(tried)[0] < math.inf else None
    return {r["seed"]: r for r in side if r["lr"] == best}


def _summarise(
    claim: Claim,
    by_seed: dict[int, Result],
    alike: dict[str, Any],
    proxy: bool,
    measure: Callable[[Result], dict[str, float] | None],
) -> Finding:
    """Mean over seeds and its 95% interval; of ratios the geometric mean."""
    measured = [measure(result) or {} for result in by_seed.values()]
    values, intervals = {}, {}
    there, back = (math.log, math.exp) if claim["kind"] == "ratio" else (float, float)
    for key in measured[0]:
        numbers = [there(of[key]) for of in measured]
        mean = statistics.fmean(numbers)
        values[key] = back(mean)
        if len(numbers) > 1 and math.isfinite(mean):
            half = float(student.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / math.sqrt(len(numbers))
            intervals[key] = (back(mean - half), back(mean + half))
    return Finding(
        _verdict(claim, values, intervals, proxy), values, intervals, sorted(by_seed), alike, list(by_seed.values())
    )


def _verdict(claim: Claim, values: dict[str, float], intervals: dict[str, tuple[float, float]], proxy: bool) -> str:
    """By the claim's rule. Where a claim has several measures the first one decides, the top-1 error; of counts, all."""
    paper: dict[str, float] = claim.get("value") or {}
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
    if first not in intervals and claim.get("measure") != "loading":  # a speed is a median of repeats already
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


def verdict(claim: Claim, found: list[Finding]) -> str:
    """A claim's verdict: that of the largest group of results on the paper's own data."""
    if claim["kind"] == "quoted":
        return "quoted"
    if claim["kind"] == "picture" and "measure" not in claim:
        return "to be looked at"
    own = [finding for finding in found if not finding.is_proxy]
    variants = claim.get("run", {}).get("ablation")
    if isinstance(variants, list) and own:  # it is claimed of each of them
        words = {finding.alike["ablation"]: finding.verdict for finding in reversed(own)}
        return min(words.values(), key=WORST_FIRST.index) if set(words) == set(variants) else "not run"
    return own[0].verdict if own else "not run"


def expected_errors(claims: dict[str, Claim], name: str) -> dict[str, float] | None:
    """The errors that the paper has for the experiment of a claim; of a difference, those of the whole net and it together.

    None where the paper doesn't say how it was measured.
    """
    claim = claims[name]
    if claim["kind"] not in ("number", "difference") or not claim.get("value") or claim["protocol"] != "ten crops":
        return None
    if claim["kind"] == "number":
        return claim["value"]
    base = claims["table1_cnn" if claim["data"] == "ilsvrc2010" else "one_cnn"]["value"]
    return {key: round(base[key] + change, 4) for key, change in claim["value"].items()}
