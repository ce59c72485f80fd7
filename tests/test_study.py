"""Test the ablation study on made-up results: its changes, intervals and corrected p values, and how they are told."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import dunnett, ttest_rel
from scipy.stats import t as student

from alexnet_repro.claims.estimates import dunnett_critical, dunnett_p, pooled
from alexnet_repro.claims.paper import read_claims
from alexnet_repro.claims.results import Result
from alexnet_repro.claims.scores import save_scores
from alexnet_repro.claims.study import Study, baselines, studies
from alexnet_repro.page.cost import cost
from alexnet_repro.page.drawings import first_layer
from alexnet_repro.page.intervals import bar, reach
from alexnet_repro.page.study import as_csv, baseline, forest_rows, markdown, presented, sentences
from alexnet_repro.page.study import cost as study_cost

BASELINE = [35.0, 36.0, 34.5]
CHANGED = {"no_lrn": [45.1, 46.0, 44.4], "no_dropout": [38.0, 36.5, 37.5], "one_gpu": [36.2, 37.3, 35.6]}


def run(error: float, seed: int, ablation: str = "none", **more: Any) -> Result:
    """Return the result of a run whose other measures follow from its ten-crop error."""
    epochs = more.get("epochs", 20)
    first = [{"epoch": 1, "steps": 100, "train_error": 80.0}, {"epoch": 2, "steps": 200, "train_error": error}]
    later = [{"epoch": e, "steps": 100 * e, "train_error": error, "seed": seed} for e in range(3, epochs + 1)]
    history = first + later
    return {  # type: ignore[return-value]
        "experiment": "ablations",
        "scale": "proxy",
        "data": "imagenette",
        "recipe": "as_run",
        "epochs": 20,
        "precision": "32-true",
        "ablation": ablation,
        "seed": seed,
        "net": "alexnet",
        "centre": {"top1_error": error + 2, "top5_error": 5.0, "log_loss": 1.2},
        "ten_crop": {"top1_error": error, "top5_error": 4.0, "log_loss": error / 30},
        "train_sample": {"top1_error": error - 1, "top5_error": 3.0, "log_loss": 1.0, "images": 1000},
        "history": history,
        "seconds": 300.0,
        "file": "",
        **more,
    }


def study_of(changed: dict[str, list[float]], **more: Any) -> Study:
    runs = [run(error, seed, **more) for seed, error in enumerate(BASELINE)]
    runs += [run(e, s, name, **more) for name, errors in changed.items() for s, e in enumerate(errors)]
    (found,) = studies(runs)
    return found


def test_a_study_is_one_linear_model_with_dunnetts_comparisons() -> None:
    """Against least squares with a dummy variable for each arm and seed, and a simulation of the largest |t|."""
    found = study_of(CHANGED)
    arms = [BASELINE, *CHANGED.values()]
    design = np.array(
        [[*(a == arm for a in range(4)), *(s == seed for s in (1, 2))] for arm in range(4) for seed in range(3)], float
    )
    y = np.ravel(arms)
    coefficients, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - 6
    covariance = np.linalg.inv(design.T @ design) * float(residual[0]) / freedom
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(400_000, 4))
    largest = np.abs(drawn[:, 1:] - drawn[:, :1]).max(1) / 2**0.5 / np.sqrt(rng.chisquare(freedom, 400_000) / freedom)
    for number, name in enumerate(CHANGED, 1):
        estimate = next(change for change in found.changes if change.ablation == name).estimates["ten_crop"]
        contrast = np.zeros(6)
        contrast[number], contrast[0] = 1, -1
        error = float(contrast @ covariance @ contrast) ** 0.5
        assert estimate.value == pytest.approx(float(contrast @ coefficients))
        assert estimate.p == pytest.approx(float((largest > estimate.value / error).mean()), abs=0.003)
        half = float(np.quantile(largest, 0.95)) * error
        assert (estimate.low, estimate.high) == pytest.approx((estimate.value - half, estimate.value + half), rel=0.02)
    assert [change.ablation for change in found.changes] == ["no_lrn", "no_dropout", "one_gpu"]  # the largest first


def test_dunnetts_p_values_equal_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for arms, count in ((1, 4), (3, 3), (13, 5)):
        control, *others = rng.normal(size=(arms + 1, count))
        expected = dunnett(*others, control=control, random_state=0)
        for t, p in zip(expected.statistic, expected.pvalue, strict=True):
            assert dunnett_p(t, arms, (arms + 1) * (count - 1)) == pytest.approx(p, abs=2e-3)
    assert dunnett_critical(1, 10) == pytest.approx(float(student.ppf(0.975, 10)), abs=1e-4)


def test_a_null_study_errs_in_one_of_twenty_and_its_joint_intervals_hold_together() -> None:
    """Of 4000 made-up studies of six ablations without any effect, about 5% find one; so do the intervals that miss 0."""
    rng = np.random.default_rng(0)
    names, false, trials = ["no_lrn", "one_gpu", "no_conv3", "no_conv4", "no_conv5", "no_crops"], 0, 4000
    critical = dunnett_critical(6, 24)
    for trial in range(trials):
        table = rng.normal(36, 2, 5) + rng.normal(0, 0.7, (7, 5))
        error, freedom = pooled(table)
        assert freedom == 24
        t = (table[1:].mean(1) - table[0].mean()) / error
        found_one = bool((np.abs(t) > critical).any())
        false += found_one
        if trial < 15:  # as a whole study
            runs = [
                run(e, s, name) for name, side in zip(["none", *names], table, strict=True) for s, e in enumerate(side)
            ]
            (found,) = studies(runs)
            estimates = [change.estimates["ten_crop"] for change in found.changes]
            assert any(change.distinct for change in found.changes) == found_one
            assert any(not (e.low or 0) <= 0 <= (e.high or 0) for e in estimates) == found_one
    assert false / trials == pytest.approx(0.05, abs=0.011)  # 3.2 standard deviations


def test_updates_to_half_the_training_images_are_a_ratio_of_interpolated_crossings() -> None:
    found = study_of({"no_lrn": [48.0, 46.0, 44.0]})
    crossings = [[100 + 100 * (80 - 50) / (80 - e) for e in errors] for errors in ([48.0, 46.0, 44.0], BASELINE)]
    logs = np.log(np.divide(*crossings))
    ratio = found.changes[0].estimates["updates"]
    assert ratio.value == pytest.approx(math.exp(logs.mean()))
    never = study_of({"tanh": [89.0, 88.0, 89.5]})
    assert never.changes[0].estimates["updates"].value == math.inf
    assert "| never |" in markdown(never)


def test_only_equal_seeds_and_comparable_runs_are_compared() -> None:
    runs = [run(error, seed) for seed, error in enumerate(BASELINE)]
    runs += [run(40.0, 0, "no_lrn"), run(41.0, 1, "no_lrn"), run(99.0, 7, "no_lrn")]  # no baseline has seed 7
    runs += [run(10.0, 2, "no_lrn", epochs=10), run(20.0, 0, "no_lrn", recipe="paper")]
    (found,) = studies(runs)
    assert found.changes[0].seeds == [0, 1]
    assert found.changes[0].estimates["ten_crop"].value == pytest.approx((40 + 41) / 2 - (35 + 36) / 2)
    assert studies([run(35.0, 0), run(35.0, 0) | {"experiment": None}]) == []  # type: ignore[operator]


def test_baseline_alone_is_told_and_its_kernels_are_drawn(tmp_path: Path) -> None:
    runs = [run(error, seed, scale="full") for seed, error in enumerate(BASELINE)]
    assert studies(runs) == []
    (alone,) = baselines([*runs, run(40.0, 0, "no_lrn", scale="proxy")])
    assert alone.seeds == [0, 1, 2]
    assert f"{np.mean(BASELINE):.1f}% with ten crops" in baseline(alone)
    assert first_layer(runs) == {}
    for seed, (own, epochs) in enumerate(zip(runs, (20, 90, 90), strict=True)):
        own.update(file=str(tmp_path / f"{seed}.json"), epochs=epochs, colour_content=[0.5, 0.25])
        kernels = torch.full((96, 3, 11, 11), float(seed)) if seed < 2 else None
        save_scores(tmp_path / f"{seed}.npz", {"ten_crop": torch.zeros(4, 3)}, kernels)
    (figure, caption) = first_layer(runs)["figure-3"]
    assert "90 epochs, 32-true, seed 1" in caption  # seed 0 has fewer epochs, and the kernels of seed 2 aren't saved
    assert "50%, 25%" in caption
    assert len(figure.axes) == 2


def test_interval_covers_seeds_and_images_where_scores_are_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    runs = []
    for ablation in ("none", "no_lrn"):
        for seed in range(3):
            wrong = rng.random(400) < (0.35 if ablation == "none" else 0.45)
            scores = torch.tensor(np.stack([wrong, wrong * 0.1, np.full(400, 1.0)], 1))
            folder = tmp_path / f"{ablation}-{seed}"
            folder.mkdir()
            save_scores(folder / "predictions.npz", {"ten_crop": scores})
            runs.append(run(100 * wrong.mean(), seed, ablation, file=str(folder / "result.json")))
    (found,) = studies(runs)
    change = found.changes[0].estimates["ten_crop"]
    assert change.low is not None
    assert change.high is not None
    binomial = 100 * math.sqrt(2 * 0.4 * 0.6 / (3 * 400))  # the least that independent images and seeds can give
    assert change.high - change.low > 2 * 1.96 * 0.6 * binomial


def test_sentences_tell_apart_what_survives_the_correction() -> None:
    told = " ".join(sentences(study_of(CHANGED)))
    assert "Corrected for 3 comparisons, the ten-crop error is higher with no_lrn (+10.0 points" in told
    found = study_of({"no_lrn": [45.1, 46.0, 44.4], "no_conv3": [36.0, 36.9, 36.3], "no_crops": [35.0, 35.0, 36.0]})
    assert float(ttest_rel([36.0, 36.9, 36.3], BASELINE).pvalue) < 0.05  # alone, but not among three
    assert "no_conv3" in sentences(found)[-1]
    assert "contain 0" in sentences(found)[-1]
    assert "no_crops" in sentences(found)[-1]
    better = study_of({"no_lrn": [25.1, 26.0, 24.4]})
    assert "lower with no_lrn (-10.0 points" in sentences(better)[0]


def test_two_seeds_have_no_corrected_p_value_and_are_told_apart() -> None:
    found = study_of(CHANGED | {"one_gpu": CHANGED["one_gpu"][:2]})
    told = " ".join(sentences(found))
    assert "Corrected for 2 comparisons" in told
    assert "Not tested: one_gpu, with fewer than 3 seeds." in told
    rows = {r["ablation"]: r["p_dunnett"] for r in csv.DictReader(io.StringIO(as_csv(found))) if r["p_dunnett"]}
    assert set(rows) == {"no_lrn", "no_dropout"}
    line = next(line for line in markdown(found).splitlines() if line.startswith("| one_gpu"))
    assert line.endswith("| - | 0, 1 |")


def test_levels_that_were_not_reached_and_nan_errors_are_told_apart() -> None:
    errors = {"no_lrn": [45.1, 80.0, 44.4], "no_dropout": [float("nan"), 36.5, 37.5], "one_gpu": [80.0, 80.1, 80.2]}
    lines = {line.split(":")[0].strip("| "): line for line in markdown(study_of(errors)).splitlines()}
    assert "| not in every run |" in lines["no_lrn"]
    assert "| never |" in lines["one_gpu"]
    assert lines["no_dropout"].endswith("| 1, 2 |")  # an error that is not a number is no evidence
    assert "Not tested: no_dropout, with fewer than 3 seeds." in " ".join(
        sentences(study_of({"no_dropout": errors["no_dropout"]}))
    )


def test_nets_that_did_not_train_are_told() -> None:
    runs = [run(error, seed, left_plateau=100) for seed, error in enumerate(BASELINE)]
    runs += [run(90.0, seed, "tanh", left_plateau=updates) for seed, updates in enumerate((None, 1400, None))]
    (found,) = studies(runs)
    told = sentences(found)
    assert len(told) == 1  # it is described, and not tested
    assert "the training loss of 2 of 3 runs stayed above 95% of that of guessing" in told[0]
    assert found.changes[0].estimates["ten_crop"].p is None
    (found,) = studies([r | ({"left_plateau": None} if r["ablation"] == "tanh" else {}) for r in runs])  # type: ignore[operator]
    assert all("error is higher" not in sentence for sentence in sentences(found))  # none of its nets was trained
    (found,) = studies([r | {"left_plateau": 100} for r in runs])  # type: ignore[operator]
    assert "plateau" not in " ".join(sentences(found))


def test_csv_has_every_estimate_and_a_proxy_shows_no_value_of_the_paper() -> None:
    found = study_of(CHANGED)
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    own = next(r for r in rows if r["ablation"] == "no_lrn" and r["measure"] == "top-1 error, ten crops")
    assert float(own["estimate"]) == pytest.approx(10.0)
    assert own["seeds"] == "0 1 2"
    assert len(rows) == 3 * 6
    assert all(line["paper"] is None for line in forest_rows(found))
    protocol = {"epochs": 90, "split": "test", "images": 150_000, "batch_size": 128, "lr": 0.01}
    full = study_of(CHANGED, scale="full", data="ilsvrc2010", **protocol)
    by_name = {line["label"].split(" ")[0]: line["paper"] for line in forest_rows(full)}
    assert by_name["no_lrn"] == 1.4  # Section 3.3
    assert by_name["one_gpu"] == 1.7  # Section 3.2


def test_bars_lie_at_the_shares_of_their_scale_and_large_effects_leave_it() -> None:
    found = study_of(CHANGED).changes[0].estimates["ten_crop"]
    assert found.low is not None
    drawn = bar(found, (-20.0, 20.0), 0.0)
    assert drawn is not None
    assert drawn["neutral"] == 50
    assert drawn["value"] == pytest.approx(100 * (found.value + 20) / 40, abs=0.1)
    assert drawn["low"] == pytest.approx(100 * (found.low + 20) / 40, abs=0.1)
    assert drawn["beyond"] == ""
    beyond = bar(found, (-5.0, 5.0), 0.0)
    assert beyond is not None
    assert beyond["beyond"] == "right"
    assert reach([(1.0, -2.0), (3.0,), (-4.0,), (60.0,)]) == 6 * 3.5
    assert reach([(1.0, -2.0), (3.0,), (4.0,)]) == 4
    assert reach([(0.0,), (0.0,), (2.0,)]) == 2
    assert reach([(0.0,), (0.0,)]) == 1


def test_nets_with_equal_errors_and_older_results_are_presented() -> None:
    """Nets that all stay at chance have equal errors, and older results lack the training error and the log-loss."""
    results = [run(90.9, seed, name) for name in ("none", "tanh", "no_lrn") for seed in range(3)]
    for one in results:
        del one["train_sample"], one["ten_crop"]["log_loss"]  # as in the first published results
    (found,) = studies(results)
    shown = presented(found)
    assert shown["baseline"] == "top-1 error of 90.9% with ten crops and 92.9% with one view, seeds 0, 1, 2"
    assert [line["cells"][0]["value"] for line in shown["lines"]] == ["+0.0", "+0.0"]


def test_cost_of_a_study_is_its_time_and_the_arithmetic_of_the_whole_experiment() -> None:
    """Six runs of 300 s; 6 x 91 x 1,281,167 images at 10,000 per second take 19.4 hours."""
    told = study_cost(study_of({"no_lrn": [48.0, 46.0, 44.0]}, of_epochs=91, hardware="1 thread of a processor"))
    assert told.startswith("6 runs of 5.0 to 5.0 minutes took 0.5 hours (1 thread of a processor).")
    assert (
        "91 epochs each, they would take 19 hours on a GPU that trains on 10,000 images per second (arithmetic)" in told
    )


def test_costs_are_runs_times_epochs_times_images() -> None:
    claims = read_claims()
    runs, epochs, images = 10, 90, 1_281_167  # two sides, five seeds; Section 2: "roughly 1.2 million training images"
    claim = claims["no_weight_decay"]
    assert claim.command is not None
    assert "ilsvrc2012" in claim.command
    hours = runs * epochs * images / 10_000 / 3600
    assert cost(claim) == f"10 runs, {runs * epochs * images / 1e6:,.0f} million images: {hours:,.1f} hours on a GPU that trains on 10,000 images per second (arithmetic)"  # fmt: skip
    assert cost(claims["parameters"]) == ""
    # Fall 2011, then ILSVRC-2012; batches 1 to 4 until batch 5 joins (facts of CIFAR-10); until 25% is reached
    for name, runs, told in (
        ("one_cnn_pretrained", 10, 5 * (8 * 15_000_000 + 54 * 1_281_167)),
        ("cifar10_thirteen", 3, 3 * (100 * 40_000 + 60 * 50_000)),
        ("cifar10_eleven", 3, 3 * (350 * 40_000 + 170 * 50_000)),
    ):
        assert cost(claims[name]).startswith(f"{runs} runs, {told / 1e6:,.0f} million images: "), name
    assert cost(claims["figure_1"]).startswith("10 runs, at most 40 million images: ")
