"""Local response normalisation (Section 3.3): a plain reference form, and one with a fused form for each device.

    b_i = a_i / (k + alpha * sum_{j=i-n/2}^{i+n/2} a_j^2) ** beta

The window is clipped at the first and last map of a tower, so it never crosses into the other tower.

alpha multiplies the plain sum of squares, as printed. The 2012 code divides alpha by n when it reads the layer file.
torch.nn.LocalResponseNorm also divides alpha by n. The printed alpha of 1e-4 corresponds to 5e-4 in
torch.nn.LocalResponseNorm. The alpha of the 2012 code corresponds to 1e-4 / 5 in this module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional as F

from alexnet_repro.net import lrn_cpu, lrn_gpu

# Bytes of one float32 block of the fast form, chosen so that temporaries stay in cache. 1 MB and 4 MB are slower.
BLOCK_BYTES = 2**21


def plain_local_response_norm(a: Tensor, size: int, alpha: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """Apply the formula of Section 3.3 term by term, as the reference for tests of the fast forms.

    a: (N, C, H, W) responses; the C maps are those of ``groups`` towers, in tower order. Returns the same shape.
    """
    normalised = []
    for tower in a.chunk(groups, dim=1):
        squares = F.pad(tower.square(), (0, 0, 0, 0, size // 2, size // 2))
        window_sum = sum(squares[:, shift : shift + tower.shape[1]] for shift in range(size))
        normalised.append(tower / (k + alpha * window_sum) ** beta)
    return torch.cat(normalised, dim=1)


def transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is at work.

    The fused operator has only its own gradient. With these, the formula itself is computed, of which PyTorch knows all
    derivatives; the operator would give a tangent of zero.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def refuse_undefined(alpha: float, k: float) -> None:
    """Raise ValueError for constants with which the denominator can be 0 or undefined."""
    if alpha < 0 or k <= 0:
        raise ValueError(
            f"normalisation with alpha={alpha:g} and k={k:g}: alpha must not be negative, k must be positive"
        )


class LocalResponseNorm(nn.Module):
    """Local response normalisation across adjacent maps of the same tower (Section 3.3).

    Input and output: (N, C, H, W). The output has the input's dtype and a channels-last layout.

    size: n, the number of adjacent maps in a window; odd.
    alpha, beta, k: as printed; alpha multiplies the plain sum of squares.
    groups: number of towers. Windows do not cross towers. C must be a multiple of ``groups``.

    Raises ValueError if ``size`` is not odd and positive, if alpha is negative or k is not positive, or if C is not a
    multiple of ``groups``.
    """

    def __init__(self, size: int, alpha: float, beta: float, k: float, groups: int = 1) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"the window of local response normalisation must be odd and positive, not {size}")
        refuse_undefined(alpha, k)
        self.size, self.alpha, self.beta, self.k, self.groups = size, alpha, beta, k, groups

    def forward(self, a: Tensor) -> Tensor:
        """Return the normalised responses (N, C, H, W)."""
        if not isinstance(a, Proxy) and a.shape[1] % self.groups:
            raise ValueError(f"{a.shape[1]} maps can't be split evenly over {self.groups} towers")
        if transformed():
            return plain_local_response_norm(
                at_least_float32(a), self.size, self.alpha, self.beta, self.k, self.groups
            ).to(a.dtype)
        return normalise(a, self.size, self.alpha, self.beta, self.k, self.groups)

    def extra_repr(self) -> str:
        """Return the constants for print(net)."""
        return f"n={self.size}, alpha={self.alpha:g}, beta={self.beta}, k={self.k}, groups={self.groups}"


class SameMapNorm(nn.Module):
    """Normalisation within each map, over a ``size`` x ``size`` window of positions.

        b = a / (k + alpha * (sum of a^2 over the window, clipped at the map's edges)) ** beta

    Input and output: (N, C, H, W). Layer 2 of the 2012 code uses this layer; the paper does not mention it. Raises
    ValueError if ``size`` is not odd and positive.
    """

    def __init__(self, size: int, alpha: float, beta: float, k: float) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"the window of same-map normalisation must be odd and positive, not {size}")
        refuse_undefined(alpha, k)
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, a: Tensor) -> Tensor:
        """Return the normalised responses (N, C, H, W)."""
        if transformed():
            x = at_least_float32(a)
            sums = F.avg_pool2d(x.square(), self.size, 1, self.size // 2, divisor_override=1)
            return (x / (self.k + self.alpha * sums) ** self.beta).to(a.dtype)
        return normalise(a, self.size, self.alpha, self.beta, self.k, 0)

    def extra_repr(self) -> str:
        """Return the constants for print(net)."""
        return f"{self.size}x{self.size}, alpha={self.alpha:g}, beta={self.beta}, k={self.k}"


WindowSum = Callable[[Tensor], Tensor]


@torch.library.custom_op("alexnet_repro::normalise", mutates_args=())
def normalise(a: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> Tensor:
    """Normalise responses across the maps of each tower, or within each map if ``towers`` is 0.

    a: (N, C, H, W). Returns the same shape and dtype, channels-last. The result has one form for each device: C on a
    CPU, Triton on a GPU, and PyTorch operations where neither is available. As an operator of PyTorch, it is a single
    node for torch.compile and torch.export.

    All arithmetic is in float32 (float64 for float64 inputs), since squared responses of several hundred exceed the
    range of half precision. Let W be the sum over a window and s = k + alpha * W(a^2). Then b = a s^-beta and
    da = db s^-beta - 2 alpha beta a W(db a s^(-beta-1)). The gradient relies on symmetric windows: the window of i
    contains j if and only if the window of j contains i. Only the input is saved for the backward pass.
    """
    constants = size, alpha, beta, k, towers
    a = a.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(a)
    for fused in (lrn_cpu, lrn_gpu):
        if fused.serves(a, *constants):
            fused.forward(a, out, *constants)
            return out
    window_sum = _window_sum(size, towers)
    with torch.autocast(a.device.type, enabled=False):
        for block, out_block in zip(_blocks(a), _blocks(out), strict=True):
            a_block = at_least_float32(block)
            s = window_sum(a_block.square()).mul_(alpha).add_(k)
            out_block.copy_(_inverse_power(s, beta).mul_(a_block))
    return out


@torch.library.custom_op("alexnet_repro::normalise_backward", mutates_args=())
def _normalise_backward(a: Tensor, db: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> Tensor:
    """Return the gradient of ``normalise`` with respect to ``a``, given the gradient ``db`` of its result."""
    constants = size, alpha, beta, k, towers
    a = a.contiguous(memory_format=torch.channels_last)
    db = db.to(a.dtype).contiguous(memory_format=torch.channels_last)
    da = torch.empty_like(a)
    for fused in (lrn_cpu, lrn_gpu):
        if fused.serves(a, *constants):
            fused.backward(a, db, da, *constants)
            return da
    window_sum = _window_sum(size, towers)
    with torch.autocast(a.device.type, enabled=False):
        for block, db_block, da_block in zip(_blocks(a), _blocks(db), _blocks(da), strict=True):
            a_block = at_least_float32(block)
            s = window_sum(a_block.square()).mul_(alpha).add_(k)
            direct = _inverse_power(s, beta).mul_(at_least_float32(db_block))
            through_window = window_sum((direct * a_block).div_(s)).mul_(a_block)
            da_block.copy_(direct.add_(through_window, alpha=-2 * alpha * beta))
    return da


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, *ctx.constants = inputs
    ctx.save_for_backward(a)


def _gradient(ctx: Any, db: Tensor) -> tuple[Tensor | None, ...]:
    (a,) = ctx.saved_tensors
    return _normalise_backward(a, db, *ctx.constants), None, None, None, None, None


normalise.register_autograd(_gradient, setup_context=_save_input)


def _no_second_derivative(ctx: Any, *_: Tensor) -> Any:
    raise RuntimeError(
        "the fused normalisation has no second derivative: use torch.func.grad, vjp, jvp or hessian, which take the formula"
    )


_normalise_backward.register_autograd(_no_second_derivative)
normalise.register_fake(lambda a, *_: torch.empty_like(a, memory_format=torch.channels_last))
_normalise_backward.register_fake(lambda a, *_: torch.empty_like(a, memory_format=torch.channels_last))


def _window_sum(size: int, towers: int) -> WindowSum:
    """Return a function that sums over the window of each value: (n, H, W, C) -> the same shape."""

    def across_maps(x: Tensor) -> Tensor:
        by_tower = x.unflatten(-1, (towers, -1))
        maps, reach = by_tower.shape[-1], size // 2
        # run holds sums of 1, 2, 4, ... neighbours: n = 5 takes three additions instead of four
        run = F.pad(by_tower, (reach, reach))
        total, done, length = None, 0, 1
        while True:
            if size & length:
                part = run[..., done : done + maps]
                total = part if total is None else total + part
                done += length
            if done == size:
                return total.flatten(-2)  # type: ignore[union-attr]
            run = run[..., :-length] + run[..., length:]
            length *= 2

    def within_a_map(x: Tensor) -> Tensor:
        total = F.avg_pool2d(x.permute(0, 3, 1, 2), size, stride=1, padding=size // 2, divisor_override=1)
        return total.permute(0, 2, 3, 1)

    return across_maps if towers else within_a_map


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; return float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(x: Tensor) -> list[Tensor]:
    """Split channels-last (N, C, H, W) into views (n, H, W, C) that fit in the cache of a CPU.

    On other devices, return a single view.
    """
    images = len(x)
    if x.device.type == "cpu" and images:
        images = max(1, BLOCK_BYTES // (x[0].numel() * 4))
    return [block.permute(0, 2, 3, 1) for block in x.split(max(images, 1))]


def _inverse_power(s: Tensor, beta: float) -> Tensor:
    """Return s^-beta."""
    if beta == 0.75:  # s^-1/2 * sqrt(s^-1/2) is several times faster than pow
        root = s.rsqrt()
        return root.sqrt().mul_(root)
    return s.pow(-beta)
