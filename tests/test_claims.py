"""The paper's claims as data, and the verdicts that follow from results made up here."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from alexnet_repro.claims import findings, verdict
from alexnet_repro.cli import UserError
from alexnet_repro.page import content, others_table
from alexnet_repro.paper import expected_errors, read_claims
from alexnet_repro.results import MEASURES, counts, read_results

CLAIMS = read_claims()


def result(top1: float, seed: int = 0, ablation: str = "none", data: str = "ilsvrc2012", **more: Any) -> dict[str, Any]:
    views = {
        "centre": {"top1_error": top1 + 2, "top5_error": 20.0},
        "ten_crop": {"top1_error": top1, "top5_error": 18.0},
    }
    alike = {"net": "alexnet", "recipe": "as_run", "epochs": 90, "batch_size": 128, "lr": 0.01, "split": "val"}
    return {
        **alike,
        **views,
        "seed": seed,
        "ablation": ablation,
        "data": data,
        "file": "",
        "placement": "one_device",
        **more,
    }


def test_each_claim_says_what_where_and_of_which_kind() -> None:
    assert len(CLAIMS) >= 35
    for name, claim in CLAIMS.items():
        assert {"section", "says", "kind"} <= set(claim), name
        assert claim["kind"] in ("number", "difference", "ratio", "count", "picture", "quoted"), name
        assert claim["kind"] == "count" or {"data", "split", "protocol"} <= set(claim), name
        assert not ("ilsvrc" in claim.get("data", "") and "run" in claim) or claim["epochs"] == 90, name
        assert claim.get("value") or claim.get("direction") or name == "figure_4_left", name
        assert claim["kind"] == "count" or claim.get("measure") in MEASURES, name
        if "run" in claim and claim.get("value"):
            assert "within" in claim, name


def test_differences_are_those_of_the_2012_log() -> None:
    """The log's absolute errors, typed beside each claim, give the paper's difference up to its rounding."""
    seen = []
    for name, claim in CLAIMS.items():
        pairs = re.findall(
            r"\((\d\d\.\d\d) / (\d\d\.\d\d)\) against \S+(?: on 2012)? \((\d\d\.\d\d) / (\d\d\.\d\d)\)",
            claim.get("log", ""),
        )
        for one, five, base_one, base_five in pairs:
            seen.append(name)
            assert float(one) - float(base_one) == pytest.approx(claim["value"]["top1_error"], abs=0.051), name
            assert float(five) - float(base_five) == pytest.approx(claim["value"]["top5_error"], abs=0.051), name
    assert seen == ["one_gpu", "no_lrn", "non_overlapping_pooling"]


def test_errors_of_an_ablation_are_those_of_its_run_in_the_log() -> None:
    expected = {
        "no_lrn": (42.1, 19.4),
        "one_gpu": (39.2, 18.2),
        "non_overlapping_pooling": (41.1, 18.5),
        "one_cnn": (40.7, 18.2),
    }
    for name, (one, five) in expected.items():
        assert expected_errors(CLAIMS, name) == {"top1_error": one, "top5_error": five}
    for name in (
        "no_middle_layer",
        "no_colour_noise",
        "no_dropout",
        "ten_crops",
        "figure_1",
        "cifar10_lrn",
        "one_patch",
    ):
        assert expected_errors(CLAIMS, name) is None


def test_counts_are_those_of_the_layer_table() -> None:
    sizes = {"conv1": 290_400, "conv2": 186_624, "conv3": 64_896, "conv4": 64_896, "conv5": 43_264}
    assert counts()["neurons"] == sizes | {"fc6": 4096, "fc7": 4096, "fc8": 1000}
    assert counts()["neurons_in_all"] == {"all": 659_272}
    assert counts()["parameters"] == {"all": 60_965_224}
    assert counts()["parameters_of_one_gpu"]["share"] == pytest.approx(59_798_312 / 60_965_224)
    assert [round(share, 2) for share in counts()["share_of_each_convolution"].values()] == [
        0.06,
        0.50,
        1.45,
        1.09,
        0.73,
    ]
    verdicts = {name: verdict(claim, findings(claim, [])) for name, claim in CLAIMS.items() if claim["kind"] == "count"}
    slips = {name for name, word in verdicts.items() if word != "reproduced"}
    assert slips == {"neurons", "share_of_each_convolution", "crops"}
    assert all(CLAIMS[name]["note"] for name in slips)


@pytest.mark.parametrize(
    ("without", "word"),
    [
        ((42.1, 42.2, 41.9), "reproduced"),
        ((44.1, 44.2, 43.9), "right way, other size"),
        ((40.9, 40.4, 41.0), "within noise"),
        ((39.9, 39.8, 39.6), "other way"),
        ((42.1,), "within noise"),  # one seed
    ],
)
def test_a_difference_is_judged_by_its_interval(without: tuple[float, ...], word: str) -> None:
    whole = (40.7, 40.6, 40.8)
    results = [result(error, seed) for seed, error in enumerate(whole)]
    results += [result(error, seed, "no_lrn") for seed, error in enumerate(without)]
    (finding,) = findings(CLAIMS["no_lrn"], results)
    assert verdict(CLAIMS["no_lrn"], [finding]) == word
    changes = np.array(without) - np.array(whole[: len(without)])
    assert finding.values["top1_error"] == pytest.approx(changes.mean())
    if len(without) > 1:
        interval = ttest_1samp(changes, 0).confidence_interval(0.95)
        assert finding.intervals["top1_error"] == pytest.approx((interval.low, interval.high))
    else:
        assert not finding.intervals


def test_only_runs_that_are_alike_are_compared() -> None:
    base = result(40.7)
    for other in (
        {"epochs": 45},
        {"recipe": "paper"},
        {"options": ["optim.momentum=0.5"]},
        {"data": "folder"},
        {"seed": 1},
    ):
        assert findings(CLAIMS["no_lrn"], [base, {**result(42.1, ablation="no_lrn"), **other}]) == []
    assert len(findings(CLAIMS["no_lrn"], [base, result(42.1, ablation="no_lrn", hardware="other")])) == 1


def test_a_middle_layer_is_each_of_three() -> None:
    claim = CLAIMS["no_middle_layer"]
    results = [result(40.7), *(result(42.7, ablation=name) for name in ("no_conv3", "no_conv5"))]
    found = findings(claim, results)
    assert verdict(claim, found) == "not run"  # it is claimed of conv4, too
    assert {finding.alike["ablation"]: finding.values["top1_error"] for finding in found} == pytest.approx(
        {"no_conv3": 2.0, "no_conv5": 2.0}
    )


def test_the_worst_of_three_layers_decides() -> None:
    seeds = range(3)
    results = [result(40.7 + seed / 10, seed) for seed in seeds]
    for name, error in (("no_conv3", 42.7), ("no_conv4", 42.7), ("no_conv5", 40.0)):
        results += [result(error + seed / 20, seed, name) for seed in seeds]
    assert verdict(CLAIMS["no_middle_layer"], findings(CLAIMS["no_middle_layer"], results)) == "other way"


@pytest.mark.parametrize(
    "other", [{"epochs": 2}, {"options": ["net.lrn=false"]}, {"split": "test"}, {"data": "folder"}]
)
def test_what_is_not_the_claims_own_experiment_does_not_decide_it(other: dict[str, Any]) -> None:
    whole = [result(40.6, 7), result(42.1, 7, "no_lrn")]
    shorter = [result(error + seed / 10, seed, name, **other) if "data" not in other else result(error, seed, name, **other)
               for name, error in (("none", 40.7), ("no_lrn", 42.1)) for seed in range(3)]  # fmt: skip
    found = findings(CLAIMS["no_lrn"], whole + shorter)
    assert [finding.is_proxy for finding in found] == [False, True]
    assert found[0].seeds == [7]
    assert findings(CLAIMS["one_cnn"], shorter) == []


def test_other_data_are_proxies_and_never_a_number() -> None:
    results = [result(10 + seed / 10, seed, data="imagenette") for seed in range(3)]
    results += [result(12 + seed / 5, seed, "no_lrn", data="imagenette") for seed in range(3)]
    (finding,) = findings(CLAIMS["no_lrn"], results)
    assert finding.verdict == "proxy: agrees"
    assert verdict(CLAIMS["no_lrn"], [finding]) == "not run"
    assert findings(CLAIMS["one_cnn"], results) == []
    worse = [{**r, "ablation": {"none": "no_lrn", "no_lrn": "none"}[r["ablation"]]} for r in results]
    assert findings(CLAIMS["no_lrn"], worse)[0].verdict == "proxy: disagrees"


def test_a_number_is_judged_by_its_tolerance() -> None:
    for error, word in ((40.1, "reproduced"), (42.0, "other value"), (39.0, "other value")):
        assert verdict(CLAIMS["one_cnn"], findings(CLAIMS["one_cnn"], [result(error)])) == word
    (view,) = findings(CLAIMS["ten_crops"], [result(37.5, data="ilsvrc2010")])
    assert view.values == {"top1_error": 2.0, "top5_error": 2.0}


def test_a_mean_of_five_nets_is_that_of_table_2_and_no_single_net(tmp_path: Path) -> None:
    five = result(38.3, members=5, seeds=[0, 1, 2, 3, 4])
    for kind in ("centre", "ten_crop"):  # both are read, whichever comes first
        views = {key: five[key] for key in five if key != "ten_crop" or kind == "ten_crop"}
        (tmp_path / f"ensemble-5-abcdef-last-val-{kind}.json").write_text(json.dumps(views))
    assert len(read_results(tmp_path)) == 2
    assert len(read_results(*tmp_path.iterdir())) == 2
    assert verdict(CLAIMS["five_cnns"], findings(CLAIMS["five_cnns"], [five])) == "reproduced"
    assert findings(CLAIMS["one_cnn"], [five]) == []
    assert findings(CLAIMS["five_cnns"], [result(40.7), result(38.3, members=2)]) == []
    (row,) = (row for row in content([five])["rows"] if row["name"] == "five_cnns")
    assert (row["here"], row["where"]) == ("38.3 / 18.0", "ilsvrc2012, alexnet, as_run, 90 epochs, 5 nets")


def race(ablation: str, seed: int, lr: float, epochs: int, net: str = "four_layer") -> dict[str, Any]:
    """A run that reaches 25% after so many epochs."""
    history = [{"epoch": e, "train_error": 25.0 if e == epochs else 26.0 + epochs - e} for e in range(1, epochs + 1)]
    more = {
        "net": net,
        "lr": lr,
        "history": history,
        "epochs": epochs,
        "experiment": "figure_1",
        "recipe": "cuda_convnet",
    }
    return result(30, seed, ablation, "cifar10", **more)


def test_figure_1_takes_the_fastest_rate_of_each_side() -> None:
    results = [race("none", 0, 0.001, 20), race("tanh", 0, 0.01, 90)]  # slower rates than these:
    results += [race("none", seed, 0.003, 8 + seed) for seed in range(3)]
    results += [race("tanh", seed, 0.001, 48 + 6 * seed) for seed in range(3)]
    (finding,) = findings(CLAIMS["figure_1"], results)
    assert finding.values["epochs"] == pytest.approx(6)
    assert finding.verdict == "reproduced"
    assert {r["lr"] for r in finding.results} == {0.003, 0.001}
    results += [{**race("tanh", 7, 0.01, 90), "history": [{"epoch": 1, "train_error": 60.0}]}]  # never reached
    other = [race("none", 0, 0.003, 8, "locally_connected"), race("tanh", 0, 0.003, 16, "locally_connected")]
    assert [f.values["epochs"] for f in findings(CLAIMS["figure_1"], results + other)] == pytest.approx([6, 2])


def test_of_rates_with_as_many_epochs_the_one_with_the_lower_error_is_the_fastest() -> None:
    results = [race("tanh", 0, 0.01, 48), race("none", 0, 0.001, 8), race("none", 0, 0.003, 8)]
    results[-1]["history"][-1]["train_error"] = 23.4
    (finding,) = findings(CLAIMS["figure_1"], results)
    assert {r["lr"] for r in finding.results} == {0.01, 0.003}


def test_of_several_nets_the_worst_decides() -> None:
    results = [race("none", seed, 0.003, 8) for seed in range(3)]
    results += [race("tanh", seed, 0.01, 48 + seed) for seed in range(3)]
    claim = CLAIMS["figure_1"]
    assert verdict(claim, findings(claim, results)) == "reproduced"
    local = [race("none", seed, 0.003, 8, "locally_connected") for seed in range(3)]
    local += [race("tanh", seed, 0.01, 16 + seed, "locally_connected") for seed in range(3)]
    for result in local:
        result["experiment"] = "figure_1_local"
    for both in (results + local, local + results):
        found = findings(claim, both)
        assert {f.alike["net"]: f.verdict for f in found} == {
            "four_layer": "reproduced",
            "locally_connected": "right way, other size",
        }
        assert verdict(claim, found) == "right way, other size"
        page = content(both)
        (row,) = (row for row in page["rows"] if row["name"] == "figure_1")
        assert "locally_connected" in row["where"]
        (other,) = (row for row in page["others"] if row["name"] == "figure_1")
        assert "four_layer" in other["where"]
        assert other["verdict"] == "reproduced"
        assert other["where"] in others_table(page)
    one_seed = [r for r in local if r["seed"] == 0]
    assert verdict(claim, findings(claim, results + one_seed)) == "reproduced"  # shown, but it decides nothing
    assert "within noise" in others_table(content(results + one_seed))
    with_norm = [r | {"experiment": "figure_1"} for r in local if r["ablation"] == "tanh"]
    assert (
        findings(claim, [*with_norm, *(r for r in local if r["ablation"] == "none")]) == []
    )  # not the same experiment


def never(run: dict[str, Any]) -> dict[str, Any]:
    """The same run without reaching 25%."""
    return run | {"history": [epoch | {"train_error": 60.0} for epoch in run["history"]]}


def test_a_side_that_never_got_there_is_told() -> None:
    claim = CLAIMS["figure_1"]
    relu, tanh = ([race(name, seed, 0.01, 9) for seed in range(3)] for name in ("none", "tanh"))
    for results, word in (
        ([*map(never, relu), *tanh], "other way"),
        ([*relu, *map(never, tanh)], "within noise"),
        ([*map(never, relu), *map(never, tanh)], "within noise"),
        ([*relu[:2], never(relu[2]), *tanh], "other way"),
    ):
        (finding,) = findings(claim, results)
        assert finding.verdict == word
        (row,) = (row for row in content(results)["rows"] if row["name"] == "figure_1")
        assert (row["here"], row["interval"]) == ("never", "")


def test_of_two_recipes_the_worse_decides() -> None:
    good = [result(40.7, seed) for seed in range(2)]
    bad = [result(43.0, seed, recipe="paper") for seed in range(2)]
    for both in (good + bad, bad + good):
        assert verdict(CLAIMS["one_cnn"], findings(CLAIMS["one_cnn"], both)) == "other value"
    longer = [result(43.0, 9, epochs=93)]
    assert verdict(CLAIMS["one_cnn"], findings(CLAIMS["one_cnn"], longer + good)) == "reproduced"


def test_measures_of_a_result() -> None:
    history = [
        {"epoch": 1, "train_error": 40.0, "val_error": 45.0},
        {"epoch": 2, "train_error": 20.0, "val_error": 42.0},
    ]
    one = result(40, history=history, colour_content=[0.1, 0.7])
    one["retrieval"] = {"same_class": {"fc7": 80.0, "pixels": 30.0, "codes of fc7": 70.0, "codes of pixels": 25.0}}
    values = {name: measure(one) for name, measure in MEASURES.items()}
    assert values["training_error"] == {"train_error": 20.0}
    assert values["epochs_to_25"] == {"epochs": 2}
    assert values["specialisation"] == {"share": pytest.approx(0.6)}
    assert values["fc7_minus_pixels"] == {"points": 50.0}
    assert values["codes_minus_pixels"] == {"points": 45.0}
    for name in ("training_error", "epochs_to_25", "specialisation", "fc7_minus_pixels", "loading"):
        assert MEASURES[name](result(40)) is None


def test_results_are_read_once_and_damaged_ones_named(tmp_path: Path) -> None:
    one = {
        **result(40),
        "commit": "abc",
        "command": "python -m alexnet_repro.train -m +experiment=figure_1",
        "seconds": 1.5,
    }
    for folder in ("published", "runs/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "result.json").write_text(json.dumps(one))
    (read,) = read_results(tmp_path / "published", tmp_path / "runs")
    assert read["experiment"] == "figure_1"
    (tmp_path / "runs" / "a" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        read_results(tmp_path / "runs")
    del one["seed"]
    (tmp_path / "runs" / "a" / "result.json").write_text(json.dumps(one))
    with pytest.raises(UserError, match=r"result\.json lacks seed"):
        read_results(tmp_path / "runs")
