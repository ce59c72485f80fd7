"""Read the paper's claims, and the rule that decides each claim, from paper.yaml."""

from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

Values = dict[str, float]  # the values of a measure by name, such as top1_error
KINDS = ("number", "difference", "ratio", "every", "count", "picture", "quoted")
Side = list[dict[str, Any]]  # alternatives; each maps result fields to the values that select a result


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper. The header of paper.yaml explains each field."""

    name: str
    section: str
    short: str
    says: str
    kind: str
    value: dict[str, Any] = field(default_factory=dict)
    direction: str | None = None
    data: str | None = None
    split: str | None = None
    images: int | None = None
    protocol: str | None = None
    epochs: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    log_note: str | None = None
    measure: str = "ten_crop"
    run: Side = field(default_factory=list)
    against: Side = field(default_factory=list)
    fastest: bool = False
    tolerance: Values = field(default_factory=dict)
    at_least: float | None = None
    derivation: str | None = None
    family: str | None = None
    note: str | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind={self.kind} is not one of {', '.join(KINDS)}")
        if self.direction not in (None, "more", "less"):
            raise ValueError(f"{self.name}: direction={self.direction} is neither more nor less")
        if unknown := set(self.tolerance) - set(self.value):
            raise ValueError(f"{self.name}: a tolerance for {', '.join(sorted(unknown))}, which has no value")
        if self.kind in ("number", "difference", "ratio") and set(self.tolerance) != set(self.value):
            raise ValueError(f"{self.name}: each value needs a tolerance")
        if (self.tolerance or self.at_least is not None) and not self.derivation:
            raise ValueError(f"{self.name}: a tolerance without its derivation")

    @property
    def neutral(self) -> float:
        """Value that means no effect: 0 for differences, 1 for ratios."""
        return 1.0 if self.kind == "ratio" else 0.0

    @property
    def more(self) -> bool:
        """Whether the paper's effect is above ``neutral``."""
        if self.direction is not None:
            return self.direction == "more"
        return not self.value or next(iter(self.value.values())) > self.neutral

    @property
    def is_tested(self) -> bool:
        """Whether an experiment tests the claim."""
        return bool(self.run) or self.measure == "loading"


@cache
def read_claims() -> dict[str, Claim]:
    """Read all claims, keyed by name, in the paper's order. Raise ValueError for an invalid entry."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "paper.yaml"))
    known = {f.name for f in fields(Claim)}
    claims = {}
    for name, entry in entries.items():
        if name.startswith("_"):  # YAML anchors shared by several claims
            continue
        if unknown := set(entry) - known:
            raise ValueError(f"paper.yaml, {name}: unknown fields {', '.join(sorted(unknown))}")
        for side in ("run", "against"):
            if isinstance(entry.get(side), dict):
                entry[side] = [entry[side]]
        claims[name] = Claim(name=name, **entry)
    return claims


def expected_errors(name: str) -> Values | None:
    """Return the paper's ten-crop errors for a claim's experiment, or None if it gives none.

    For a difference, return the errors of the unablated net plus the difference.
    """
    claims = read_claims()
    claim = claims[name]
    if claim.kind not in ("number", "difference") or not claim.value or claim.protocol != "ten crops":
        return None
    if claim.kind == "number":
        return claim.value
    base = claims["table1_cnn" if claim.data == "ilsvrc2010" else "one_cnn"].value
    return {key: round(base[key] + change, 4) for key, change in claim.value.items()}


def claim_of(cfg: DictConfig) -> str | None:
    """Return the name of the claim that a run tests, or None if it tests none.

    A run with one ablation tests that ablation's claim. A run without ablation tests ``cfg.claim``. A run with several
    ablations or another net tests no claim.
    """
    if cfg.net.name != "alexnet":
        return None
    claims = list(cfg.ablation.values())
    return claims[0] if len(claims) == 1 else (None if claims else cfg.claim)
