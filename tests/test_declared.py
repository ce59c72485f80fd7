"""Test studies that were declared before their runs: what is read, when they are judged, and what makes them void."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from alexnet_repro.claims.declared import Declared, effects, read_declared, runs_of, status
from alexnet_repro.configs import CONF
from alexnet_repro.errors import UserError
from alexnet_repro.page.declared import presented_declaration
from tests.test_study import run

DECLARED: dict[str, Any] = {
    "name": "mine", "question": "Which?", "declared": "2026-12-01", "command": "python -m alexnet_repro.train",
    "fixed": {"recipe": "as_run", "epochs": 90}, "arms": ["none", "no_lrn"], "baseline": "none", "seeds": [0, 1, 2],
    "outcomes": ["ten crops", "gap"], "void_below": 5,
}  # fmt: skip


def runs(none: list[float], other: list[float], **more: Any) -> list[Any]:
    sides = {"none": none, "no_lrn": other}
    return [run(e, s, name, epochs=90, **more) for name, errors in sides.items() for s, e in enumerate(errors)]


def test_effects_of_two_arms_equal_a_paired_t_test() -> None:
    study = Declared(**DECLARED)
    none, other = [35.0, 36.0, 34.5], [38.0, 37.5, 38.5]
    found = runs_of(study, runs(none, other))
    assert status(study, found) == "complete"
    test = ttest_rel(other, none)
    estimate = effects(study, found, "ten crops")["no_lrn"]
    assert estimate.value == pytest.approx(np.subtract(other, none).mean())
    assert estimate.p == pytest.approx(test.pvalue, abs=1e-4)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-3)


def test_incomplete_study_shows_no_effect() -> None:
    study = Declared(**DECLARED)
    some = runs([35.0, 36.0, 34.5], [38.0, 37.5, 38.5])[:-1]
    shown = presented_declaration(study, some)
    assert shown["status"] == "5 of 6 runs are finished; it is judged when all are"
    assert shown["tables"] == []


def test_runs_of_other_experiments_do_not_count() -> None:
    study = Declared(**DECLARED)
    others = [
        *runs([35.0] * 3, [38.0] * 3, recipe="paper"),
        *runs([35.0] * 3, [38.0] * 3, options=["optim.lr=0.02"]),
        run(35.0, 7, epochs=90),
        run(35.0, 0, epochs=20),
    ]
    assert status(study, runs_of(study, others)).startswith("0 of 6")


def test_void_study_and_arms_that_did_not_train() -> None:
    good = runs([4.0, 4.1, 4.2], [9.0, 9.1, 9.2])
    assert (
        status(Declared(**DECLARED), runs_of(Declared(**DECLARED), good))
        == "void: ten crops of none is 4.1 on average, below 5"
    )
    study = Declared(**(DECLARED | {"arms": ["none", "no_lrn", "tanh"], "void_below": None}))
    some = [*good, *(run(90.0, s, "tanh", epochs=90, left_plateau=None if s == 1 else 50) for s in range(3))]
    found = runs_of(study, some)
    assert status(study, found) == "complete"
    assert set(effects(study, found, "gap")) == {"no_lrn"}
    assert presented_declaration(study, some)["tables"][0]["left_out"] == "tanh"


def test_declarations_of_the_checkout_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    declared = {study.name: study for study in read_declared(Path(CONF).parent / "results")}
    assert len(declared["regularisation"].arms) * len(declared["regularisation"].seeds) == 30
    for study in declared.values():
        assert f"+ablation={','.join(study.arms)} seed={','.join(map(str, study.seeds))}" in study.command
        assert f"epochs={study.fixed['epochs']}" in study.command
    (tmp_path / "studies").mkdir()
    for content in ("name: x", "[]", "${oc.env:HOME}", "a: &a 1\nb: *a"):
        (tmp_path / "studies/x.yaml").write_text(content)
        with pytest.raises(UserError, match="not the declaration of a study"):
            read_declared(tmp_path)
