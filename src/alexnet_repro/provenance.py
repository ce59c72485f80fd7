"""Record what a result depends on besides its config: hardware, versions, commit and command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Return the rank that torchrun or Slurm gave this process, or 0 if there is only one process."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def machine(device: "torch.device", processes: int = 1) -> dict[str, Any]:
    """Return the hardware, package versions, commit and command."""
    import torch  # imported here because it takes a second and most users of this module don't need it

    if device.type == "cuda":
        hardware = f"{processes} x {torch.cuda.get_device_name(device)}"
    else:
        hardware = f"{processes * torch.get_num_threads()} threads of {processor()}"
    packages = ("alexnet_repro", "torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow")
    return {
        "machine": hardware,
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
    """Open a file for writing that appears at ``path`` only when the block ends without an error."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        yield file
    unfinished.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result as JSON, complete or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
