"""Normalisation on a GPU: Triton kernels, each of which reads its inputs once and writes its result once.

The kernels compute in float32, like lrn_cpu.c, and each thread reads the neighbours of its own value, which are in the
cache. See lrn.py for the formulas. With TRITON_INTERPRET=1 in the environment, the same kernels run on a CPU.
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

BLOCK = 1024  # values per program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_WINDOW = 9  # the kernels' loops are unrolled


def serves(a: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> bool:
    """Return whether the kernels support ``a`` and the constants of lrn.py: any of DTYPES on a GPU."""
    return a.is_cuda and a.dtype in DTYPES and size <= LARGEST_WINDOW and a.numel() > 0 and available(a.device, a.dtype)


@lru_cache
def available(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether kernels can be started on this GPU and compute what they should. If not, warn once."""
    try:
        if not INSTALLED:
            raise RuntimeError("it is not installed")
        one = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
        forward(one, out := torch.empty_like(one), 1, 1.0, 0.75, 1.0, 1)
        if abs(out.item() - 2**-0.75) > 0.01:
            raise RuntimeError(f"its result is {out.item()} instead of {2**-0.75}")
        return True
    except Exception as error:  # Triton has many reasons: an old GPU, no C compiler for an old version, ...
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        warnings.warn(f"Triton can't be used ({reason}): normalisation and dropout are slower.", stacklevel=2)
        return False


def on_device_of(a: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels start on the GPU of ``a``, which need not be the current one."""
    return torch.cuda.device(a.device) if a.is_cuda else nullcontext()


def forward(a: Tensor, b: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> None:
    """Write the normalised ``a`` into ``b``, both (N, C, H, W), channels-last and of the same dtype."""
    grid, (_, channels, height, width) = (triton.cdiv(a.numel(), BLOCK),), a.shape
    with on_device_of(a):
        if towers:
            across_maps_forward[grid](a, b, a.numel(), channels // towers, alpha, k, beta, size, BLOCK)
        else:
            sizes = height, width, channels
            within_map_forward[grid](a, b, a.numel(), *sizes, alpha, k, beta, size, BLOCK)


def backward(a: Tensor, db: Tensor, da: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> None:
    """Write the gradient with respect to ``a`` into ``da``, given the gradient ``db`` of the output."""
    grid, (_, channels, height, width) = (triton.cdiv(a.numel(), BLOCK),), a.shape
    with on_device_of(a):
        if towers:
            across_maps_backward[grid](a, db, da, a.numel(), channels // towers, alpha, k, beta, size, BLOCK)
            return
        # Two passes, since a window of windows would read 81 values: first db s^-beta and what spreads over the window.
        direct, spread = (torch.empty_like(a, dtype=torch.float32) for _ in range(2))
        sizes = height, width, channels
        within_map_spread[grid](a, db, direct, spread, a.numel(), *sizes, alpha, k, beta, size, BLOCK)
        within_map_backward[grid](a, direct, spread, da, a.numel(), *sizes, alpha, beta, size, BLOCK)


@triton.jit
def inverse_powers(s, BETA: tl.constexpr):
    """Return s^-BETA and 1/s."""
    if BETA == 0.75:
        root = tl.rsqrt(s)
        return root * tl.sqrt(root), root * root
    logarithm = tl.log2(s)
    return tl.exp2(-BETA * logarithm), tl.exp2(-logarithm)


@triton.jit
def across_maps_forward(
    a, b, count, maps, alpha: tl.float32, k: tl.float32, BETA: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Normalise across the maps of a tower: a tower's maps at one position are adjacent in memory."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = (i % maps).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for d in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
        inside = (c + d >= 0) & (c + d < maps) & (i < count)
        x = tl.load(a + i + d, mask=inside, other=0).to(tl.float32)
        total += x * x
    x = tl.load(a + i, mask=i < count, other=0).to(tl.float32)
    power, _ = inverse_powers(k + alpha * total, BETA)
    y = x * power
    tl.store(b + i, y.to(b.dtype.element_ty), mask=i < count)


@triton.jit
def across_maps_backward(
    a,
    db,
    da,
    count,
    maps,
    alpha: tl.float32,
    k: tl.float32,
    BETA: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of across_maps_forward. The windows of a window's maps reach SIZE - 1 maps to each side."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = (i % maps).to(tl.int32)
    spread = tl.zeros([BLOCK], tl.float32)
    direct = tl.zeros([BLOCK], tl.float32)
    for d in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
        total = tl.zeros([BLOCK], tl.float32)
        for e in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
            inside = (c + (d + e) >= 0) & (c + (d + e) < maps) & (i < count)
            x = tl.load(a + i + (d + e), mask=inside, other=0).to(tl.float32)
            total += x * x
        inside = (c + d >= 0) & (c + d < maps) & (i < count)
        x = tl.load(a + i + d, mask=inside, other=0).to(tl.float32)
        g = tl.load(db + i + d, mask=inside, other=0).to(tl.float32)
        power, inverse = inverse_powers(k + alpha * total, BETA)
        scaled = g * power
        spread += scaled * x * inverse
        if d == 0:
            direct = scaled
    x = tl.load(a + i, mask=i < count, other=0).to(tl.float32)
    y = direct - 2 * alpha * BETA * x * spread
    tl.store(da + i, y.to(da.dtype.element_ty), mask=i < count)


@triton.jit
def window_sum(a, i, count, height, width, maps, SQUARE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the values, or their squares, over the positions of each window that are inside the map."""
    position = i // maps
    x, y = (position % width).to(tl.int32), (position // width % height).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for dy in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
        for dx in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width) & (i < count)
            value = tl.load(a + i + (dy * width + dx) * maps, mask=inside, other=0).to(tl.float32)
            total += value * value if SQUARE else value
    return total


@triton.jit
def within_map_forward(
    a, b, count, height, width, maps, alpha: tl.float32, k: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise within each map."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    power, _ = inverse_powers(k + alpha * window_sum(a, i, count, height, width, maps, True, SIZE, BLOCK), BETA)
    x = tl.load(a + i, mask=i < count, other=0).to(tl.float32)
    tl.store(b + i, (x * power).to(b.dtype.element_ty), mask=i < count)


@triton.jit
def within_map_spread(
    a, db, direct, spread, count, height, width, maps, alpha: tl.float32, k: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute db s^-beta and db a s^(-beta-1)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = k + alpha * window_sum(a, i, count, height, width, maps, True, SIZE, BLOCK)
    power, inverse = inverse_powers(s, BETA)
    x = tl.load(a + i, mask=i < count, other=0).to(tl.float32)
    scaled = tl.load(db + i, mask=i < count, other=0).to(tl.float32) * power
    tl.store(direct + i, scaled, mask=i < count)
    tl.store(spread + i, scaled * x * inverse, mask=i < count)


@triton.jit
def within_map_backward(
    a, direct, spread, da, count, height, width, maps, alpha: tl.float32,
    BETA: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of within_map_forward from what within_map_spread has written."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    through = window_sum(spread, i, count, height, width, maps, False, SIZE, BLOCK)
    x = tl.load(a + i, mask=i < count, other=0).to(tl.float32)
    y = tl.load(direct + i, mask=i < count, other=0) - 2 * alpha * BETA * x * through
    tl.store(da + i, y.to(da.dtype.element_ty), mask=i < count)
