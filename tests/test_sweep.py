"""Test sweeps: one folder per job, one table at the end, and no repeat of finished jobs."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from alexnet_repro.composition import composed
from alexnet_repro.configs import CONF
from alexnet_repro.data.store import Store
from alexnet_repro.sweep import sweep_table
from alexnet_repro.training import plan
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
    assert result.parent.parent.name == "paper-folder-batch_size=6-store=small-epochs=1-net.lrn_n=5-optim.lr=0.0001"
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
    status, out, err = run_command(*line)
    assert (status, out) == (2, "")
    assert "is also the folder of job 0" in err
    assert not (cwd / "runs").exists() or not list(cwd.glob("runs/*/seed-0"))  # no job has started


def test_mistakes_of_all_jobs_are_told_once_before_the_first(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    line = ("train", "-m", *SMALL, f"data.store={tiny_store}", "+ablation=none,no_lrn,one_gpu", "seed=0,1,x")
    status, out, err = run_command(*line)
    assert (status, out) == (2, "")
    assert err.count("seed=x: this must be a whole number") == 1
    assert "in 3 of 9 jobs" in err
    status, out, err = run_command("train", "-m", "data=imagenette", "seed=0,1,2,3,4,5")
    assert (status, out) == (2, "")
    assert err.count("there is no store at stores/imagenette") == 1
    assert len(err.splitlines()) == 3
    assert not list(cwd.glob("runs/*/seed-*"))


def test_dry_run_of_a_sweep_says_what_it_would_do(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    options = (*SMALL, f"data.store={tiny_store}", "epochs=1", "keep_epochs=[1]")
    assert run_command("train", *options, "seed=1")[0] == 0
    status, out, err = run_command("train", "-m", *options, "seed=0,1,2", "dry_run=true")
    assert status == 0, err
    *jobs, total = out.splitlines()
    assert [job.rsplit(maxsplit=1)[0].strip() for job in jobs] == ["to do", "finished", "to do"]
    (done,) = cwd.glob("runs/*/seed-*")
    assert [job.split()[-1] for job in jobs] == [f"{done.parent.relative_to(cwd)}/seed-{seed}" for seed in range(3)]
    assert total.startswith("3 jobs, 2 to do: about ")
    weights = json.loads((done / "result.json").read_text())["parameters"]
    kept = sum(path.stat().st_size for path in (done / "checkpoints").iterdir())
    assert plan.checkpoint_bytes(composed("train", options), 2) >= 0.9 * (
        kept + 8 * weights
    )  # previous.ckpt is new later
    assert len(list(cwd.glob("runs/*/seed-*"))) == 1


def test_options_in_any_order_are_one_run(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    options = [*SMALL, f"data.store={tiny_store}", "optim.lr=0.001"]
    assert run_command("train", *options)[0] == 0
    (result,) = cwd.glob("runs/*/seed-0/result.json")
    for order in (options[::-1], sorted(options)):
        status, _, err = run_command("train", *order)
        assert (status, "holds a finished run" in err) == (2, True)
    # a folder whose name an earlier version wrote in the order of the command line
    name = result.parent.parent.name
    first, *rest = name.split("-")
    result.parent.parent.rename(cwd / "runs" / "-".join([first, *rest[::-1]]))
    status, _, err = run_command("train", *options)
    assert (status, "holds a finished run" in err) == (2, True)
    assert len(list(cwd.glob("runs/*"))) == 1


def test_m_may_stand_between_the_options(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    status, out, err = run_command(
        "train", *SMALL, "-m", f"data.store={tiny_store}", "epochs=1", "seed=0,1", "dry_run=true"
    )
    assert status == 0, err
    assert out.count("to do ") == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (("-m", "hydra/launcher=submitit_slurm", *SMALL), "there is no Slurm on this machine"),
        (("--cfg",), "--cfg needs a value, such as --cfg job"),
    ],
)
def test_what_hydra_tells_in_many_lines_is_told_in_two(
    line: tuple[str, ...], told: str, cwd: Path, tiny_store: Path
) -> None:
    line = (*line[:-1], f"data.store={tiny_store}", line[-1])
    environment = {**os.environ, "PATH": ""}  # without srun, if there is one
    run = [sys.executable, "-m", "alexnet_repro.train", *line]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", None])
def test_recorded_command_is_the_one_that_was_typed(launcher: str | None, cwd: Path, tiny_store: Path) -> None:
    line = ["-m", "alexnet_repro.train", *SMALL, f"data.store={tiny_store}", "epochs=1"]
    line += ["-m", "seed=0,1", f"hydra/launcher={launcher}"] if launcher else ["placement.replicas=2"]
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for result in cwd.glob("runs/*/*/result.json"):
        assert json.loads(result.read_text())["command"] == shlex.join(["python", *line])


@pytest.mark.slow
def test_train_returns_its_validation_error_to_a_sweeper(cwd: Path, tiny_store: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    line = [sys.executable, "-m", "alexnet_repro.train", "-m", *SMALL, f"data.store={tiny_store}", "epochs=1"]
    line += [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=minimize",
    ]
    done = subprocess.run([*line, "optim.lr=interval(0.0001,0.01)"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in cwd.glob("runs/*/*/result.json")]
    assert len(results) == 3
    (best,) = cwd.glob("runs/sweeps/*/optimization_results.yaml")
    found = OmegaConf.load(best)
    assert found.best_value == min(result["history"][-1]["val_error"] for result in results)


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
