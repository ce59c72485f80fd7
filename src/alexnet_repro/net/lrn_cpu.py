"""Normalisation on a CPU: compile lrn_cpu.c on first use and keep the library in the user's cache folder.

The compiled form is about five times as fast as the PyTorch operations in lrn.py, which are the fallback without a C
compiler.
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


def serves(a: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> bool:
    """Return whether the compiled form supports ``a`` and the constants of lrn.py.

    It supports float32 and bfloat16 tensors on a CPU with the paper's beta, up to the sizes WIDEST and REACH.
    """
    fits = beta == 0.75 and size // 2 <= REACH and (not towers or a.shape[1] // towers <= WIDEST) and a.numel() > 0
    return fits and a.device.type == "cpu" and a.dtype in NAMES and library() is not None


def forward(a: Tensor, b: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> None:
    """Write the normalised ``a`` into ``b``, both (N, C, H, W), channels-last and of the same dtype."""
    _in_threads("forward", (a, b), size, alpha, k, towers)


def backward(a: Tensor, db: Tensor, da: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> None:
    """Write the gradient with respect to ``a`` into ``da``, given the gradient ``db`` of the output."""
    _in_threads("backward", (a, db, da), size, alpha, k, towers)


def _in_threads(name: str, arrays: tuple[Tensor, ...], size: int, alpha: float, k: float, towers: int) -> None:
    """Run a compiled function with the rows or images divided among ``torch.get_num_threads()`` threads.

    The threads run in parallel because ctypes releases the GIL.
    """
    images, channels, height, width = arrays[0].shape
    if towers:  # across maps: every position of a tower is a row
        count = arrays[0].numel() * towers // channels
        sizes: tuple[int, ...] = (channels // towers,)
    else:
        count, sizes, name = images, (height, width, channels), f"same_map_{name}"
    function = getattr(library(), f"{name}_{NAMES[arrays[0].dtype]}")
    threads = torch.get_num_threads()
    bounds = [count * i // threads for i in range(threads + 1)]
    bytes_each = arrays[0].numel() // count * arrays[0].element_size()

    def share(i: int) -> None:
        pointers = [ctypes.c_void_p(array.data_ptr() + bounds[i] * bytes_each) for array in arrays]
        shape = [ctypes.c_long(bounds[i + 1] - bounds[i]), *map(ctypes.c_int, (*sizes, size))]
        if function(*pointers, *shape, ctypes.c_float(alpha), ctypes.c_float(k)):
            raise MemoryError("normalisation within a map: there is no memory for its buffers")

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
            f"lrn_cpu.c can't be compiled or loaded ({message[-1] if message else error!r}): normalisation uses its slower "
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
