"""Select the results that are evidence about a claim, and say what makes them a proxy of its experiment."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from alexnet_repro.claims.measures import MEASURES
from alexnet_repro.claims.paper import Claim
from alexnet_repro.claims.results import SHARED_KEYS, Result, options_of, scores_of
from alexnet_repro.claims.scores import MEASURED, VIEW_NAMES, VIEWS
from alexnet_repro.configs import CONF

SCORES_AGREE = 0.02  # points by which saved scores and stated errors may differ: misses are saved in float16
SUFFICIENT = 0.9  # share of a protocol's epochs
IMAGES = {  # of the releases, by data and split
    ("ilsvrc2012", "val"): 50_000,
    ("ilsvrc2010", "val"): 50_000,
    ("ilsvrc2010", "test"): 150_000,
}
EXPERIMENTS = {file.stem for file in (Path(CONF) / "experiment").glob("*.yaml")}


def comparable(claim: Claim, results: list[Result]) -> Iterator[tuple[dict[str, Any], list[Result], list[Result]]]:
    """Yield groups of comparable results: the fields they share, those of ``claim.run``, and those of ``claim.against``."""
    groups: dict[tuple[Any, ...], tuple[list[Result], list[Result]]] = defaultdict(lambda: ([], []))
    for result in results:
        if claim.measure in MEASURES and MEASURES[claim.measure](result) is None:
            continue
        for number, side in enumerate((claim.run or [{}], claim.against)):
            if any(_matches(result, wanted) for wanted in side):
                groups[_group_key(claim, result)][number].append(result)
    bases = {key[1:]: against for key, (_, against) in groups.items() if against}
    for key, (run, against) in groups.items():
        yield dict(zip(("ablation", *_keys(claim)), key, strict=True)), run, against or bases.get(key[1:], [])


def by_seed(results: list[Result]) -> dict[Any, Result]:
    """Return results by seed, ensembles by their members' seeds, and benchmarks, which have none, by machine.

    Of several ensembles that share a net, the first counts. Several results of one seed count once if they are equal, and
    decide nothing if they differ; nor do results of several seeds that are one run under several names.
    """
    found: dict[Any, Result] = {}
    refused: set[Any] = set()
    for result in results:
        if "seeds" not in result:
            key = result.get("seed", result.get("machine"))
            other = found.setdefault(key, result)
            if "seed" in result and _measured(other) != _measured(result):
                refused.add(key)
        elif not any(set(result["seeds"]) & set(seeds) for seeds in found):
            found[tuple(sorted(result["seeds"]))] = result
    copies = Counter(_trace(result) for result in found.values() if result.get("history"))
    refused |= {key for key, result in found.items() if copies[_trace(result)] > 1}
    return {key: result for key, result in found.items() if key not in refused}


def _measured(result: Result) -> list[Any]:
    """Return the errors of a result in every view."""
    return [result.get(view) for view in VIEWS]


def _trace(result: Result) -> str:
    """Return all that was measured in a run, as text: runs of different seeds never have it in common."""
    return json.dumps(
        [result.get("history"), *_measured(result), result.get("train_sample"), result.get("left_plateau")]
    )


_known: dict[tuple[str, str, int], tuple[int, float]] = {}


def _scored(result: Result, view: str) -> tuple[int, float]:
    """Return of how many images the scores are saved, 0 if none, and the top-1 error that they give, in percent."""
    if view not in result or not result.get("file") or not Path(result["file"]).exists():
        scores = scores_of(result, view) if view in result else None
        return (0, 0.0) if scores is None else (len(scores), 100 * float(scores[:, 0].mean()))
    key = (result["file"], view, Path(result["file"]).stat().st_mtime_ns)  # a page asks for each several times
    if key not in _known:
        scores = scores_of(result, view)
        _known[key] = (0, 0.0) if scores is None else (len(scores), 100 * float(scores[:, 0].mean()))
    return _known[key]


def why_refused(result: Result) -> str | None:
    """Return why a result can't be what it says, or None. A refused result is evidence for nothing."""
    for view in VIEWS:
        measured: Any = result.get(view) or {}
        top1, top5, nats = (measured.get(key, 0.0) for key in MEASURED)
        # the log-loss of a run that diverged is NaN
        if not (0 <= top5 <= top1 <= 100 and (math.isnan(nats) or 0 <= nats < math.inf)):
            return f"{VIEW_NAMES[view]}: errors of {top1:g} / {top5:g}% and {nats:g} nats are impossible"
    history = result.get("history") or []
    numbers = [epoch["epoch"] for epoch in history]
    if history and (numbers != list(range(1, len(numbers) + 1)) or numbers[-1] != result.get("epochs", numbers[-1])):
        return f"it says {result.get('epochs')} epochs, and its history has {len(numbers)}"
    if history and (last := history[-1].get("steps")) and result.get("steps", last) != last:
        return f"it says {result['steps']} updates, and its history ends after {last}"
    seeds = result.get("seeds") or []
    twice = len(seeds) - len(set(seeds))  # a pre-trained net may have the seed of another one
    facts: Any = result
    if twice > facts.get("pretrained_members", 0) or (seeds and facts.get("members", len(seeds)) != len(seeds)):
        return f"an ensemble of {result.get('members')} nets with seeds {seeds}"
    for view in VIEWS:
        count, mean = _scored(result, view)
        if not count:
            continue
        if count != result.get("images", count):
            return f"it says {result['images']:,} images, and the scores of {count:,} are saved"
        top1 = cast(dict[str, Any], result)[view]["top1_error"]
        if abs(mean - top1) > SCORES_AGREE:
            return f"{VIEW_NAMES[view]}: its scores give {mean:.2f}%, and it says {top1:.2f}%"
    return None


def fastest(side: list[Result]) -> tuple[dict[int, Result], str | None]:
    """Return the results at the fastest learning rate, keyed by seed, and a caveat or None.

    The first seed determines the fastest rate. The caveat says why this rate is not established as the fastest: a lower
    and a higher rate must have been slower. A rate is slower if it reached 25% later, or ran at least as long without
    reaching 25%.
    """
    first = min((r["seed"] for r in side), default=None)
    speed: dict[float, tuple[float, float, float]] = {}  # epochs to 25%, final error and epochs by learning rate
    for r in side:
        if r["seed"] == first and (lr := r.get("lr")) is not None:
            epochs, history = (MEASURES["epochs_to_25"](r) or {})["epochs"], r["history"]
            speed[lr] = (epochs, history[-1]["train_error"], float(history[-1]["epoch"]))
    if not speed:
        return {}, None
    best = min(speed, key=lambda lr: (speed[lr][:2], lr))
    chosen = by_seed([r for r in side if r.get("lr") == best])
    activation = side[0].get("activation", "")
    for word, others in (("below", [lr for lr in speed if lr < best]), ("above", [lr for lr in speed if lr > best])):
        nearest = (max if word == "below" else min)(others, default=None)
        if nearest is None:
            return chosen, f"no learning rate {word} {best:g} was tried for {activation}"
        epochs, _, length = speed[nearest]
        if math.isinf(epochs) and length < min(speed[best][0], speed[best][2]):
            return chosen, f"the run with {activation} at a learning rate of {nearest:g} was stopped too early"
    return chosen, None


def stopped_early(one: Result, other: Result) -> str | None:
    """Return a caveat if one of two runs never reached 25%, but was stopped before the other one reached it, or None."""
    for this, faster in ((one, other), (other, one)):
        epochs, those = ((MEASURES["epochs_to_25"](result) or {})["epochs"] for result in (this, faster))
        length = this["history"][-1]["epoch"]
        if math.isinf(epochs) and not math.isinf(those) and length < those:
            return f"the run with {this.get('activation')} was stopped after {length} epochs"
    return None


def why_proxy(claim: Claim, shared: dict[str, Any]) -> str | None:
    """Return why results with these fields are a proxy, or None if they are the claim's own experiment."""
    data, split, images = (shared.get(key) for key in ("data", "split", "images"))
    own = ("ilsvrc2010", "ilsvrc2012") if claim.data == "imagenet" else (claim.data,)
    reasons = []
    if data not in (None, *own):  # a benchmark has no data
        reasons.append("other data")
    elif claim.split in ("val", "test") and split not in (None, claim.split):
        reasons.append(f"measured on {split}")
    elif data in ("ilsvrc2010", "ilsvrc2012") and shared.get("held_out"):
        reasons.append("validation images held out from the training images")
    elif (all_images := claim.images or IMAGES.get((str(data), str(split)))) and images not in (None, all_images):
        reasons.append(f"measured on {images:,} of {all_images:,} images")
    if claim.measure == "loading":  # nothing measures a GPU and its loader together
        reasons.append("a CPU trains")
    if shared.get("experiment") not in (None, *EXPERIMENTS):
        reasons.append(f"experiment={shared['experiment']}")
    if shared.get("scale") == "proxy":
        reasons.append("smaller images and net")
    if number_of(shared.get("epochs", math.inf)) < SUFFICIENT * claim.epochs:
        reasons.append(f"{shared['epochs']} epochs")
    for key, value in claim.settings.items():
        if shared.get(key, value) != value:
            reasons.append(f"{key} unknown" if shared[key] is None else f"{key}={shared[key]}")
    if not reasons and shared.get("options"):
        reasons.append(f"options: {shared['options']}")
    return ", ".join(reasons) or None


def why_not_beside_paper(claim: Claim, result: Result) -> str | None:
    """Return why a result's numbers may not stand beside the paper's, or None if they may. It is the rule of the verdicts."""
    return why_proxy(claim, dict(zip(("ablation", *_keys(claim)), _group_key(claim, result), strict=True)))


def why_uncounted(claim: Claim, results: list[Result]) -> list[str]:
    """Return why results of a claim's experiment do not count for it: a reason for each group of such results."""
    groups = comparable(claim, results)
    reasons = {why_proxy(claim, shared) for shared, run, against in groups if run and (against or not claim.against)}
    return sorted(reason for reason in reasons if reason)


def number_of(epochs: Any) -> float:
    """Return a number of epochs; all of a run of the log are enough for any claim."""
    return math.inf if epochs == "all" else float(epochs or 0)


def _keys(claim: Claim) -> tuple[str, ...]:
    """Return the fields that results must share, except those that the claim varies or leaves open."""
    free = {key for side in (claim.run, claim.against) for wanted in side for key in wanted} - {"net"}
    free |= {"lr", "epochs"} if claim.fastest else set()
    return tuple(key for key in SHARED_KEYS if key not in free or (key == "experiment" and claim.fastest))


def _group_key(claim: Claim, result: Result) -> tuple[Any, ...]:
    """Return the fields that results about a claim have in common: the ablation, if the claim has several, and _keys."""
    facts = dict(result)
    facts["options"] = options_of(result)
    facts["experiment"] = (result.get("experiment") or "").removesuffix("_rates") or None
    replayed = result.get("of_epochs") or 0  # epochs of the run of the 2012 log whose schedule was followed
    if result.get("epochs") == replayed and (replayed >= SUFFICIENT * claim.epochs or result.get("pretraining")):
        facts["epochs"] = "all"  # the log's runs differ in their number of epochs
    variants = [wanted["ablation"] for wanted in claim.run if isinstance(wanted.get("ablation"), list)]
    ablation = result["ablation"] if any(result.get("ablation") in names for names in variants) else None
    return (ablation, *(facts.get(key) for key in _keys(claim)))


def _matches(result: Result, wanted: dict[str, Any]) -> bool:
    # single nets without pre-training only, unless the claim says otherwise, and only after the whole of their training
    wanted = {**dict.fromkeys(("members", "pretrained_members", "weights", "pretraining")), **wanted}
    wanted["checkpoint"] = [None, "last"]
    return all(
        result.get(key) in value if isinstance(value, list) else result.get(key) == value
        for key, value in wanted.items()
    )
