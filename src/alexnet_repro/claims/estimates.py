"""Means over seeds with their intervals, the sampling error of test images, and corrections for multiplicity."""

import math
import statistics
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import chi2
from scipy.stats import t as student

SEEDS_NEEDED = 3  # to decide anything
LEVEL = 0.05  # significance level; intervals are 95% intervals


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over seeds with its 95% interval. For ratios, all three numbers are ratios, not logarithms."""

    value: float
    low: float | None = None  # bounds of the 95% interval, which needs two seeds
    high: float | None = None
    p: float | None = None  # two-sided p value of "no effect", Holm-corrected within the claim's family

    def inside(self, low: float, high: float) -> bool:
        """Return whether the interval lies inside these bounds."""
        return self.low is not None and self.high is not None and low <= self.low and self.high <= high

    def outside(self, low: float, high: float) -> bool:
        """Return whether the interval lies entirely outside these bounds."""
        return self.low is not None and self.high is not None and (self.high < low or high < self.low)


def holm(p_values: list[float]) -> list[float]:
    """Correct p values for multiple comparisons (Holm 1979)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def pooled(table: NDArray[np.float64]) -> tuple[float, int]:
    """Return the standard error of a difference of two arms, and its degrees of freedom, from all arms of a study.

    table: (arms, seeds), one measurement each. The model has an effect of each arm and of each seed, and one variance.
    """
    arms, seeds = table.shape
    residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (arms - 1) * (seeds - 1)
    return math.sqrt(2 * float((residual**2).sum()) / freedom / seeds), freedom


def dunnett_p(t: float, arms: int, freedom: float) -> float:
    """Return the two-sided p value of one of ``arms`` comparisons with a common control, corrected for all (Dunnett 1955).

    t: the comparison's own t statistic. freedom: degrees of freedom of the pooled variance. Arms and control have equal numbers
    of measurements, so that two comparisons have a correlation of 1/2.
    """
    # |T_j| <= t for all j, where T_j = (Z_j - Z_0) / sqrt(2) / S, integrated over Z_0 and S
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    shares, share_weights = np.polynomial.legendre.leggauss(80)
    spread = np.sqrt(chi2.ppf((shares + 1) / 2, freedom) / freedom)
    edge = math.sqrt(2) * abs(t) * spread[:, None]
    below = (ndtr(nodes + edge) - ndtr(nodes - edge)) ** arms
    inside = float(share_weights / 2 @ (below @ weights)) / math.sqrt(2 * math.pi)
    return min(1.0, max(0.0, 1 - inside))


@cache
def dunnett_critical(arms: int, freedom: float) -> float:
    """Return the t statistic beyond which one of ``arms`` comparisons differs from the control at LEVEL."""
    return float(brentq(lambda t: dunnett_p(t, arms, freedom) - LEVEL, 0.5, 60))


def standard_error(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Return the standard error and degrees of freedom of the mean of ``differences`` (seeds, images).

    Seeds and images are both random samples, and every seed is measured on the same images. The mean squares MS come
    from a two-way table with the terms seeds, images and residual. The variance of the mean is
    (max(MS_seeds, MS_residual) + max(MS_images - MS_residual, 0)) / (seeds x images): few seeds that agree by chance do not
    make it smaller than the images alone do. The degrees of freedom follow Hillis (2007).
    """
    seeds, images = differences.shape
    mean, seed_means, image_means = differences.mean(), differences.mean(1), differences.mean(0)
    ms_seeds = images * float(seed_means.var(ddof=1))
    ms_images = seeds * float(image_means.var(ddof=1))
    residual = differences - seed_means[:, None] - image_means[None] + mean
    ms_residual = float((residual**2).sum()) / ((seeds - 1) * (images - 1))
    total = max(ms_seeds, ms_residual) + max(ms_images - ms_residual, 0.0)
    freedom = total**2 / (ms_seeds**2 / (seeds - 1)) if ms_seeds else math.inf
    return math.sqrt(total / (seeds * images)), freedom


def image_variance(differences: NDArray[np.float64]) -> float:
    """Return what the sample of test images adds to the variance of the mean of ``differences`` (seeds, images).

    It is the part that all seeds share: (MS_images - MS_residual) / (seeds x images), as in ``standard_error``.
    """
    seeds, images = differences.shape
    seed_means, image_means = differences.mean(1), differences.mean(0)
    ms_images = seeds * float(image_means.var(ddof=1))
    residual = differences - seed_means[:, None] - image_means[None] + differences.mean()
    ms_residual = float((residual**2).sum()) / ((seeds - 1) * (images - 1))
    return max(ms_images - ms_residual, 0.0) / (seeds * images)


def compared(kind: str, one: float, other: float) -> float:
    """Return the ratio of two numbers for kind="ratio", otherwise their difference.

    An infinite number is a level that was never reached. The ratio of two of them is NaN.
    """
    if kind != "ratio":
        return one - other
    if math.isinf(one) and math.isinf(other):
        return math.nan
    return one / other if other else math.inf


def estimate(kind: str, numbers: list[float], images: NDArray[np.float64] | None) -> Estimate:
    """Return the mean over seeds with its 95% interval. Ratios use the geometric mean.

    The interval is at least as wide as Student's t over seeds makes it, and as the sampling error of the images does.

    kind: as in paper.yaml. numbers: one for each seed. images: the number of each image, (seeds, images), or None.
    """
    ratio = kind == "ratio"
    if any(not math.isfinite(n) or (ratio and n <= 0) for n in numbers):  # one side never reached the level
        all_equal = len(set(numbers)) == 1
        return Estimate(value=numbers[0] if all_equal else math.nan)
    values = [math.log(n) for n in numbers] if ratio else numbers
    back = math.exp if ratio else float
    mean, seeds = statistics.fmean(values), len(values)
    if seeds < 2 or kind == "every":
        return Estimate(value=back(mean))
    errors = [(statistics.stdev(values) / math.sqrt(seeds), float(seeds - 1))]
    if images is not None:
        # With few seeds, the degrees of freedom can grow by more than the error does. The wider of both intervals counts.
        errors.append(standard_error(images))
    half = max(float(student.ppf(1 - LEVEL / 2, freedom)) * error for error, freedom in errors)
    away = abs(mean)  # "no effect" is a difference of 0, or a ratio of 1, whose logarithm is 0
    p = max(2 * float(student.sf(away / error, freedom)) if error else float(away == 0) for error, freedom in errors)
    return Estimate(value=back(mean), low=back(mean - half), high=back(mean + half), p=p)
