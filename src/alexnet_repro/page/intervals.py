"""Intervals as small bars for a table: positions in percent of the bar's width."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from alexnet_repro.claims.estimates import Estimate


def reach(numbers: Iterable[tuple[float, ...]]) -> float:
    """Return how far from 0 a scale must reach to show most of these estimates with their intervals.

    It is the largest magnitude, but at most six times the median one, so that one large effect doesn't hide the others.
    """
    far = [max(map(abs, finite)) for own in numbers if (finite := [n for n in own if math.isfinite(n)])]
    largest, usual = max(far, default=0.0), statistics.median(far or [0.0])
    return min(largest, 6 * usual or largest) or 1.0


def domain(estimates: Iterable[Estimate], *shown: float, ratio: bool = False) -> tuple[float, float]:
    """Return the bounds of a common scale that shows these estimates and values, with a margin. Ratios: logarithms."""
    scale = math.log if ratio else float
    numbers = [n for e in estimates for n in (e.low, e.value, e.high) if n is not None]
    places = [scale(n) for n in (*numbers, *shown) if math.isfinite(n) and (n > 0 or not ratio)]
    low, high = (min(places), max(places)) if places else (0.0, 0.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def bar(
    estimate: Estimate,
    bounds: tuple[float, float],
    neutral: float,
    band: tuple[float, float] | None = None,
    *,
    ratio: bool = False,
) -> dict[str, Any] | None:
    """Return the places of an estimate, its interval, "no effect" and the claim's tolerance; None without an interval.

    ``beyond`` says on which side the estimate lies outside the bounds, if it does.
    """
    if estimate.low is None or estimate.high is None or not math.isfinite(estimate.value):
        return None

    def place(number: float) -> float:
        share = ((math.log(number) if ratio else number) - bounds[0]) / (bounds[1] - bounds[0])
        return round(100 * min(max(share, 0.0), 1.0), 1)

    low, high = place(estimate.low), place(estimate.high)
    drawn = {
        "low": low,
        "width": max(round(high - low, 1), 0.8),
        "value": place(estimate.value),
        "neutral": place(neutral),
        "beyond": "right" if low == 100 else "left" if high == 0 else "",
    }
    return drawn | ({"band": place(band[0]), "band_width": round(place(band[1]) - place(band[0]), 1)} if band else {})
