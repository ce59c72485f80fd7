"""paper.yaml read: what the paper claims, and what it measured."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

Claim = dict[str, Any]


def read_claims() -> dict[str, Claim]:
    """paper.yaml: every claim by its name, in the paper's order."""
    claims: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "paper.yaml"))
    return claims


def expected_errors(claims: dict[str, Claim], name: str) -> dict[str, float] | None:
    """The errors that the paper has for the experiment of a claim; of a difference, those of the whole net and it together.

    None where the paper doesn't say how it was measured.
    """
    claim = claims[name]
    if claim["kind"] not in ("number", "difference") or not claim.get("value") or claim["protocol"] != "ten crops":
        return None
    if claim["kind"] == "number":
        return claim["value"]
    base = claims["table1_cnn" if claim["data"] == "ilsvrc2010" else "one_cnn"]["value"]
    return {key: round(base[key] + change, 4) for key, change in claim["value"].items()}
