"""Test what a run copies from another run, what it refuses, and its learning rates."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from hydra import compose, initialize_config_dir

from alexnet_repro.configs import CONF
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.training.checkpoints import load_checkpoint
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.optim import PaperSGD, parameter_groups
from alexnet_repro.training.schedule import ByHand
from alexnet_repro.training.transfer import start_from_pretrained

Run = Callable[..., tuple[int, str, str]]


def weights(run: Path) -> dict[str, Any]:
    return load_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]


def test_layers_are_copied_and_the_output_is_new(finished: Path, tiny_store: Path, cwd: Path, run_command: Run) -> None:
    options = ("train", *SMALL, f"data.store={tiny_store}", "seed=5")
    status, out, err = run_command(
        *options, f"pretrained.run={finished}", "run=new", "pretrained.rate=0", "pretrained.conv1_rate=0"
    )
    assert status == 0, err
    assert f"from {finished}: conv1, conv2, conv3; new: fc10" in out
    before, after = weights(finished), weights(cwd / "new")
    for name in ("conv1", "conv2", "conv3"):  # frozen, so they are as they were
        assert torch.equal(before[f"net.{name}.weight"], after[f"net.{name}.weight"])
    assert not torch.equal(before["net.fc10.weight"], after["net.fc10.weight"])
    result = json.loads((cwd / "new/result.json").read_text())
    assert result["pretrained"]["layers"] == ["conv1", "conv2", "conv3"]
    assert result["pretrained"]["rate"] == 0


def test_chosen_layers_train_slower_and_the_run_resumes_without_its_source(
    finished: Path, tiny_store: Path, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, "source")
    line = ("train", *SMALL, f"data.store={tiny_store}", "pretrained.run=source", "pretrained.layers=[conv1,conv2]")
    assert run_command(*line, "run=whole")[0] == 0
    assert run_command(*line, "run=parts", "epochs=1")[0] == 0
    groups = load_checkpoint(cwd / "whole/checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx({
        "weights": 0.001, "biases": 0.002, "copied_weights": 1e-4, "copied_biases": 0.002,
        "conv1_weights": 1e-5, "conv1_biases": 0.002,
    })  # fmt: skip
    (cwd / "parts/result.json").unlink()
    shutil.rmtree("source")
    config = cwd / "parts/config.yaml"  # as if the run had been stopped after the first of two epochs
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 2\n"))
    checkpoint = torch.load(cwd / "parts/checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["epochs"] = 2
    torch.save(checkpoint, cwd / "parts/checkpoints/last.ckpt")
    status, _, err = run_command(*line, "run=parts", "resume=true")
    assert status == 0, err
    one, other = weights(cwd / "whole"), weights(cwd / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["pretrained.run=nowhere"], "pretrained.run=nowhere holds no finished run"),
        (["+experiment=one_cnn_pretrained"], "+experiment=one_cnn_pretrained has several steps"),
        (["pretrained.rate=0.5"], "pretrained.rate=0.5 has no effect with pretrained.run=null"),
        (["pretrained.run={run}", "pretrained.layers=[conv9]"], "this net has no layer conv9"),
        (["pretrained.run={run}", "net.activation=tanh"], "was trained with net.activation=relu, this net has tanh"),
        (["pretrained.run={run}", "net=locally_connected"], "net.name=four_layer, this net has locally_connected"),
        (["pretrained.run={run}", "pretrained.checkpoint=worst"], "last, previous, best or epoch-N"),
    ],
)
def test_mismatches_are_refused(
    options: list[str], problem: str, finished: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    options = [option.format(run=finished) for option in options]
    status, _, err = run_command("train", *SMALL, f"data.store={tiny_store}", "run=r", *options)
    assert status == 2
    assert problem in err
    assert "Traceback" not in err
    assert not (cwd / "r").exists()


OPTIM = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "bias_rate": 1, "bias_decay": False}


def alexnet(**options: Any) -> Classifier:
    augment = {"crop": 224, "mean": "patch", "colour_unit": "eigenvalue"}
    schedule = {"rule": "constant", "by_hand": {"of_epochs": 1}}
    net = {"name": "alexnet", "classes": 3, **options}
    return Classifier(None, net, OPTIM, schedule, augment, 1, 256, ["a", "b", "c"], 0)


def test_sixth_layer_is_new_in_a_net_that_starts_from_one_without(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    source, model = alexnet(), alexnet(conv6=True, bottleneck=8)
    monkeypatch.setattr("alexnet_repro.training.transfer.load_run", lambda run, checkpoint: (source, None))
    (cwd / "first").mkdir()
    (cwd / "first/result.json").touch()
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["pretrained.run=first"])
    start_from_pretrained(cfg, model, Path("nowhere"))
    assert (
        "from first: conv1, conv2, conv3, conv4, conv5, fc6, fc7; new: conv6, bottleneck, fc8"
        in capsys.readouterr().out
    )
    for name, value in source.net.state_dict().items():
        if name.endswith("weight"):  # biases are alike anyway
            assert torch.equal(model.net.state_dict()[name], value) == (not name.startswith("fc8")), name


# Rates of weights by epoch as the comments of the log's parameter files give them: new layers, copied ones, conv1.
STEPS_OF_RUN_146 = {
    "log_2_fall2009": {0: (0.01, 0.001, 0.001), 1: (0.01, 0.001, 0.001), 2: (0.001, 0.001, 0.001), 6: (0.001, 0.001, 0.001)},
    "log_3_fall2011": {0: (0.01, 0.001, 0.001), 5: (0.01, 0.001, 0.001), 6: (0.001, 0.001, 0.001), 7: (0.001, 0.001, 0.001)},
    "log_4_ilsvrc2012": {
        0: (0.01, 0.001, 0.0001), 4: (0.01, 0.001, 0.0001), 5: (0.01, 0.001, 0.00001), 6: (0.01, 0.001, 0.00001),
        7: (0.01, 0.001, 0), 8: (0.01, 0.001, 0), 9: (0.001, 0.001, 0), 21: (0.001, 0.001, 0), 22: (0.0001, 0.0001, 0),
        41: (0.0001, 0.0001, 0), 42: (0.00001, 0.00001, 0), 53: (0.00001, 0.00001, 0),
    },
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS_OF_RUN_146)
def test_rates_of_run_146_are_those_of_the_2012_log(step: str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["+experiment=one_cnn_pretrained_as_run", f"+pretraining={step}"])
    by_hand = cfg.schedule.by_hand
    layers = cfg.pretrained.layers or [f"conv{i}" for i in range(1, 7)] + ["fc6", "fc7"]
    copied = {"layers": list(layers), "rate": cfg.pretrained.rate, "conv1_rate": cfg.pretrained.conv1_rate}
    net = AlexNet(10, conv6=True, bottleneck=cfg.net.bottleneck)
    optimizer = PaperSGD(parameter_groups(net, cfg.optim.lr, 0.0005, cfg.optim.bias_rate, False, copied=copied))
    changes = {name: dict(at) for name, at in by_hand.changes.items()}
    hand = ByHand(optimizer, cfg.epochs, by_hand.of_epochs, changes, lr=cfg.optim.lr, copied=copied)
    assert cfg.schedule.rule == "by_hand"
    for epoch in range(cfg.epochs):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        if epoch in STEPS_OF_RUN_146[step]:
            own = tuple(rates[f"{layers}weights"] for layers in ("", "copied_", "conv1_"))
            assert own == pytest.approx(STEPS_OF_RUN_146[step][epoch]), epoch
        # epsB in the files: 0.02 for all layers, 0.00 for conv1 where it was frozen
        biases = tuple(rates[f"{layers}biases"] for layers in ("", "copied_", "conv1_"))
        frozen = step == "log_4_ilsvrc2012" and epoch >= 7
        assert biases == pytest.approx((0.02, 0.02, 0 if frozen else 0.02)), epoch
        hand.after_epoch(50)
    assert epoch == max(STEPS_OF_RUN_146[step])
    assert by_hand.of_epochs == cfg.epochs
    assert by_hand.colour_noise_epochs == (38 if step == "log_4_ilsvrc2012" else None)


def test_copied_layers_never_train_faster_than_their_share() -> None:
    """A schedule with rates for conv1 of its own, a copied conv1, and no new layer but the output."""
    changes = {"weights": {1: 0.1, 3: 0.01}, "conv1_weights": {2: 0.1}, "conv1_biases": {4: 0}}
    copied = {"layers": ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"], "rate": 0.1, "conv1_rate": 0.0}
    optimizer = PaperSGD(parameter_groups(AlexNet(10), 0.01, 0.0005, 2, False, copied=copied))
    hand = ByHand(optimizer, 5, 5, changes, lr=0.01, copied=copied)
    for epoch in range(5):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["conv1_weights"] == rates["conv1_biases"] == 0  # frozen all the time
        assert rates["copied_weights"] == pytest.approx(rates["weights"] / 10), epoch
        hand.after_epoch(50)


def test_net_without_new_layers_follows_the_schedule() -> None:
    net = AlexNet(10)
    layers = [f"conv{i}" for i in range(1, 6)] + ["fc6", "fc7", "fc8"]
    copied = {"layers": layers, "rate": 0.5, "conv1_rate": 1.0}
    optimizer = PaperSGD(parameter_groups(net, 0.01, 0.0005, 2, False, copied=copied))
    hand = ByHand(optimizer, 2, 2, {"weights": {1: 0.1}}, lr=0.01, copied=copied)
    hand.after_epoch(50)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({
        "copied_weights": 0.0005, "copied_biases": 0.02, "conv1_weights": 0.001, "conv1_biases": 0.02,
    })  # fmt: skip


CHAINS = {
    "one_cnn_pretrained": ["fall2011", "fine_tuned"],
    "one_cnn_pretrained_as_run": ["log_1_ilsvrc2012", "log_2_fall2009", "log_3_fall2011", "log_4_ilsvrc2012"],
}


@pytest.mark.parametrize("experiment", CHAINS)
def test_each_step_starts_from_the_one_before(experiment: str, cwd: Path, run_command: Run) -> None:
    before = None
    for step in CHAINS[experiment]:
        options = [f"+experiment={experiment}", f"+pretraining={step}", "seed=3"]
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("train", options)
        assert cfg.pretrained.run == before
        before = cfg.run
        assert cfg.recipe == ("as_run" if experiment.endswith("as_run") else "paper")
        assert cfg.claim == (
            "one_cnn_pretrained" if step == CHAINS[experiment][-1] else cfg.data.get("claim", "one_cnn")
        )
        status, _, err = run_command("train", *options)  # every option is valid; only the images are missing
        assert (status, err.splitlines()[0]) == (2, f"error: there is no store at stores/{cfg.data.name}")
    with initialize_config_dir(CONF, version_base="1.3", job_name="sweep"):
        steps = compose("train", [f"+experiment={experiment}"], return_hydra_config=True).hydra.sweeper.params
    assert steps["+pretraining"].split(",") == CHAINS[experiment]
