"""Dropout masks on a GPU: Philox in one Triton kernel instead of a hundred operations on integers. See dropout.py."""
# mypy: allow-untyped-defs

from torch import Tensor

from alexnet_repro.net.lrn_gpu import available, on_device_of, tl, triton

BLOCK = 256  # counters per program, each of which decides four neurons


def serves(source: Tensor) -> bool:
    """Return whether the kernel can be used: on a GPU."""
    return source.is_cuda and available(source.device)


def write(kept: Tensor, number: int, source: Tensor, stream: int, threshold: int) -> None:
    """Write the mask of one tower into ``kept[:, number]``.

    kept: (rows, towers, neurons) bool, contiguous; neurons is a multiple of 4. stream: the last word of the counter.
    """
    rows, towers, neurons = kept.shape
    count = rows * neurons // 4
    grid = (triton.cdiv(count, BLOCK),)
    with on_device_of(kept):
        write_kept[grid](kept, source, count, neurons // 4, number, towers, stream, threshold, BLOCK)


@triton.jit
def write_kept(kept, source, count, blocks, number, towers, stream: tl.int64, threshold: tl.int64, BLOCK: tl.constexpr):
    """Compute Philox4x32-10 for the counters (column, row, step, stream) and compare its words with the threshold."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(source) | (tl.load(source + 1) << 32)
    column, row = i % blocks, i // blocks
    position = (row + tl.load(source + 3)).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    step, last = zero + tl.load(source + 2).to(tl.uint32), zero + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, column.to(tl.uint32), position, step, last)
    to = kept + ((row * towers + number) * blocks + column) * 4
    tl.store(to, w0.to(tl.int64) >= threshold, mask=i < count)
    tl.store(to + 1, w1.to(tl.int64) >= threshold, mask=i < count)
    tl.store(to + 2, w2.to(tl.int64) >= threshold, mask=i < count)
    tl.store(to + 3, w3.to(tl.int64) >= threshold, mask=i < count)
