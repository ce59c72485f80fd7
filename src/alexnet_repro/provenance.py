"""Record what a result depends on besides its config: hardware, versions, commit and command."""

import errno
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from alexnet_repro.errors import InUse, UserError

if TYPE_CHECKING:
    import torch


def tasks() -> int:
    """Return the number of processes of this run that torchrun or Slurm started, or 1 for a process on its own.

    Raises UserError if the environment holds something other than a number.
    """
    if "WORLD_SIZE" in os.environ:
        return number("WORLD_SIZE", 1)
    if "SLURM_PROCID" in os.environ:  # a task of a job step, which may have fewer tasks than its job
        return number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS", 1)
    return 1


def rank() -> int:
    """Return the rank that torchrun or Slurm gave this process, or 0 if there is only one process.

    Raises UserError if the environment holds something other than a number from 0 to ``tasks() - 1``.
    """
    if tasks() == 1:
        return 0
    name = "RANK" if "WORLD_SIZE" in os.environ else "SLURM_PROCID"
    if (own := number(name, 0)) >= tasks():
        raise UserError(f"the environment has {name}={own}, but only {tasks()} processes")
    return own


def number(name: str, least: int) -> int:
    """Return a whole number from the environment, ``least`` if it is not set. Raise UserError if it is no such number."""
    value = os.environ.get(name, str(least))
    if not value.isdecimal() or int(value) < least:
        raise UserError(
            f"the environment has {name}={value}, which is not a whole number from {least}",
            f"start the processes with torchrun or srun, or run: unset {name}",
        )
    return int(value)


def hardware(device: "torch.device", processes: int = 1) -> str:
    """Return the number and model of the GPUs, or the number of threads and the model of the processor."""
    import torch  # imported here because it takes a second and most users of this module don't need it

    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    threads = processes * torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {processor()}"


def machine(device: "torch.device", processes: int = 1) -> dict[str, Any]:
    """Return the hardware, package versions, commit and command."""
    packages = ("alexnet_repro", "torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow")
    return {
        "machine": hardware(device, processes),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": _commit(),
        "command": f"python -m {_module()} {shlex.join(sys.argv[1:])}".strip(),
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def processor(field: str = "model name") -> str:
    """Return a field of the first processor in /proc/cpuinfo, or else the name that Python reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    """Return the commit of the checkout, with a + for uncommitted changes, or None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / "pyproject.toml").exists():
        return None
    try:
        git = ["git", "-C", os.fspath(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at ``path`` only when the block ends without an error.

    The content is on the disk before the file appears, so that a power failure leaves either the old file or the new.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno is None and re.search(r"requested and \d+ written|Not enough free space", str(error)):  # numpy's
            raise OSError(errno.ENOSPC, str(error), str(path)) from None
        error.filename = error.filename or str(path)
        raise
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def one_process_at_a_time(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Hold the lock PATH.lock, in a folder that is created if needed, while ``path`` is made.

    Raises InUse, with what is wrong and what to do, if another process holds it.
    """
    from filelock import FileLock, Timeout  # imported here because every command imports this module at its start

    lock = FileLock(path.with_name(path.name + ".lock"), timeout=0)
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
                if is_new and not any(path.parent.iterdir()):  # nothing was made
                    path.parent.rmdir()
    except Timeout:
        raise InUse(problem, remedy) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result as JSON, complete or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
