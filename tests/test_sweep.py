"""Test sweeps: one folder per job, one table at the end, and no repeat of finished jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from alexnet_repro.configs import CONF
from alexnet_repro.data.store import Store
from alexnet_repro.sweep import sweep_table
from alexnet_repro.training.run_folder import open_run
from tests.conftest import SMALL, image_folder

Run = Callable[..., tuple[int, str, str]]
JOB = ("data=folder", "trainer=cpu", "epochs=1", "batch_size=6", "optim.lr=0.0001")


def test_sweep_writes_one_folder_per_job_and_ends_with_a_table(cwd: Path, small_store: Path, run_command: Run) -> None:
    line = ("train", "-m", *JOB, f"data.store={small_store}", "net.lrn_n=4,5")
    status, out, err = run_command(*line)
    assert status == 2  # one of the two jobs fails
    assert "must be odd" in err
    (result,) = cwd.glob("runs/*/seed-0/result.json")
    assert result.parent.parent.name.startswith("paper-folder-epochs=1-batch_size=6-optim.lr=0.0001-")
    assert result.parent.parent.name.endswith("-net.lrn_n=5")
    table = out[out.index("errors, %") :].splitlines()
    assert table[1].split()[:3] == ["net.lrn_n=4", "the", "window"]
    errors = json.loads(result.read_text())
    expected = [f"{errors[view][key]:.1f}" for view in ("centre", "ten_crop") for key in ("top1_error", "top5_error")]
    assert table[2].split() == ["net.lrn_n=5", *expected]

    made = result.stat().st_mtime_ns
    status, out, _ = run_command(*line)
    assert "is finished already" in out
    assert result.stat().st_mtime_ns == made


def test_sweep_skips_a_job_that_another_process_does(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    options = (*SMALL, "epochs=1", f"data.store={tiny_store}")
    with initialize_config_dir(CONF, version_base="1.3"):
        lock = open_run(cwd / "busy", compose("train", [*options]), Store(tiny_store))
    status, out, err = run_command("train", "-m", *options, "resume=true", "run=busy,free")
    assert status == 0, err
    assert "skipped: busy is in use by process" in out
    assert "another process does them" in out
    assert (cwd / "free" / "result.json").exists()
    assert not (cwd / "busy" / "result.json").exists()
    lock.release()
    status, out, err = run_command("train", "-m", *options, "resume=true", "run=busy,free")
    assert status == 0, err
    assert "free is finished already" in out
    assert (cwd / "busy" / "result.json").exists()


def test_table_shows_the_overrides_that_differ() -> None:
    result = {"centre": {"top1_error": 41.25, "top5_error": 19.5}, "ten_crop": {"top1_error": 39.0, "top5_error": 18.0}}
    outcomes = [
        {"overrides": ["data=x", "+ablation=none"], "result": result},
        {"overrides": ["data=x", "+ablation=tanh"], "error": "the loss is nan"},
        {"overrides": ["data=x", "+ablation=no_lrn"], "result": {"centre": result["centre"]}},
    ]
    lines = sweep_table(outcomes).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["+ablation=none", "41.2", "19.5", "39.0", "18.0"],
        ["+ablation=tanh", "the", "loss", "is", "nan"],
        ["+ablation=no_lrn", "41.2", "19.5", "-", "-"],
    ]


def test_every_command_can_be_swept(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "source", train=2, val=1)
    line = ("prepare", "-m", "data=folder", "source=source", "data.image_size=32", "data.store=one,two,source")
    status, out, _ = run_command(*line)
    table = [row.split() for row in out[out.rindex("  data.store=one") :].splitlines()]
    assert table[:2] == [["data.store=one", "done"], ["data.store=two", "done"]]
    assert table[2][:2] == ["data.store=source", "source"]
    assert (status, len(Store("two").split("train"))) == (2, 4)


def test_folder_of_a_sweep_can_be_used_again(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    line = ("train", "-m", *SMALL, "epochs=1", f"data.store={tiny_store}", "hydra.sweep.dir=sweep")
    for seeds in ("seed=0,1", "seed=1"):
        status, out, err = run_command(*line, seeds)
        assert status == 0, err
    assert "1 job; this table's numbers are in sweep" in out


def test_options_that_change_no_result_are_not_shown_as_two_runs(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    line = ("train", "-m", *SMALL, "epochs=1", f"data.store={tiny_store}", "keep_epochs=[],[1]")
    for _ in range(2):  # the second time, job 0 is finished already
        status, out, err = run_command(*line)
        assert (status, "is also the folder of job 0" in err) == (2, True), err
        assert out.count("is also the folder of job 0") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_jobs_run_in_parallel(launcher: str, cwd: Path, small_store: Path) -> None:
    line = [sys.executable, "-m", "alexnet_repro.train", "-m", *JOB, f"data.store={small_store}", "seed=0,1"]
    done = subprocess.run([*line, f"hydra/launcher={launcher}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(cwd.glob("runs/*/seed-?/result.json"))) == 2
    table = done.stdout[done.stdout.index("errors, %") :].splitlines()
    assert [row.split()[0] for row in table[1:3]] == ["seed=0", "seed=1"]


@pytest.mark.slow
def test_ctrl_c_ends_jobs_that_run_in_parallel(cwd: Path, small_store: Path) -> None:
    line = [sys.executable, "-m", "alexnet_repro.train", "-m", *JOB, f"data.store={small_store}", "seed=0,1"]
    line += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "epochs=500"]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        for _ in range(1200):
            time.sleep(0.05)
            if list(cwd.glob("runs/*/seed-?/checkpoints/last.ckpt")):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "add resume=true" in err
    assert "Traceback" not in err
