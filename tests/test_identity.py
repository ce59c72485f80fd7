"""Test that a run keeps what belongs to it and takes nothing else: checkpoints, weights, metrics, versions, configs."""

import csv
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from alexnet_repro.composition import composed
from alexnet_repro.errors import Interrupted
from alexnet_repro.training import saving
from alexnet_repro.training.run import train
from alexnet_repro.training.watch import Watchman
from tests.conftest import SMALL, image_folder

Run = Callable[..., tuple[int, str, str]]


def test_checkpoint_of_another_experiment_is_refused(tiny_store: Path, cwd: Path, run_command: Run) -> None:
    """Same shapes and seed, but another learning rate, another augmentation, or other images."""
    options = (*SMALL, f"data.store={tiny_store}", "stop_at=99")  # stops after the first of two epochs
    prepare = ("prepare", "data=folder", "source=other", "data.image_size=32", "data.store=other-store")
    image_folder(cwd / "other", train=7)
    assert run_command(*prepare)[0] == 0
    others = {
        "lr": ("its optim.lr is 0.002", (*options, "optim.lr=0.002")),
        "mirror": ("its augment.mirror is False", (*options, "augment.mirror=false")),
        "images": ("it was trained on other images", (*SMALL, "data.store=other-store", "stop_at=99")),
    }
    for name, (told, line) in others.items():
        assert run_command("train", *line, f"run={name}")[0] == 0
        assert run_command("train", *options, f"run=own-{name}")[0] == 0
        (cwd / f"own-{name}/result.json").unlink()
        shutil.copy(cwd / name / "checkpoints/last.ckpt", cwd / f"own-{name}/checkpoints/last.ckpt")
        status, _, err = run_command("train", *options, f"run=own-{name}", "resume=true")
        assert (status, "is not a checkpoint of this run" in err, told in err) == (2, True, True), err


def test_weights_without_a_checkpoint_to_resume_are_kept(tiny_store: Path, cwd: Path, run_command: Run) -> None:
    options = (*SMALL, f"data.store={tiny_store}", "run=mine", "keep_epochs=[1]", "recipe=cuda_convnet")
    assert run_command("train", *options)[0] == 0
    for name in ("result.json", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"):
        (cwd / "mine" / name).unlink()
    before = {path.name: path.read_bytes() for path in (cwd / "mine/checkpoints").iterdir()}
    assert set(before) == {"best.ckpt", "epoch-1.ckpt"}
    for other in ("seed=1", "optim.lr=1e20", "resume=true"):
        status, _, err = run_command("train", *options, other)
        assert (status, "holds the weights best, epoch-1 of a run" in err) == (2, True), err
    assert {path.name: path.read_bytes() for path in (cwd / "mine/checkpoints").iterdir()} == before


def test_finished_run_is_said_to_be_finished_with_resume(tiny_store: Path, cwd: Path, run_command: Run) -> None:
    options = (*SMALL, f"data.store={tiny_store}", "run=mine")
    assert run_command("train", *options)[0] == 0
    status, out, err = run_command("train", *options, "resume=true")
    assert (status, out) == (0, "mine is finished already\n"), err


def test_stop_at_a_logged_update_keeps_its_row_of_metrics(
    tiny_store: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the tenth update, whose loss metrics.csv logs."""
    options = [*SMALL, f"data.store={tiny_store}", "batch_size=1"]
    train(composed("train", [*options, "run=whole"]))
    stopping = composed("train", [*options, "run=stopped"])

    def interrupt(callback: Watchman, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Watchman, "on_train_batch_end", interrupt)
        with pytest.raises(Interrupted):
            train(stopping)
    stopping.resume = True
    train(stopping)
    whole, stopped = (list(csv.DictReader((cwd / run / "metrics.csv").open())) for run in ("whole", "stopped"))
    assert len([row for row in whole if row["train/loss"]]) >= 2
    assert [row for row in stopped if row["train/loss"]] == [row for row in whole if row["train/loss"]]
    assert stopped == whole


def test_result_names_the_versions_of_a_resumed_run(
    tiny_store: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = composed("train", [*SMALL, f"data.store={tiny_store}", "run=mine", "stop_at=99"])
    assert len(train(cfg)["trained_with"]) == 1
    (cwd / "mine/result.json").unlink()
    monkeypatch.setattr(saving, "versions", lambda: "alexnet_repro 9")
    cfg.resume, cfg.stop_at = True, None
    config = cwd / "mine/config.yaml"
    config.write_text(config.read_text().replace("stop_at: 99", "stop_at: null"))
    result = train(cfg)
    assert result["trained_with"][1:] == ["alexnet_repro 9"]
    assert result["trained_with"][0].startswith("alexnet_repro 0.1.0 (")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("recipe: ${oc.env:WANDB_API_KEY}", "interpolation"),
        ("data: &a {x: 1}\nnet: *a\n", "alias"),
        ("data: {name: '" + 2_000_000 * "x" + "'}", "bytes"),
    ],
)
def test_config_of_a_strangers_run_is_only_data(
    content: str, told: str, trained: Path, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-0123456789")
    shutil.copytree(trained, cwd / "theirs")
    config = cwd / "theirs/config.yaml"
    config.write_text(
        content if told != "interpolation" else re.sub("^recipe: .*", content, config.read_text(), flags=re.M)
    )
    for command in ("evaluate", "export", "report"):
        arguments = ["runs=theirs"] if command == "report" else ["run=theirs"]
        status, out, err = run_command(command, *arguments)
        assert (command, status, told in err) in ((command, 2, True), ("report", 0, False)), err
        assert "secret" not in out + err
    assert not [path for path in cwd.rglob("*.*") if b"secret-0123" in path.read_bytes()]


def test_checkpoint_does_not_choose_what_code_runs(trained: Path, cwd: Path, run_command: Run) -> None:
    """Lightning 2.6.0 calls the function that ``_instantiator`` names."""
    shutil.copytree(trained, cwd / "theirs")
    (cwd / "evil.py").write_text("from pathlib import Path\ndef build(*a, **k):\n    Path('ran').touch()\n")
    path = cwd / "theirs/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_instantiator"] = "evil.build"
    torch.save(checkpoint, path)
    status, _, err = run_command("evaluate", "run=theirs")
    assert status == 0, err
    assert not (cwd / "ran").exists()
