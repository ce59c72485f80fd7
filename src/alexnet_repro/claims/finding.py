"""Find what the results say about a claim: a finding for each group of comparable results, without a verdict."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_repro.claims.estimates import Estimate, compared, estimate
from alexnet_repro.claims.evidence import by_seed, comparable, fastest, stopped_early, why_proxy
from alexnet_repro.claims.measures import MEASURES, PAIR_MEASURES, counts, not_flattened
from alexnet_repro.claims.paper import Claim, Values
from alexnet_repro.claims.results import Result, differences_by_image

VIEWS_COMPARED = {"centre": ("centre",), "ten_crop": ("ten_crop",), "centre_minus_ten_crop": ("centre", "ten_crop")}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Evidence about a claim from one group of results."""

    claim: Claim
    estimates: dict[str, Estimate]  # by measure
    verdict: str = ""
    seeds: list[Any] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)  # fields that all results have in common
    results: list[Result] = field(default_factory=list)
    proxy: str | None = None  # reason why it is a proxy
    caveat: str | None = None  # reason why it cannot decide the claim, whatever its numbers

    @property
    def group(self) -> tuple[Any, ...]:
        """Recipe, net and ablation; findings that agree in these answer the same question."""
        return tuple(self.shared.get(key) for key in ("recipe", "net", "ablation"))


def find(claim: Claim, results: list[Result]) -> list[Finding]:
    """Return a finding without a verdict for each group of comparable results."""
    if claim.kind == "count":
        counted = counts()[claim.measure]
        return [Finding(claim=claim, estimates={key: Estimate(value=value) for key, value in counted.items()})]
    if not claim.is_tested:
        return []
    found = []
    for shared, run, against in comparable(claim, results):
        if claim.against:
            finding = _compared(claim, run, against, shared)
        # numbers of a proxy are never compared with the paper's
        elif run and not (claim.kind == "number" and why_proxy(claim, shared)):
            nets = by_seed(run)
            if not nets:
                continue
            values = {seed: MEASURES[claim.measure](r) or {} for seed, r in nets.items()}
            images = _differences_by_image(claim, [(net, net) for net in nets.values()])
            finding = _finding(claim, values, shared, list(nets.values()), images)
        else:
            finding = None
        if finding:
            found.append(finding)
    return found


def _compared(claim: Claim, run: list[Result], against: list[Result], shared: dict[str, Any]) -> Finding | None:
    """Compare two sides seed by seed and return the finding, or None if they share no seed."""
    caveat = None
    if claim.fastest:
        (run_by_seed, run_caveat), (against_by_seed, against_caveat) = fastest(run), fastest(against)
        caveat = run_caveat or against_caveat
    else:
        run_by_seed, against_by_seed = by_seed(run), by_seed(against)
    changes: dict[Any, Values] = {}
    for seed in sorted(set(run_by_seed) & set(against_by_seed)):
        if claim.measure in PAIR_MEASURES:
            change = PAIR_MEASURES[claim.measure](run_by_seed[seed], against_by_seed[seed])
        else:
            measured = [MEASURES[claim.measure](side[seed]) or {} for side in (run_by_seed, against_by_seed)]
            change = {key: compared(claim.kind, measured[0][key], measured[1][key]) for key in measured[0]}
        if change is not None:
            changes[seed] = change
    if not changes:
        return None
    if claim.fastest:
        early = (stopped_early(run_by_seed[seed], against_by_seed[seed]) for seed in changes)
        caveat = caveat or next((reason for reason in early if reason), None)
    if claim.measure == "updates_to_common_loss":
        curves = (not_flattened(run_by_seed[seed], against_by_seed[seed]) for seed in changes)
        caveat = caveat or next((reason for reason in curves if reason), None)
    images = _differences_by_image(claim, [(run_by_seed[seed], against_by_seed[seed]) for seed in changes])
    results = [side[seed] for seed in changes for side in (run_by_seed, against_by_seed)]
    return _finding(claim, changes, shared, results, images, caveat)


def _differences_by_image(claim: Claim, pairs: list[tuple[Result, Result]]) -> dict[str, NDArray[np.float64]]:
    """Return the differences of each error between two sides, or between two views of a net, (seeds, images), in points.

    Returns an empty dict if the scores of any result were not saved.
    """
    if claim.kind != "difference" or claim.measure not in VIEWS_COMPARED:
        return {}
    differences = differences_by_image(pairs, *VIEWS_COMPARED[claim.measure])
    if differences is None:
        return {}
    return {"top1_error": 100 * differences[:, :, 0], "top5_error": 100 * differences[:, :, 1]}


def _finding(
    claim: Claim,
    values_by_seed: dict[Any, Values],
    shared: dict[str, Any],
    results: list[Result],
    images: dict[str, NDArray[np.float64]],
    caveat: str | None = None,
) -> Finding:
    measured = list(values_by_seed.values())
    estimates = {
        key: estimate(claim.kind, [values[key] for values in measured], images.get(key)) for key in measured[0]
    }
    return Finding(
        claim=claim,
        estimates=estimates,
        seeds=sorted(values_by_seed),
        shared=shared,
        results=results,
        proxy=why_proxy(claim, shared),
        caveat=caveat,
    )
