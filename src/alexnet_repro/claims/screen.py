"""Format the table that a command prints at its end: the errors of a run and of the paper."""

from typing import Any, cast

from alexnet_repro.claims.evidence import why_not_beside_paper
from alexnet_repro.claims.paper import expected_errors, read_claims
from alexnet_repro.claims.results import Result
from alexnet_repro.claims.scores import VIEW_NAMES, VIEWS


def table(result: dict[str, Any]) -> str:
    """Return a table of a run's errors and the paper's, with notes on whether they can be compared."""
    rows = [("error, %", "top-1", "top-5", "log-loss")]
    subject = f"mean of {result['members']} nets" if "members" in result else "this run"
    for view, pair in ((view, result[view]) for view in VIEWS if view in result):
        nats = f"{pair['log_loss']:.3f}" if "log_loss" in pair else ""
        rows.append((f"{subject}, {VIEW_NAMES[view]}", f"{pair['top1_error']:.1f}", f"{pair['top5_error']:.1f}", nats))
    lines = []
    why = None
    if claim := result["claim"]:
        paper = read_claims()[claim]
        expected, why = expected_errors(claim), why_not_beside_paper(paper, cast(Result, result))
        if expected and why is None:
            source = "the paper" if paper.kind == "number" else "from the paper's difference"
            rows.append((f"{source}, ten crops", f"{expected['top1_error']:.1f}", f"{expected['top5_error']:.1f}", ""))
        lines.append(f"The paper, {paper.section}, {paper.data} {paper.split}: {paper.says}")
    if result["data"] == "photos":
        lines.append(
            "The demonstration data is not ImageNet: each of its ten classes is one photograph. "
            "These errors show that everything works; they cannot be compared with the paper's."
        )
    elif result["data"] not in ("ilsvrc2010", "ilsvrc2012"):
        lines.append(f"{result['data']} is not ImageNet: its errors cannot be compared with the paper's.")
    elif why:
        lines.append(f"These errors cannot be compared with the paper's: {why}.")
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        ["", *(f"  {name:<{width}}  {one:>6}  {five:>6}  {nats:>8}".rstrip() for name, one, five, nats in rows), *lines]
    )
