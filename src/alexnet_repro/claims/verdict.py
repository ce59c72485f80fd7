"""Judge the claims from results. No verdict is written by hand.

The ``run`` and ``against`` fields of a claim select results. Selected results that agree in all other fields form a
group, and each recipe and net gets its own verdict. Intervals are 95% confidence intervals from Student's t over seeds
and, where the scores of the test images are saved, over these images, too. Fewer than three seeds decide nothing. The
verdicts are:

reproduced
    The interval lies inside the claim's tolerance around the paper's value. If the paper states only a direction, the
    interval lies beyond the smallest effect consistent with the paper's wording.
right direction
    The interval excludes "no effect" on the paper's side and meets the tolerance, or contains the smallest effect, but is
    not inside or beyond it.
right direction, other size
    The interval excludes "no effect" on the paper's side, and lies outside the tolerance, or below the smallest effect.
not found
    The interval contains "no effect", and lies outside the tolerance, or below the smallest effect.
contradicted
    The interval excludes "no effect" on the opposite side. For a plain number, it lies outside the tolerance.
undecided
    Anything else.
one seed, inside / one seed, outside
    A single seed decides nothing, however large its effect.
counted: equal / counted: differs
    A property computed from the net itself.
quoted / not run / proxy only / not comparable
    A result of other authors / a claim without an experiment so far / only with proxies / with results whose numbers
    cannot be compared with the paper's.

If the paper gives several numbers, such as top-1 and top-5 errors, the first of these words that holds for one of them is the
verdict: contradicted, not found, undecided, right direction of another size, right direction, reproduced.

A proxy (other data or another protocol) is never compared with the paper's value. It agrees, disagrees, finds no effect of the
paper's size, or is undecided.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from alexnet_repro.claims.estimates import LEVEL, SEEDS_NEEDED, Estimate, holm
from alexnet_repro.claims.evidence import number_of, why_refused
from alexnet_repro.claims.finding import Finding, find
from alexnet_repro.claims.paper import Claim, read_claims
from alexnet_repro.claims.results import SHARED_KEYS, Result, shared_key
from alexnet_repro.claims.study import Study, studies

PROXY = "proxy: "
OTHER_SIZE = "right direction, other size"
DECIDED = ("reproduced", "right direction", OTHER_SIZE, "not found", "contradicted", "undecided")
# The word that decides if the paper gives several numbers: the first one that holds for any of them.
PRECEDENCE = ("contradicted", "not found", "undecided", OTHER_SIZE, "right direction", "reproduced")
IN_PROXIES = {
    "reproduced": "agrees",
    "right direction": "agrees",
    OTHER_SIZE: "agrees",
    "contradicted": "disagrees",
}
SINGLE = ("one seed, inside", "one seed, outside")


def judge(results: Iterable[Result], compared: list[Study] | None = None) -> dict[str, list[Finding]]:
    """Return the findings for each claim, keyed by claim name, with proxies last.

    p values are corrected for multiple comparisons (Holm) within each family of claims, separately for each group of
    comparable results (SHARED_KEYS). The top-1 errors of ablations have the intervals and p values of their study.

    compared: the studies of these results, if they are known already.
    """
    results = [result for result in results if why_refused(result) is None]
    found = {name: find(claim, results) for name, claim in read_claims().items()}
    families: dict[tuple[Any, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, findings in found.items():
        for number, finding in enumerate(findings):
            if finding.claim.family and len(finding.seeds) >= SEEDS_NEEDED:
                shared = (finding.shared.get(key) for key in SHARED_KEYS)
                families[(finding.claim.family, *shared)].append((name, number))
    for members in families.values():
        _correct(found, members)
    _correct_as_studies(found, studies(results) if compared is None else compared)
    return {
        name: sorted(
            (replace(finding, verdict=_verdict(finding)) for finding in findings),
            key=lambda f: (
                f.proxy is not None,
                -len(f.seeds),
                f.shared.get("precision") != "32-true",
                -number_of(f.shared.get("epochs")),
            ),
        )
        for name, findings in found.items()
    }


def deciding(findings: list[Finding]) -> list[Finding]:
    """Return the deciding finding for each recipe, net and ablation.

    It uses the paper's own data and protocol and has the most seeds. Among equals, float32 takes precedence over
    bfloat16. ``findings`` must be sorted as by ``judge``.
    """
    first: dict[tuple[Any, ...], Finding] = {}
    for finding in findings:
        if finding.proxy is None:
            first.setdefault(finding.group, finding)
    return list(first.values())


def status(claim: Claim, findings: list[Finding], uncounted: list[str]) -> str:
    """Return the status of a claim that has no deciding finding or needs none, otherwise "".

    uncounted: why some results do not count, as from ``evidence.why_uncounted``.
    """
    if claim.kind in ("quoted", "picture"):
        return "quoted" if claim.kind == "quoted" else "for the reader"
    if claim.kind == "count":
        return "counted"
    if deciding(findings):
        return ""
    if not uncounted:
        return "not run"
    return "not comparable" if claim.kind == "number" else "proxy only"


def _correct(found: dict[str, list[Finding]], places: list[tuple[str, int]]) -> None:
    findings = [found[name][number] for name, number in places]
    keys = {key for finding in findings for key in finding.estimates}
    for key in keys:
        tested = [i for i, finding in enumerate(findings) if (e := finding.estimates.get(key)) and e.p is not None]
        for i, p in zip(tested, holm([findings[i].estimates[key].p or 0.0 for i in tested]), strict=True):
            name, number = places[i]
            old = found[name][number]
            found[name][number] = replace(old, estimates=old.estimates | {key: replace(old.estimates[key], p=p)})


def _correct_as_studies(found: dict[str, list[Finding]], compared: list[Study]) -> None:
    """Give the top-1 errors of ablations the estimates of their study, which are joint for all of its ablations."""
    joint = {
        (tuple(study.shared.values()), change.ablation): change.estimates["ten_crop"]
        for study in compared
        for change in study.changes
    }
    for findings in found.values():
        for number, finding in enumerate(findings):
            if finding.claim.family != "ablations":
                continue
            changed = next((r for r in finding.results if r["ablation"] != "none"), None)
            top1 = joint.get((shared_key(changed), changed["ablation"])) if changed else None
            if top1 is not None and top1.p is not None:
                findings[number] = replace(finding, estimates=finding.estimates | {"top1_error": top1})


def _verdict(finding: Finding) -> str:
    """Return the verdict by the claim's rule.

    If the paper gives several numbers, such as top-1 and top-5 errors, the rule applies to all of them.
    """
    claim = finding.claim
    if claim.kind == "count":
        return "counted: equal" if _count_agrees(finding) else "counted: differs"
    keys = list(claim.value) or list(finding.estimates)[:1]
    estimates = [finding.estimates[key] for key in keys]
    if len(finding.seeds) == 1:
        if finding.proxy:
            return PROXY + ("one machine" if "ratios" in finding.results[0] else "one seed")
        return f"one seed, {'inside' if _fits(claim, keys, estimates) else 'outside'}"
    if len(finding.seeds) < SEEDS_NEEDED or finding.caveat:
        word = "undecided"
    elif claim.kind == "every":
        word = "reproduced" if all(e.value == 1 for e in estimates) else "contradicted"
    elif claim.kind == "number":
        bounds = [_bounds(claim, key) for key in keys]
        inside = all(e.inside(*b) for e, b in zip(estimates, bounds, strict=True))
        outside = any(e.outside(*b) for e, b in zip(estimates, bounds, strict=True))
        word = "reproduced" if inside else "contradicted" if outside else "undecided"
    else:
        word = _effect(claim, keys, estimates)
    if finding.proxy:
        return PROXY + IN_PROXIES.get(word, word)
    return word


def _effect(claim: Claim, keys: list[str], estimates: list[Estimate]) -> str:
    """Return the verdict on a difference, a ratio or a direction."""
    words = [_word(claim, key, estimate) for key, estimate in zip(keys, estimates, strict=True)]
    return min(words, key=PRECEDENCE.index)


def _word(claim: Claim, key: str, estimate: Estimate) -> str:
    """Return the verdict on one of the claim's numbers."""
    side = _side(claim, estimate)
    if side == "other":
        return "contradicted"
    if claim.tolerance:
        inside, misses = estimate.inside(*_bounds(claim, key)), estimate.outside(*_bounds(claim, key))
    else:
        near, far = (estimate.low, estimate.high) if claim.more else (estimate.high, estimate.low)
        inside = _beyond(claim, near)
        misses = far is not None and not _beyond(claim, far)
    if side == "neither":  # an interval that excludes "no effect" only before the correction decides nothing
        contains_none = not estimate.outside(claim.neutral, claim.neutral)
        return "not found" if misses and contains_none else "undecided"
    return "reproduced" if inside else OTHER_SIZE if misses else "right direction"


def _side(claim: Claim, estimate: Estimate) -> str:
    """Return the side of "no effect" of an estimate: "paper", "other", or "neither" if undecided."""
    if math.isnan(estimate.value):
        return "neither"
    if estimate.low is None and not (math.isinf(estimate.value) or estimate.value == 0):
        return "neither"
    if estimate.p is not None and estimate.p >= LEVEL:
        return "neither"
    return "paper" if (estimate.value > claim.neutral) == claim.more else "other"


def _beyond(claim: Claim, end: float | None) -> bool:
    """Return whether a bound of the interval is at or beyond ``claim.at_least``, if the claim has one."""
    if claim.at_least is None or end is None:
        return claim.at_least is None
    return end >= claim.at_least if claim.more else end <= claim.at_least


def _bounds(claim: Claim, key: str) -> tuple[float, float]:
    return claim.value[key] - claim.tolerance[key], claim.value[key] + claim.tolerance[key]


def _fits(claim: Claim, keys: list[str], estimates: list[Estimate]) -> bool:
    """Return whether the values satisfy the claim, ignoring their intervals."""
    if claim.kind == "every":
        return all(e.value == 1 for e in estimates)
    if claim.tolerance:
        return all(
            low <= e.value <= high for e, (low, high) in zip(estimates, (_bounds(claim, k) for k in keys), strict=True)
        )
    return all((e.value > claim.neutral) == claim.more and _beyond(claim, e.value) for e in estimates)


def _count_agrees(finding: Finding) -> bool:
    claim = finding.claim
    if claim.direction == "less":
        return all(finding.estimates[key].value <= value for key, value in claim.value.items())
    return all(
        abs(finding.estimates[key].value - value) <= claim.tolerance.get(key, 0) for key, value in claim.value.items()
    )
