"""Test runs on a real Slurm of two nodes: pytest -m slurm. Without Slurm, these tests are skipped."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.slurm]
MANY_EPOCHS = [option for option in SMALL if not option.startswith("epochs")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Use the cluster that runs, or start one for these tests."""
    if not shutil.which("slurmctld") or os.geteuid():
        pytest.skip("needs root, and Debian's packages slurm-wlm and munge")
    if subprocess.run(["sinfo", "-h"], capture_output=True, text=True, check=False).stdout.strip():
        yield
        return
    start = [ROOT / "tests/slurm_cluster.sh", "start"]
    if (done := subprocess.run(start, capture_output=True, text=True, timeout=90, check=False)).returncode:
        pytest.skip(f"Slurm does not start here: {done.stderr.strip()[-200:]}")
    yield
    subprocess.run([ROOT / "tests/slurm_cluster.sh", "stop"], check=True, capture_output=True)


@pytest.fixture
def scripts(cwd: Path, cluster: None) -> Path:
    """Write the sbatch scripts of docs/clusters.md into the current folder."""
    for script in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/clusters.md").read_text(), re.DOTALL):
        (cwd / re.search(r"# (\w+\.sbatch)", script)[1]).write_text(script)  # type: ignore[index]
    return cwd


def submitted(script: str, *options: str, **environment: str) -> str:
    """Submit a script and return the number of its job."""
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    line = ["sbatch", "--parsable", "--output=out.txt", script, *options]
    done = subprocess.run(line, env={**os.environ, **path, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def ended(job: str, seconds: float = 240) -> str:
    """Wait until a job ends, and return what it printed."""
    deadline = time.monotonic() + seconds
    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False).stdout.strip():
        if time.monotonic() > deadline:
            subprocess.run(["scancel", job], check=False)
            raise AssertionError(f"job {job} did not end:\n{Path('out.txt').read_text()[-2000:]}")
        time.sleep(0.5)
    return Path("out.txt").read_text()


def weights(run: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def on_one_node(*options: str) -> None:
    line = [sys.executable, "-m", "alexnet_repro.train", *options]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=one, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_towers_on_two_nodes_equal_one_device(scripts: Path, small_store: Path) -> None:
    options = ["data=folder", f"data.store={small_store}", "epochs=1", "batch_size=6", "trainer=cpu"]
    options += ["trainer.precision=32-true", "watch.every=0", "net.dropout=0"]
    output = ended(submitted("towers.sbatch", *options, "run=towers"))
    assert "2 x cpu 32-true" in output, output[-2000:]
    on_one_node(*options, "run=one")
    ours, expected = weights("towers"), weights("one")
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-6 * float(value.abs().max()) + 1e-12), name


def test_replicas_on_two_nodes_equal_one_device(scripts: Path, tiny_store: Path) -> None:
    options = [*SMALL, "trainer.precision=64-true", f"data.store={tiny_store}"]
    output = ended(submitted("replicas.sbatch", *options, "run=replicas"))
    assert "2 x cpu" in output, output[-2000:]
    on_one_node(*options, "run=one")
    ours, expected = weights("replicas"), weights("one")
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("how", ["scontrol requeue", "SIGUSR1"])
def test_requeued_job_resumes_bit_for_bit(how: str, scripts: Path, tiny_store: Path) -> None:
    options = [*MANY_EPOCHS, f"data.store={tiny_store}", "epochs=200"]
    on_one_node(*options, "run=whole")
    job = submitted("requeue.sbatch", *options, "run=parts")
    deadline = time.monotonic() + 60
    while not Path("parts/checkpoints/last.ckpt").exists():
        assert time.monotonic() < deadline, Path("out.txt").read_text()
        time.sleep(0.1)
    if how == "SIGUSR1":
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
    else:
        subprocess.run(["scontrol", "requeue", job], check=True)
    output = ended(job, 300)
    assert "saved in parts" in output
    assert "resuming parts" in output
    assert "finished after" in output
    for name, value in weights("whole").items():
        assert torch.equal(value, weights("parts")[name]), name


def test_killed_process_ends_the_run_within_a_minute(scripts: Path, tiny_store: Path) -> None:
    options = [*MANY_EPOCHS, f"data.store={tiny_store}", "epochs=100000", "run=r"]
    job = submitted("replicas.sbatch", *options)
    deadline = time.monotonic() + 60
    while not Path("r/checkpoints/last.ckpt").exists():
        assert time.monotonic() < deadline, Path("out.txt").read_text()
        time.sleep(0.1)
    found = subprocess.run(
        ["pgrep", "-f", "alexnet_repro.train.*epochs=100000"], capture_output=True, text=True, check=True
    )
    tasks = [pid for pid in found.stdout.split() if b"SLURM_PROCID=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    python = [pid for pid in tasks if "python" in str(Path(f"/proc/{pid}/exe").readlink())]
    os.kill(int(python[0]), 9)
    start = time.monotonic()
    output = ended(job, 60)
    assert time.monotonic() - start < 60
    assert "lost the connection" in output or "Killed" in output
    assert Path("r/checkpoints/last.ckpt").exists()
    assert not Path("r/result.json").exists()


def test_tasks_are_one_run_or_several(scripts: Path, tiny_store: Path) -> None:
    options = [*SMALL, f"data.store={tiny_store}"]
    output = ended(submitted("packing.sbatch", *options))
    results = sorted(Path("runs").rglob("result.json"))
    assert [json.loads(path.read_text())["seed"] for path in results] == [0, 1], output[-2000:]
    Path("mistake.sbatch").write_text(
        '#!/bin/bash\n#SBATCH --ntasks=2\nsrun python -m alexnet_repro.train "$@"\necho status $?\n'
    )
    output = ended(submitted("mistake.sbatch", *options, "run=mistake"))
    assert "2 processes are running, but placement=one_device placement.replicas=1 needs 1" in output
    assert "Traceback" not in output
    assert not Path("mistake").exists()


def test_name_that_does_not_resolve_is_told_at_once(scripts: Path, tiny_store: Path) -> None:
    options = [*SMALL, f"data.store={tiny_store}", "run=r"]
    start = time.monotonic()
    output = ended(submitted("replicas.sbatch", *options, MASTER_ADDR="no-such-host.invalid"))
    assert "no-such-host.invalid, does not resolve" in output
    assert time.monotonic() - start < 60
    assert "Traceback" not in output
    assert not Path("r").exists()


def test_submitit_sweep(scripts: Path, tiny_store: Path) -> None:
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.mem_gb=3"]
    line = [
        sys.executable,
        "-m",
        "alexnet_repro.train",
        "-m",
        *launcher,
        *SMALL,
        f"data.store={tiny_store}",
        "seed=0,1",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(Path("runs").rglob("result.json"))) == 2
    assert "2 jobs; this table's numbers" in done.stdout
