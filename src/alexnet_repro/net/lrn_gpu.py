"""Normalisation on a GPU: Triton kernels, each of which reads its inputs once and writes its result once.

The kernels compute in float32, like lrn_cpu.c. See lrn.py for the formulas. With TRITON_INTERPRET=1 in the environment,
the same kernels run on a CPU.
"""
# mypy: allow-untyped-defs

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from unittest.mock import MagicMock

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INSTALLED = True
except ImportError:  # PyTorch for CPUs, and that for Windows, come without it
    triton = tl = MagicMock()  # so that this module can be imported
    INSTALLED = False

# Sizes of the part that a program computes, the fastest that were tried on an H200.
ROWS_ACROSS = 64  # positions of a tower, with all of its maps or 128 of them
ROWS_WITHOUT_TF32 = 16  # the same before Ampere; more take a minute to compile
ROWS, COLUMNS = 32, 32  # positions and maps, in the other kernels
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_WINDOW = 9  # the kernels' loops are unrolled


def serves(a: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> bool:
    """Return whether the kernels support ``a`` and the constants of lrn.py: any of DTYPES on a GPU."""
    return a.is_cuda and a.dtype in DTYPES and size <= LARGEST_WINDOW and a.numel() > 0 and available(a.device, a.dtype)


@torch.compiler.assume_constant_result
def available(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether kernels can be started on this GPU and compute what they should. If not, warn once."""
    return _available(device, dtype)


@lru_cache
def _available(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        if not INSTALLED:
            raise RuntimeError("it is not installed")
        ones = torch.ones(1, 128, 1, 1, device=device, dtype=dtype)  # as many maps as a program takes
        forward(ones, out := torch.empty_like(ones), 5, 0.2, 0.75, 1.0, 1)
        if abs(out[0, 64].item() - 2**-0.75) > 0.01:
            raise RuntimeError(f"its result is {out[0, 64].item()} instead of {2**-0.75}")
        backward(ones, ones, out, 5, 0.2, 0.75, 1.0, 1)
        return True
    except Exception as error:  # Triton has many reasons: an old GPU, no C compiler for an old version, ...
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        warnings.warn(f"Triton can't be used ({reason}): normalisation, pooling and dropout are slower.", stacklevel=2)
        return False


def on_device_of(a: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels start on the GPU of ``a``, which need not be the current one."""
    return torch.cuda.device(a.device) if a.is_cuda else nullcontext()


def forward(a: Tensor, b: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> None:
    """Write the normalised ``a`` into ``b``, both (N, C, H, W), channels-last and of the same dtype."""
    with on_device_of(a):
        if towers:
            programs, sizes, tile = across_maps(a, towers)
            across_maps_forward[programs](a, b, *sizes, alpha, k, beta, size, *tile)
        else:
            within_map_forward[grid(a)](a, b, *a.shape, alpha, k, beta, size, ROWS, COLUMNS)


def backward(a: Tensor, db: Tensor, da: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> None:
    """Write the gradient with respect to ``a`` into ``da``, given the gradient ``db`` of the output."""
    with on_device_of(a):
        if towers:
            programs, sizes, tile = across_maps(a, towers)
            across_maps_backward[programs](a, db, da, *sizes, alpha, k, beta, size, *tile)
            return
        # Two passes, since a window of windows would read 81 values: first db s^-beta and what spreads over the window.
        direct, spread = (torch.empty_like(a, dtype=torch.float32) for _ in range(2))
        within_map_spread[grid(a)](a, db, direct, spread, *a.shape, alpha, k, beta, size, ROWS, COLUMNS)
        within_map_backward[grid(a)](a, direct, spread, da, *a.shape, alpha, beta, size, ROWS, COLUMNS)


def across_maps(a: Tensor, towers: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, bool]]:
    """Return the number of programs, the rows (towers at positions) and maps, and how these are divided and computed."""
    maps = a.shape[1] // towers
    columns = min(128, max(16, triton.next_power_of_2(maps)))
    halo = 0 if maps <= columns else LARGEST_WINDOW - 1  # as far as a gradient's windows of windows reach
    rows, tf32 = a.numel() // maps, has_tf32(a)
    together = ROWS_ACROSS if tf32 else ROWS_WITHOUT_TF32
    programs = triton.cdiv(rows, together), triton.cdiv(maps, columns - 2 * halo)
    return programs, (rows, maps), (halo, together, columns, tf32)


def has_tf32(a: Tensor) -> bool:
    """Return whether the matrix units of the GPU multiply TF32: from Ampere on."""
    return not a.is_cuda or torch.cuda.get_device_capability(a.device) >= (8, 0)


def grid(written: Tensor) -> tuple[int, int]:
    """Return the number of programs: along the positions of all images, and along the maps."""
    images, maps, height, width = written.shape
    return triton.cdiv(images * height * width, ROWS), triton.cdiv(maps, COLUMNS)


@triton.jit
def inverse_powers(s, BETA: tl.constexpr):
    """Return s^-BETA and 1/s."""
    if BETA == 0.75:
        root = tl.rsqrt(s)
        return root * tl.sqrt(root), root * root
    logarithm = tl.log2(s)
    return tl.exp2(-BETA * logarithm), tl.exp2(-logarithm)


@triton.jit
def tower_at_positions(rows, maps, HALO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return where a program's values are, (ROWS, COLUMNS), which of them exist, and which of these it writes.

    Each row is a part of a tower's maps at one position, which are adjacent in memory. HALO values at each end of a row
    are only read.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    c = (tl.program_id(1) * (COLUMNS - 2 * HALO) - HALO + column)[None, :]
    exists = (row[:, None] < rows) & (c >= 0) & (c < maps)
    inner = (column >= HALO) & (column < COLUMNS - HALO)
    return row[:, None] * maps + c, exists, exists & inner[None, :]


@triton.jit
def sum_of_neighbours(x, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TF32: tl.constexpr):
    """Sum over each value's window of adjacent maps; with TF32, by a product with a matrix of zeros and ones.

    The matrix units round to TF32, which has 11 bits. Two terms of 11 bits each hold the square of a bfloat16 exactly. As 0
    times NaN is NaN, one NaN, or one square beyond the range of float32, makes all sums of its row NaN.
    """
    c = tl.arange(0, COLUMNS)
    if not TF32:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for d in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
            neighbour = tl.minimum(tl.maximum(c + d, 0), COLUMNS - 1)[None, :].broadcast_to(ROWS, COLUMNS)
            total += tl.where((c + d == neighbour), tl.gather(x, neighbour, 1), 0.0)
        return total
    window = (tl.abs(c[:, None] - c[None, :]) <= SIZE // 2).to(tl.float32)
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    low = tl.dot(x - high, window, input_precision="tf32")
    return tl.dot(high, window, low, input_precision="tf32")


@triton.jit
def across_maps_forward(
    a, b, rows, maps, alpha: tl.float32, k: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Normalise across the maps of a tower."""
    at, exists, written = tower_at_positions(rows, maps, HALO, ROWS, COLUMNS)
    x = tl.load(a + at, mask=exists, other=0).to(tl.float32)
    power, _ = inverse_powers(k + alpha * sum_of_neighbours(x * x, SIZE, ROWS, COLUMNS, TF32), BETA)
    tl.store(b + at, (x * power).to(b.dtype.element_ty), mask=written)


@triton.jit
def across_maps_backward(
    a, db, da, rows, maps, alpha: tl.float32, k: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of across_maps_forward."""
    at, exists, written = tower_at_positions(rows, maps, HALO, ROWS, COLUMNS)
    x = tl.load(a + at, mask=exists, other=0).to(tl.float32)
    power, inverse = inverse_powers(k + alpha * sum_of_neighbours(x * x, SIZE, ROWS, COLUMNS, TF32), BETA)
    direct = tl.load(db + at, mask=exists, other=0).to(tl.float32) * power
    spread = sum_of_neighbours(direct * x * inverse, SIZE, ROWS, COLUMNS, TF32)
    tl.store(da + at, (direct - 2 * alpha * BETA * x * spread).to(da.dtype.element_ty), mask=written)


@triton.jit
def part_of(images, maps, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return which values this program writes.

    They are image, row and column of its positions, (ROWS, 1), where its values are in memory, and which of them exist,
    (ROWS, COLUMNS).
    """
    position = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    image = position // (height * width)
    within = (position - image * height * width).to(tl.int32)
    return image, within // width, within % width, c, position * maps + c, (image < images) & (c < maps)


@triton.jit
def window_sum(
    a, at, row, column, exists, height, width, maps, SQUARE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Sum the values, or their squares, over the positions of each window that are inside the map."""
    total = tl.zeros(exists.shape, tl.float32)
    for down in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
        for right in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
            y, x = row + down, column + right
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & exists
            value = tl.load(a + at + (down * width + right) * maps, mask=inside, other=0).to(tl.float32)
            total += value * value if SQUARE else value
    return total


@triton.jit
def within_map_forward(
    a, b, images, maps, height, width, alpha: tl.float32, k: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalise within each map."""
    _, row, column, _, at, exists = part_of(images, maps, height, width, ROWS, COLUMNS)
    squares = window_sum(a, at, row, column, exists, height, width, maps, True, SIZE)
    power, _ = inverse_powers(k + alpha * squares, BETA)
    x = tl.load(a + at, mask=exists, other=0).to(tl.float32)
    tl.store(b + at, (x * power).to(b.dtype.element_ty), mask=exists)


@triton.jit
def within_map_spread(
    a, db, direct, spread, images, maps, height, width, alpha: tl.float32, k: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute db s^-beta and db a s^(-beta-1)."""
    _, row, column, _, at, exists = part_of(images, maps, height, width, ROWS, COLUMNS)
    squares = window_sum(a, at, row, column, exists, height, width, maps, True, SIZE)
    power, inverse = inverse_powers(k + alpha * squares, BETA)
    x = tl.load(a + at, mask=exists, other=0).to(tl.float32)
    scaled = tl.load(db + at, mask=exists, other=0).to(tl.float32) * power
    tl.store(direct + at, scaled, mask=exists)
    tl.store(spread + at, scaled * x * inverse, mask=exists)


@triton.jit
def within_map_backward(
    a, direct, spread, da, images, maps, height, width, alpha: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of within_map_forward from what within_map_spread has written."""
    _, row, column, _, at, exists = part_of(images, maps, height, width, ROWS, COLUMNS)
    through = window_sum(spread, at, row, column, exists, height, width, maps, False, SIZE)
    x = tl.load(a + at, mask=exists, other=0).to(tl.float32)
    y = tl.load(direct + at, mask=exists, other=0) - 2 * alpha * BETA * x * through
    tl.store(da + at, y.to(da.dtype.element_ty), mask=exists)
