"""How many seeds a claim's rule needs to decide it, if the truth is what the paper says.

The spread of single nets is that of the five similar nets in the 2012 log (the header of paper.yaml).
"""

import numpy as np
from scipy.stats import t as student

from alexnet_repro.claims.estimates import LEVEL, SEEDS_NEEDED
from alexnet_repro.claims.paper import Claim

SPREAD = {"top1_error": 0.174, "top5_error": 0.197}  # standard deviation of one net's errors, in points
CORRELATION = 0.75  # of the two errors of those five nets
TRIALS = 4000
ENOUGH = 0.8  # chance of a decision with which a plan is content
MOST = 60  # seeds


def chance(claim: Claim, seeds: int) -> float | None:
    """Return the chance that the claim is found "reproduced" with this many seeds, if its value is the truth.

    Returns None for claims that are not about errors of nets like those of the log.
    """
    own = claim.measure in ("ten_crop", "centre") and str(claim.data).startswith(("ilsvrc", "imagenet"))
    single = not any("members" in side for side in claim.run)
    if claim.kind not in ("number", "difference") or set(claim.tolerance) != set(SPREAD) or not (own and single):
        return None
    rng = np.random.default_rng(0)
    covariance = [[1, CORRELATION], [CORRELATION, 1]]
    drawn = rng.multivariate_normal([0, 0], covariance, (TRIALS, seeds)) * (2**0.5 if claim.kind == "difference" else 1)
    inside = np.ones(TRIALS, bool)
    for number, (key, spread) in enumerate(SPREAD.items()):
        numbers, tolerance = spread * drawn[:, :, number], claim.tolerance[key]
        half = student.ppf(1 - LEVEL / 2, seeds - 1) * numbers.std(1, ddof=1) / seeds**0.5
        inside &= np.abs(numbers.mean(1)) + half <= tolerance
    return float(inside.mean())


def seeds_needed(claim: Claim) -> int | None:
    """Return the fewest seeds with which the claim's rule has a chance of ENOUGH, or None if MOST are not enough."""
    return next((n for n in range(SEEDS_NEEDED, MOST + 1) if (chance(claim, n) or 0) >= ENOUGH), None)


def in_words(claim: Claim) -> str | None:
    """Return how many seeds the claim's rule needs, in a sentence, or None if ``chance`` does not apply."""
    if chance(claim, SEEDS_NEEDED) is None:
        return None
    needed = seeds_needed(claim)
    if needed is None:
        return f"this rule can't decide it with {MOST} seeds; report the mean and its interval"
    few = f"{chance(claim, SEEDS_NEEDED):.0%} with {SEEDS_NEEDED}"
    if needed > 10:
        return f"this rule can't decide it with few seeds: it needs about {needed}; report the mean and its interval"
    return f"{needed} seeds, if the paper's value is the truth: the chance to find it is {chance(claim, needed):.0%} ({few})"
