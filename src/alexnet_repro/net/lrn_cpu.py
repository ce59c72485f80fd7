"""Compile lrn_cpu.c with this machine's C compiler when it is first needed, and keep it in the user's cache.

On a CPU it is about five times as fast as the PyTorch operations of lrn.py, which are used where there is no compiler.
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
WIDEST, REACH = 512, 16  # the most maps of a tower, and on either side of a window
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
    """Return whether the compiled form supports this: on a CPU, float32 or bfloat16, with the paper's beta."""
    fits = beta == 0.75 and size // 2 <= REACH and a.shape[1] // groups <= WIDEST and a.numel() > 0
    return fits and a.device.type == "cpu" and a.dtype in NAMES and library() is not None


def forward(a: Tensor, b: Tensor, groups: int, size: int, alpha: float, k: float) -> None:
    """Write the normalised ``a`` into ``b``; both are (N, C, H, W), channels-last, of the same dtype."""
    _in_threads("forward", (a, b), groups, size, alpha, k)


def backward(a: Tensor, db: Tensor, da: Tensor, groups: int, size: int, alpha: float, k: float) -> None:
    """Write the gradient with respect to ``a`` into ``da``, given the gradient ``db`` of the output."""
    _in_threads("backward", (a, db, da), groups, size, alpha, k)


@torch.compiler.disable
def _in_threads(name: str, arrays: tuple[Tensor, ...], groups: int, size: int, alpha: float, k: float) -> None:
    """Divide the rows among as many threads as torch uses; ctypes releases Python's global lock."""
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
    """Return a pool of threads for this process; a forked process inherits none."""
    return ThreadPoolExecutor(threads, "lrn")


@lru_cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None, with one warning, if it cannot be compiled or loaded."""
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + _processor().encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_repro"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"lrn-{name}.so"
        if not path.exists():
            _compile(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"lrn.c can't be compiled or loaded ({said[-1] if said else error!r}): normalisation takes its slower form; "
            "a C compiler (cc, or the one that CC names) would make training about a fifth faster",
            stacklevel=2,
        )
        return None


def _compile(path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # other processes see the whole file or none
        made = Path(folder) / path.name
        line = [*compiler.split(), *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
        subprocess.run(line, check=True, capture_output=True, text=True)
        made.rename(path)


def _processor() -> str:
    """Return what -march=native depends on, since machines of several kinds may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()
