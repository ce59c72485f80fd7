"""Word a claim and its numbers as the paper does."""

import math
from typing import Any

from alexnet_repro.claims.estimates import Estimate
from alexnet_repro.claims.paper import Claim

PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16"}  # Lightning's names in words


def said(claim: Claim) -> str:
    """Return the paper's value, or the direction of its effect if it gives no number, as text."""
    if not claim.value:
        return {"every": "every run"}.get(claim.kind, claim.direction or "")
    if claim.kind == "count" and claim.direction:
        return f"at most {max(claim.value.values())} %"
    if claim.measure == "validation_minus_test":
        return f"at most {claim.tolerance['top5_error']}"
    own = " (printed by the authors' program)" if claim.measure == "training_at_100" else ""
    return numbers(claim, claim.value) + own


def numbers(claim: Claim, values: dict[str, Any]) -> str:
    """Format values as the paper does: 40.7 / 18.2, +1.4 / +1.2, 6 times, 60,965,224."""
    kind, measure = claim.kind, claim.measure
    if measure == "loading":
        return f"{100 * values['share']:.1f}% of the time"
    if kind == "every":
        return " / ".join(f"{100 * value:.0f}% of the runs" for value in values.values())
    if kind == "ratio":
        return " / ".join(
            f"{value:.3g} times" if 0 < value < math.inf else "not in every run" if math.isnan(value) else "never"
            for value in values.values()
        )
    if kind == "difference" or measure == "validation_minus_test":
        return " / ".join(f"{value:+.1f}" for value in values.values())
    if kind == "count":
        whole = all(value >= 100 or float(value).is_integer() for value in values.values())
        if measure == "share_of_each_convolution":
            return " ".join(f"{value:.3g}" for value in values.values()) + " %"
        return " - ".join(f"{value:,.0f}" if whole else f"{value:.3f}" for value in values.values())
    if "days" in values:
        return f"{values['days']} days"
    if measure == "training_at_100":
        return " / ".join(
            f"{value:.4f} nats" if key == "train_loss" else f"{value:.2f}%" for key, value in values.items()
        )
    return " / ".join(f"{value:.4g}" if kind == "quoted" else f"{value:.1f}" for value in values.values())


def interval(claim: Claim, key: str, estimate: Estimate) -> str:
    """Return the 95% interval of one measure as text."""
    assert estimate.low is not None
    assert estimate.high is not None
    low, high = (numbers(claim, {key: bound}) for bound in (estimate.low, estimate.high))
    return f"{low.removesuffix(' times')} to {high}"


def rule(claim: Claim) -> str | None:
    """Return the claim's rule as text, or None if the claim has none."""
    if claim.kind == "count":
        if claim.direction:
            return "no value exceeds the paper's"
        return "equal" if not claim.tolerance else f"within {numbers(claim, claim.tolerance)}"
    if not claim.is_tested:
        return None
    if claim.kind == "every":
        return "each of at least 3 runs has the property"
    unit = "" if claim.kind == "ratio" else " points"
    if claim.tolerance:
        units = {key: " nats" if key.endswith("loss") else unit for key in claim.tolerance}
        last = list(units.values())[-1]
        if set(units.values()) == {last}:
            within = " / ".join(f"{value:g}" for value in claim.tolerance.values()) + last
        else:
            within = " / ".join(f"{value:g}{units[key]}" for key, value in claim.tolerance.items())
        return f"the 95% interval over at least 3 seeds lies within {within} of the paper's value"
    way = "above" if claim.more else "below"
    least = claim.neutral if claim.at_least is None else claim.at_least
    return f"the 95% interval over at least 3 seeds lies {way} {least:g}{unit}"


def logged(claim: Claim) -> str:
    """Return the runs in the 2012 log that support a claim, with errors and log-losses, as text."""
    texts = []
    for run in claim.log:
        errors = " / ".join(f"{value:.2f}" for key, value in run.items() if key.endswith("_error"))
        texts.append(f"{run['run']} ({errors}, {run['log_loss']:.4f} nats)")
    return (" against " if claim.kind == "difference" else ", ").join(texts)
