"""Test that runs are not lost, mixed up or overwritten: locks, identity, damaged checkpoints, full disks."""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from filelock import SoftFileLease
from hydra import compose, initialize_config_dir

from alexnet_repro.configs import CONF
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.provenance import hardware
from alexnet_repro.training import launcher, saving
from alexnet_repro.training.checkpoints import OneFile
from alexnet_repro.training.run_folder import LONGEST_NAME, run_name, wait_for
from alexnet_repro.training.run_lock import LEASE

Run = Callable[..., tuple[int, str, str]]


def resume(run: Path, store: Path, command: Run, *options: str) -> tuple[int, str, str]:
    first = [*SMALL, f"data.store={store}", f"run={run}", "resume=true"]
    return command("train", *first, *options)


def copied(stopped: Path, to: Path) -> Path:
    shutil.copytree(stopped, to)
    return to


def test_run_resumes_where_its_folder_and_its_store_were_moved_to(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_store, cwd / "fast disk")
    run = copied(stopped, cwd / "my run, ünï = 1")
    monkeypatch.setattr(saving, "hardware", lambda *_: "1 x NVIDIA H200")
    status, out, err = resume(run, cwd / "fast disk", run_command, "trainer.workers=1")
    assert status == 0, err
    assert "resuming" in out
    assert "dirpath" not in err
    result = json.loads((run / "result.json").read_text())
    assert len(result["history"]) == 2
    assert result["hardware"] == f"{hardware(torch.device('cpu'))}, then 1 x NVIDIA H200"
    assert not (run / "lock").exists()
    states = [
        next(
            state for key, state in torch.load(path, weights_only=True)["callbacks"].items() if "ModelCheckpoint" in key
        )
        for path in (stopped / "checkpoints/last.ckpt", run / "checkpoints/last.ckpt")
    ]
    assert states[0]["best_model_score"] >= states[1]["best_model_score"]  # not forgotten
    assert states[1]["best_model_path"] == str(run / "checkpoints/best.ckpt")


def test_resuming_with_other_images_or_options_says_what_differs(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    run = copied(stopped, cwd / "r")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shutil.copytree(tiny_store, "other")
    manifest = json.loads(Path("other/manifest.json").read_text())
    del manifest["checksum"]
    Path("other/manifest.json").write_text(json.dumps({**manifest, "source": "elsewhere"}))
    assert resume(copied(stopped, cwd / "moved"), Path("other"), run_command)[0] == 0  # the same images
    manifest["sha256"]["train/00000.npy"] = 64 * "0"
    Path("other/manifest.json").write_text(json.dumps(manifest))
    status, _, err = resume(run, Path("other"), run_command)
    assert status == 2
    assert "are not those that r was trained on" in err.replace(str(cwd) + "/", "")
    status, _, err = resume(run, tiny_store, run_command, "optim.lr=0.02")
    assert status == 2
    assert "optim.lr=0.02 (was 0.001)" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_option_that_is_newer_than_the_run_does_not_forbid_resuming(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    run = copied(stopped, cwd / "r")
    config = (run / "config.yaml").read_text()
    assert "same_map_norm" in config
    lines = [line for line in config.splitlines() if "same_map_norm" not in line and "images_sha256" not in line]
    (run / "config.yaml").write_text("\n".join([*lines, "store_sha256: of another manifest"]))  # of version 0.1
    status, _, err = resume(run, tiny_store, run_command)
    assert (status, "are not those that" in err) == (2, True), err
    (run / "config.yaml").write_text("\n".join([*lines, f"store_sha256: {Store(tiny_store).manifest_sha256}"]))
    status, _, err = resume(run, tiny_store, run_command, "net.same_map_norm=true")
    assert status == 2
    assert "net.same_map_norm=True (was None)" in err
    assert resume(run, tiny_store, run_command)[0] == 0


def test_long_damage_in_metrics_does_not_forbid_resuming(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    run = copied(stopped, cwd / "r")
    before = (run / "metrics.csv").read_text().splitlines()
    with (run / "metrics.csv").open("a") as file:
        file.write("x" * 200_000)
    status, _, err = resume(run, tiny_store, run_command)
    assert status == 0, err
    assert len((run / "metrics.csv").read_text().splitlines()) > len(before)
    assert "xx" not in (run / "metrics.csv").read_text()


def test_resumed_run_that_had_reached_stop_at_is_only_measured(tiny_store: Path, cwd: Path, run_command: Run) -> None:
    line = ("train", *SMALL, f"data.store={tiny_store}", "run=r", "epochs=5", "stop_at=99.5")
    assert run_command(*line)[0] == 0
    before = json.loads(Path("r/result.json").read_text())
    assert before["epochs"] < 5
    weights = torch.load("r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    Path("r/result.json").unlink()  # as if it had been interrupted while it was measured
    status, _, err = run_command(*line, "resume=true")
    assert status == 0, err
    after = json.loads(Path("r/result.json").read_text())
    assert (after["epochs"], after["history"], after["centre"]) == (
        before["epochs"],
        before["history"],
        before["centre"],
    )
    again = torch.load("r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_run_in_use_is_refused_and_a_dead_process_loses_its_lock(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    run = copied(stopped, cwd / "r")
    holder = f"""
import time
from filelock import SoftFileLease
lock = SoftFileLease({str(run / "lock")!r}, lease_duration={LEASE}); lock.acquire(); print("held", flush=True); time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    status, _, err = resume(run, tiny_store, run_command)
    assert status == 2
    assert f"is in use by process {process.pid} on " in err
    process.kill()
    process.wait()
    assert (run / "lock").exists()
    status, _, err = run_command("train", *SMALL, f"data.store={tiny_store}", f"run={run}")  # without resume=true
    assert (status, "holds an unfinished run\n" in err) == (2, True), err
    assert resume(run, tiny_store, run_command)[0] == 0


def test_lock_that_its_process_never_wrote_expires(cwd: Path) -> None:
    """A process was killed, or the disk was full, between the creation of the lock and its content."""
    from alexnet_repro.training import run_lock

    Path("lock").touch()
    os.utime("lock", (time.time() - 60, time.time() - 60))
    run_lock.locked(Path()).release()
    assert not Path("lock").exists()


def test_lock_of_a_lost_machine_expires(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alexnet_repro.training import run_lock

    monkeypatch.setattr(run_lock, "LEASE", 2.0)
    lock = SoftFileLease("lock", lease_duration=2.0)
    lock.acquire()
    content = Path("lock").read_text()
    lock.release()
    text = "\n".join("host=elsewhere" if line.startswith("host=") else line for line in content.splitlines())
    Path("lock").write_text(text + "\n")
    start = time.monotonic()
    taken = run_lock.locked(Path())
    assert 1.5 < time.monotonic() - start < 15
    taken.release()


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"MASTER_ADDR": "localhost"}, "but not LOCAL_RANK, MASTER_PORT"),
        ({"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "MASTER_PORT=99999, above 65535"),
    ],
)
def test_environment_that_is_not_torchruns_is_refused(
    environment: dict[str, str],
    problem: str,
    tiny_store: Path,
    cwd: Path,
    run_command: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    status, _, err = run_command("train", *SMALL, f"data.store={tiny_store}", "trainer.devices=2", "run=r")
    assert (status, problem in err) == (2, True), err
    assert not Path("r").exists()


def test_finished_run_is_never_overwritten_whatever_the_environment_says(
    finished: Path, tiny_store: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    options = [*SMALL, f"data.store={tiny_store}", f"run={finished}"]
    environments: list[tuple[dict[str, str], str]] = [
        ({}, "holds a finished run"),
        ({"RANK": "1"}, "holds a finished run"),
        ({"SLURM_PROCID": "2"}, "holds a finished run"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2", "SLURM_NODELIST": "n1"}, "4 processes are"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "4 processes are running"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, "holds a finished run"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "2 processes are running"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, "RANK=abc"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "only 2 processes"),
        ({"SLURM_PROCID": "-1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=-1"),
    ]
    for environment, problem in environments:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            status, _, err = run_command("train", *options)
        assert status == 2, environment
        assert problem in err, environment
        assert "Traceback" not in err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def damaged(path: Path, kind: str) -> None:
    content: Any = torch.load(path, weights_only=True)
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped byte":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "b")
    else:
        edits: dict[str, Any] = {
            "state_dict": content["state_dict"],
            "tensor": torch.zeros(3),
            "list": [1, 2],
            "nothing": {},
            "nan": {
                **content,
                "state_dict": {
                    k: v * float("nan") if v.is_floating_point() else v for k, v in content["state_dict"].items()
                },
            },
            "other shapes": {
                **content,
                "state_dict": {**content["state_dict"], "net.fc10.weight": torch.zeros(3, 1024)},
            },
            "other names": {**content, "state_dict": {"x" + k: v for k, v in content["state_dict"].items()}},
            "format": {**content, "alexnet_repro": {"format": 99}},
            "other seed": {**content, "hyper_parameters": {**content["hyper_parameters"], "seed": 99}},
            **{f"no {key}": {k: v for k, v in content.items() if k != key} for key in content},
        }
        torch.save(edits[kind], path)


KINDS = {
    "cut": "is damaged",
    "empty": "the file is empty",
    "flipped byte": "the checksum of its part",
    "text": "is damaged",
    "another zip": "is not a checkpoint of alexnet_repro",
    "state_dict": "is not a checkpoint of alexnet_repro",
    "tensor": "is not a checkpoint of alexnet_repro",
    "list": "is not a checkpoint of alexnet_repro",
    "nothing": "is not a checkpoint of alexnet_repro",
    "nan": "not finite",
    "other shapes": "has shape (3, 1024)",
    "other names": "has shape None",
    "format": "format 99",
    "other seed": "its seed is 99",
    "no state_dict": "it has no state_dict",
    "no global_step": "it has no global_step",
    "no optimizer_states": "it has no optimizer_states",
    "no hyper_parameters": "it has no hyper_parameters",
    "no loops": "it has no loops",
}


def test_damaged_checkpoints_are_named_and_never_overwritten(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    run = copied(stopped, cwd / "r")
    path = run / "checkpoints/last.ckpt"
    whole = path.read_bytes()
    for kind, problem in KINDS.items():
        path.write_bytes(whole)
        damaged(path, kind)
        content = path.read_bytes()
        status, _, err = resume(run, tiny_store, run_command)
        assert status == 2, kind
        assert problem in err, (kind, err)
        assert "Traceback" not in err
        assert len([line for line in err.splitlines() if line.strip()]) <= 2, err
        if kind in ("flipped byte", "state_dict", "nan", "other shapes"):
            status, _, err = run_command("evaluate", f"run={run}", "trainer=cpu")
            assert status == 2, kind
            assert "Traceback" not in err
        assert path.read_bytes() == content


def test_one_before_the_last_checkpoint_is_kept_and_continues(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    run = copied(stopped, cwd / "r")
    last, previous = (run / f"checkpoints/{name}.ckpt" for name in ("last", "previous"))
    shutil.copy(last, previous)
    damaged(last, "cut")
    status, _, err = resume(run, tiny_store, run_command)
    assert status == 2
    assert f"continue from the one before it, {previous}" in err
    last.unlink()
    status, out, err = resume(run, tiny_store, run_command)
    assert status == 0, err
    assert "resuming" in out
    steps = [torch.load(path, weights_only=True)["global_step"] for path in (previous, last)]
    assert steps == [2, 4]


def test_weights_that_are_not_finite_are_not_saved(cwd: Path) -> None:
    content = {"global_step": 7, "state_dict": {"a": torch.tensor([1.0, float("inf")])}}
    with pytest.raises(UserError, match="not finite after 7 updates"):
        OneFile().save_checkpoint(content, cwd / "best.ckpt")
    assert not list(cwd.iterdir())


def test_failed_start_leaves_nothing_and_forbids_nothing(tiny_store: Path, cwd: Path, run_command: Run) -> None:
    options = [*SMALL, f"data.store={tiny_store}", "run=r"]
    status, _, err = run_command("train", *options, "optim.lr=1e30")
    assert status == 2
    assert "loss is" in err
    assert not Path("r").exists()
    Path("r").mkdir()
    shutil.copy(Path(__file__).parents[1] / "conf/train.yaml", "r/config.yaml")  # as a killed process leaves it
    assert run_command("train", *options)[0] == 0


def test_long_names_are_cut() -> None:
    overrides = [f"net.option_{i}={i}" for i in range(40)]
    name, other = run_name("paper", overrides), run_name("paper", [*overrides, "net.z=1"])
    assert len(name.encode()) <= LONGEST_NAME
    assert name != other


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small file system")
def test_full_disk_is_told_and_the_last_checkpoint_stays(
    stopped: Path, tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    small = cwd / "small"
    small.mkdir()
    size = sum(path.stat().st_size for path in stopped.rglob("*") if path.is_file())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + 300_000}", "tmpfs", small], check=False).returncode:
        pytest.skip("mounting is not allowed")
    try:
        run = copied(stopped, small / "r")
        before = (run / "checkpoints/last.ckpt").read_bytes()
        status, _, err = resume(run, tiny_store, run_command)
        assert status == 2
        assert "the disk is full: " in err
        assert "new.ckpt" in err
        assert "Traceback" not in err
        assert (run / "checkpoints/last.ckpt").read_bytes() == before
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        status, _, err = run_command("prepare", f"data.store={small}/photos")
        assert status == 2
        assert "the store needs about 0.2 GB" in err
        assert not list(small.glob("photos*"))
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.slow
def test_sigterm_ends_a_measurement_at_once(trained: Path, cwd: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "alexnet_repro.evaluate",
        f"run={trained}",
        "views=ten_crop",
        "split=train",
        "batch_size=1",
    ]
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([*line, "trainer=cpu"], stdout=terminal, stderr=terminal)
    seen = b""
    while b"measuring" not in seen:  # the bar of a terminal
        seen += os.read(screen, 1)
        assert process.poll() is None, seen
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert process.wait(30) == 130
    assert time.monotonic() - start < 10
    assert not list(trained.glob("evaluation-last-train*"))


@pytest.mark.slow
def test_closed_output_does_not_end_in_a_traceback(tiny_store: Path, cwd: Path) -> None:
    options = [*SMALL, f"data.store={tiny_store}", "run=r"]
    process = subprocess.Popen(
        [sys.executable, "-m", "alexnet_repro.train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert "Traceback" not in err
    assert not Path("r").exists()


def test_processes_that_do_not_meet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["placement=two_devices"])
    slurm = {
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"the 2 processes did not meet at 127\.0\.0\.1:\d+ within 1 seconds"):
        launcher.meet(cfg, cuda=False)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(UserError, match=r"no-such-host\.invalid, does not resolve"):
        launcher.meet(cfg, cuda=False)
    assert "WORLD_SIZE" not in os.environ


def test_machines_are_those_of_torchrun_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        towers = compose("train", ["placement=two_devices"])
        three = compose("train", ["placement=two_devices", "trainer.nodes=3"])
    environments: list[tuple[dict[str, str], int]] = [
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}, 2),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}, 1),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}, 1),
        ({"SLURM_NTASKS": "2", "SLURM_NNODES": "2"}, 1),  # the batch script of a job, not one of its tasks
    ]
    for environment, machines in environments:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert launcher.world(towers) == 2
            assert launcher.machines(towers) == machines
            if machines == 2:
                with pytest.raises(UserError, match=r"trainer\.nodes=3, but the processes run on 2 machines"):
                    launcher.world(three)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,1")
    with pytest.raises(UserError, match="different numbers of processes: 3,1"):
        launcher.machines(towers)


def test_run_of_version_0_1_resumes_and_is_evaluated(tiny_store: Path, cwd: Path, run_command: Run) -> None:
    """The folder was written by the commit before locks, store checksums and checkpoint formats (bf03177)."""
    run = copied(Path(__file__).parent / "run-0.1", cwd / "r")
    assert "images_sha256" not in (run / "config.yaml").read_text()
    before = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert "alexnet_repro" not in before
    status, _, err = run_command("evaluate", f"run={run}", f"store={tiny_store}", "trainer=cpu")
    assert status == 0, err
    status, out, err = resume(run, tiny_store, run_command)
    assert status == 0, err
    assert "resuming" in out
    history = json.loads((run / "result.json").read_text())["history"]
    assert [epoch["steps"] for epoch in history] == [2, 4]
    assert history[0] == before["history"][0]


def test_folder_that_other_machines_do_not_see_is_told(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process on another machine does if the run's folder is not on a shared file system."""
    monkeypatch.setattr("alexnet_repro.training.run_folder.PATIENCE", 0.5)
    with pytest.raises(UserError, match=r"does not see .*lock.*\n.*not on a file system that all machines share"):
        wait_for(cwd / "r")
    (cwd / "r").mkdir()
    (cwd / "r/lock").touch()
    wait_for(cwd / "r")
