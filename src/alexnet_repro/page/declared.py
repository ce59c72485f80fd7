"""Present declared studies: what was declared, how far it is, and its effects when it is complete."""

from typing import Any

from alexnet_repro.claims.declared import TITLES, Declared, effects, runs_of, status
from alexnet_repro.claims.results import Result


def presented_declaration(study: Declared, results: list[Result]) -> dict[str, Any]:
    """Return what the templates show of a declared study. Its effects are shown only if it is complete."""
    runs = runs_of(study, results)
    told = status(study, runs)
    tables = []
    for outcome in study.outcomes if told == "complete" else ():
        found = effects(study, runs, outcome)
        lines = [
            {
                "arm": arm,
                "effect": f"{estimate.value:+.1f} ({estimate.low:+.1f} to {estimate.high:+.1f})",
                "p": f"{estimate.p:.3f}" if estimate.p and estimate.p >= 0.001 else "< 0.001",
            }
            for arm, estimate in found.items()
        ]
        left_out = [arm for arm in study.arms if arm not in found and arm != study.baseline]
        tables.append({"title": TITLES[outcome], "lines": lines, "left_out": ", ".join(left_out)})
    return {
        "name": study.name,
        "question": study.question,
        "about": f"declared on {study.declared}: {', '.join(study.arms)}, seeds {', '.join(map(str, study.seeds))}; first outcome: "
        f"{study.outcomes[0]}; {study.looks} look; {study.stop}",
        "baseline": study.baseline,
        "status": told,
        "command": study.command,
        "requires": study.requires,
        "tables": tables,
    }
