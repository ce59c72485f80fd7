"""Max-pooling (Section 3.4), with kernels of our own where the net is compiled for a GPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_repro.net import layers, pool_gpu


class MaxPool(nn.Module):
    """Max-pooling with windows of ``size`` x ``size`` and stride 2, as ``max_pool``: (N, C, H, W) -> (N, C, H', W')."""

    def __init__(self, size: int, ceil: bool = True) -> None:
        super().__init__()
        self.size, self.ceil = size, ceil

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima."""
        return max_pool(x, self.size, self.ceil)

    def extra_repr(self) -> str:
        """Return the windows for print(net)."""
        return f"{self.size}x{self.size}, stride=2, ceil={self.ceil}"


def max_pool(x: Tensor, size: int, ceil: bool = True) -> Tensor:
    """Apply max-pooling with windows of ``size`` x ``size`` (2 or 3) and stride 2.

    x: (N, C, H, W). Returns (N, C, H', W'), where H' = (H - size) / 2 + 1, rounded up with ``ceil``, otherwise down. A
    window that would extend beyond the map ends at its edge. The gradient goes to the first of equal maxima.
    """
    if layers.compiled_for_gpu(x) and pool_gpu.serves(x):
        y: Tensor = _max_pool_gpu(x, size, ceil)[0]
        return y
    return F.max_pool2d(x, size, stride=2, ceil_mode=ceil)


@torch.library.custom_op("alexnet_repro::max_pool", mutates_args=())
def _max_pool_gpu(x: Tensor, size: int, ceil: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    y, largest = _pooled(x, size, ceil)
    pool_gpu.forward(x, y, largest, size)
    return y, largest


@torch.library.custom_op("alexnet_repro::max_pool_backward", mutates_args=())
def _max_pool_gpu_backward(dy: Tensor, largest: Tensor, height: int, width: int, size: int) -> Tensor:
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = _unpooled(dy, largest, height, width, size)
    pool_gpu.backward(dy, largest, dx, size)
    return dx


@_max_pool_gpu.register_fake
def _pooled(x: Tensor, size: int, ceil: bool) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the maxima and their places."""
    sides = [-(-(side - size) // 2) + 1 if ceil else (side - size) // 2 + 1 for side in x.shape[2:]]
    shape = *x.shape[:2], *sides
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8)


@_max_pool_gpu_backward.register_fake
def _unpooled(dy: Tensor, largest: Tensor, height: int, width: int, size: int) -> Tensor:
    """Return an empty tensor for the gradient of the input."""
    shape = *dy.shape[:2], height, width
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


def _save_places(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.size, _ = inputs
    ctx.sides = x.shape[2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_gradient(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (largest,) = ctx.saved_tensors
    return _max_pool_gpu_backward(dy, largest, *ctx.sides, ctx.size), None, None


_max_pool_gpu.register_autograd(_pool_gradient, setup_context=_save_places)
