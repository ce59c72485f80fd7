"""Max-pooling on a GPU: Triton kernels that keep one byte per maximum, where PyTorch keeps eight. See pool.py."""
# mypy: allow-untyped-defs

from torch import Tensor

from alexnet_repro.net.lrn_gpu import COLUMNS, DTYPES, ROWS, available, grid, on_device_of, part_of, tl, triton


def serves(x: Tensor) -> bool:
    """Return whether the kernels support ``x``: any of DTYPES on a GPU."""
    return x.is_cuda and x.dtype in DTYPES and x.numel() > 0 and available(x.device, x.dtype)


def forward(x: Tensor, y: Tensor, largest: Tensor, size: int) -> None:
    """Write the maximum of each window into ``y``, and its place in the window, row by row, into ``largest``.

    x: (N, C, H, W), channels-last, as are y and largest, (N, C, height, width) and uint8.
    """
    with on_device_of(x):
        write_maxima[grid(y)](x, y, largest, len(x), x.shape[1], *x.shape[2:], *y.shape[2:], size, ROWS, COLUMNS)


def backward(dy: Tensor, largest: Tensor, dx: Tensor, size: int) -> None:
    """Write the gradient with respect to the input into ``dx``, given that of the maxima and their places."""
    sizes = *dx.shape[2:], *dy.shape[2:]
    with on_device_of(dy):
        write_gradient[grid(dx)](dy, largest, dx, len(dx), dx.shape[1], *sizes, size, ROWS, COLUMNS)


@triton.jit
def write_maxima(
    x, y, largest, images, maps, height, width, pooled_height, pooled_width,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute maxima of SIZE x SIZE windows with stride 2. The first of equal values counts, and NaN is the largest."""
    image, row, column, c, at, exists = part_of(images, maps, pooled_height, pooled_width, ROWS, COLUMNS)
    corner = ((image * height + 2 * row) * width + 2 * column) * maps + c
    best = tl.load(x + corner, mask=exists, other=0).to(tl.float32)
    where = tl.zeros([ROWS, COLUMNS], tl.int32)
    for down in tl.static_range(SIZE):
        for right in tl.static_range(SIZE):
            if down + right > 0:
                inside = (2 * row + down < height) & (2 * column + right < width)
                place = corner + (down * width + right) * maps
                value = tl.load(x + place, mask=inside & exists, other=-float("inf")).to(tl.float32)
                better = (value > best) | (value != value)
                best = tl.where(better, value, best)
                where = tl.where(better, down * SIZE + right, where)
    tl.store(y + at, best.to(y.dtype.element_ty), mask=exists)
    tl.store(largest + at, where.to(tl.uint8), mask=exists)


@triton.jit
def write_gradient(
    dy, largest, dx, images, maps, height, width, pooled_height, pooled_width,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of the windows in which a value is the largest: at most two per axis contain it."""
    image, row, column, c, at, exists = part_of(images, maps, height, width, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for up in tl.static_range(2):
        for left in tl.static_range(2):
            y, x = row // 2 - up, column // 2 - left
            down, right = row - 2 * y, column - 2 * x  # the value's place in this window
            inside = (y >= 0) & (x >= 0) & (y < pooled_height) & (x < pooled_width) & (down < SIZE) & (right < SIZE)
            window = ((image * pooled_height + y) * pooled_width + x) * maps + c
            where = tl.load(largest + window, mask=inside & exists, other=255).to(tl.int32)
            g = tl.load(dy + window, mask=inside & exists, other=0).to(tl.float32)
            total += tl.where(where == down * SIZE + right, g, 0.0)
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=exists)
