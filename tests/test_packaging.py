"""Test that the configs are found from a wheel, from a checkout and from any folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def composed(folder: Path, **environment: str) -> str:
    line = [sys.executable, "-m", "alexnet_repro.train", "+ablation=no_lrn", "--cfg", "job"]
    done = subprocess.run(
        line, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_configs_are_found_from_any_folder(cwd: Path) -> None:
    assert "no_lrn: no_lrn" in composed(cwd)


@pytest.mark.slow
def test_wheel_contains_the_configs_and_the_claims(cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--outdir", cwd / "dist", ROOT], check=True, capture_output=True)
    (wheel,) = (cwd / "dist").glob("*.whl")  # built from the sdist, so this also tests the sdist
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(cwd / "installed")
    path = cwd / "installed"
    for name in ("claims/paper.yaml", "net/lrn_cpu.c", "page/report.html.jinja", "page/report.md.jinja"):
        assert (path / "alexnet_repro" / name).is_file()
    where = [sys.executable, "-c", "import alexnet_repro.configs as c; print(c.CONF)"]
    conf = subprocess.run(
        where, env={**os.environ, "PYTHONPATH": str(path)}, cwd=cwd, capture_output=True, text=True, check=True
    )
    assert conf.stdout.strip() == str(path / "alexnet_repro/conf")
    assert composed(cwd, PYTHONPATH=str(path)) == composed(cwd)

    (cwd / "empty").mkdir()
    (cwd / "mine/callbacks").mkdir(parents=True)
    stop = "stop:\n  _target_: lightning.pytorch.callbacks.EarlyStopping\n  monitor: val/top1_error\n  stopping_threshold: 101\n"
    (cwd / "mine/callbacks/stop.yaml").write_text(stop)
    line = [
        sys.executable,
        "-m",
        "alexnet_repro.train",
        "--config-dir",
        "../mine",
        "callbacks=[stop,lr_monitor]",
        "epochs=5",
    ]
    line += [
        "net.width=0.25",
        "data.train_per_class=2",
        "data.val_per_class=1",
        "trainer=cpu",
        "trainer.gradient_clip_val=9",
    ]
    line += ["logger=[tensorboard,csv]"]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(line, cwd=cwd / "empty", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = (cwd / "empty").glob("runs/*/seed-0/result.json")
    assert json.loads(result.read_text())["epochs"] == 1
    assert list(result.parent.glob("tensorboard/events.*"))
