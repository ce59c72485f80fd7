"""Compile lrn_cpu.c on first use and keep the library in the user's cache folder.

On a CPU, the compiled form is about five times as fast as the PyTorch operations in lrn.py, which are the fallback
without a C compiler.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "lrn_cpu.c"
WIDEST, REACH = 512, 16  # maximum number of maps in a tower, and on either side of a window's centre
FLAGS = (
    f"-DWIDEST={WIDEST}",
    f"-DREACH={REACH}",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
)
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def serves(a: Tensor, size: int, beta: float, groups: int) -> bool:
    """Return whether the compiled form supports ``a`` and these constants.

    It supports float32 and bfloat16 tensors on a CPU with the paper's beta, up to the sizes WIDEST and REACH.
    """
    fits = beta == 0.75 and size // 2 <= REACH and a.shape[1] // groups <= WIDEST and a.numel() > 0
    return fits and a.device.type == "cpu" and a.dtype in NAMES and library() is not None


def forward(a: Tensor, b: Tensor, groups: int, size: int, alpha: float, k: float) -> None:
    """Write the normalised ``a`` into ``b``, both (N, C, H, W), channels-last and of the same dtype."""
    _in_threads("forward", (a, b), groups, size, alpha, k)


def backward(a: Tensor, db: Tensor, da: Tensor, groups: int, size: int, alpha: float, k: float) -> None:
    """Write the gradient with respect to ``a`` into ``da``, given the gradient ``db`` of the output."""
    _in_threads("backward", (a, db, da), groups, size, alpha, k)


@torch.compiler.disable
def _in_threads(name: str, arrays: tuple[Tensor, ...], groups: int, size: int, alpha: float, k: float) -> None:
    """Run a compiled function with the rows divided among ``torch.get_num_threads()`` threads.

    The threads run in parallel because ctypes releases the GIL.
    """
    function = getattr(library(), f"{name}_{NAMES[arrays[0].dtype]}")
    maps = arrays[0].shape[1] // groups
    rows, threads = arrays[0].numel() // maps, torch.get_num_threads()
    bounds = [rows * i // threads for i in range(threads + 1)]

    def share(i: int) -> None:
        offset = bounds[i] * maps * arrays[0].element_size()
        pointers = [ctypes.c_void_p(array.data_ptr() + offset) for array in arrays]
        count = ctypes.c_long(bounds[i + 1] - bounds[i])
        function(*pointers, count, ctypes.c_int(maps), ctypes.c_int(size), ctypes.c_float(alpha), ctypes.c_float(k))

    if threads == 1:
        share(0)
    else:
        list(_pool(threads, os.getpid()).map(share, range(threads)))


@lru_cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return a thread pool. ``process`` keys the cache, since a forked process inherits no threads."""
    return ThreadPoolExecutor(threads, "lrn")


@lru_cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library. If it cannot be compiled or loaded, warn once and return None."""
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + _processor().encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_repro"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"lrn-{name}.so"
        if not path.exists():
            _compile(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        message = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"lrn.c can't be compiled or loaded ({message[-1] if message else error!r}): normalisation uses its slower "
            "form. A C compiler (cc, or the one that CC names) would make training about a fifth faster.",
            stacklevel=2,
        )
        return None


def _compile(path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler was found")
    # compile elsewhere and rename, so that other processes never see a partial file
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled = Path(folder) / path.name
        command = [*compiler.split(), *FLAGS, "-o", str(compiled), str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        compiled.rename(path)


def _processor() -> str:
    """Return the CPU features that -march=native depends on; different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()
