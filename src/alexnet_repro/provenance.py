"""Record what a result depends on besides its config: hardware, versions, commit and command."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TYPED = "ALEXNET_REPRO_COMMAND"  # environment variable with the command as the user typed it, for all its processes


def hardware(device: torch.device, processes: int = 1) -> str:
    """Return the number and model of the GPUs, or the number of threads and the model of the processor."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    threads = processes * torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {processor()}"


def machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Return the hardware, package versions, commit and command."""
    packages = ("alexnet_repro", "torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow")
    return {
        "machine": hardware(device, processes),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": _commit(),
        "command": os.environ.get(TYPED) or f"python -m {_module()} {shlex.join(sys.argv[1:])}".strip(),
    }


def versions() -> str:
    """Return the versions on which the numbers of a run depend, in a line."""
    own = f"alexnet_repro {version('alexnet_repro')}"
    return f"{own} ({_commit() or 'no commit'}), torch {version('torch')}, lightning {version('lightning')}"


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
