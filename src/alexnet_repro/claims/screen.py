"""What a command prints at its end: the errors of a run beside the paper's."""

from typing import Any

from alexnet_repro.claims.paper import expected_errors, read_claims
from alexnet_repro.claims.scores import VIEWS


def table(result: dict[str, Any]) -> str:
    """Return a few lines for the screen: a run's errors, the paper's if there is a claim, and what they are worth."""
    rows = [("error, %", "top-1", "top-5", "log-loss")]
    who = f"mean of {result['members']} nets" if "members" in result else "this run"
    names = {"centre": "one view", "ten_crop": "ten crops", "nine_crop": "nine crops"}
    for view, pair in ((view, result[view]) for view in VIEWS if view in result):
        nats = f"{pair['log_loss']:.3f}" if "log_loss" in pair else ""
        rows.append((f"{who}, {names[view]}", f"{pair['top1_error']:.1f}", f"{pair['top5_error']:.1f}", nats))
    lines = []
    if claim := result["claim"]:
        paper = read_claims()[claim]
        if expected := expected_errors(claim):
            rows.append(("the paper, ten crops", f"{expected['top1_error']:.1f}", f"{expected['top5_error']:.1f}", ""))
        lines.append(f"The paper, {paper.section}, {paper.data} {paper.split}: {paper.says}")
        if {paper.data, result["data"]} == {"ilsvrc2010", "ilsvrc2012"}:
            lines.append(
                f"These are errors on {result['data']}, of other classes and images: no measure of the paper's."
            )
    if result["data"] == "photos":
        lines.append(
            "The demonstration data is not ImageNet (ten classes, each one photograph): "
            "these numbers show that everything works and can't be compared with the paper's."
        )
    elif result["data"] not in ("ilsvrc2010", "ilsvrc2012"):
        lines.append(f"{result['data']} is not ImageNet: its errors can't be set beside the paper's.")
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        ["", *(f"  {name:<{width}}  {one:>6}  {five:>6}  {nats:>8}".rstrip() for name, one, five, nats in rows), *lines]
    )
