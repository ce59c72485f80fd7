"""What the nets share: activation functions, a linear layer in parts, and checks of options and sizes."""

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)


class AbsTanh(nn.Module):
    """|tanh x|, the nonlinearity of Jarrett et al. 2009, cited in Section 3.1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return |tanh x|."""
        return torch.tanh(x).abs()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "abs_tanh": AbsTanh,
    "sigmoid": nn.Sigmoid,
}


class Stages(nn.Sequential):
    """A net as a sequence of named modules, each of which is called once. A slice of it is a plain nn.Sequential."""

    def __getitem__(self, index: Any) -> Any:
        """Return a stage, or a part of the net such as ``net[:15]``, the convolutional layers, for images of any size."""
        named = list(self.named_children())[index]
        return nn.Sequential(OrderedDict(named)) if isinstance(index, slice) else named[1]

    def run(self, x: Tensor) -> Tensor:
        """Return the output of the last module.

        In training, a ReLU overwrites the output of the layer before it, unless a hook could see that.
        """
        overwrites = self.training and not (
            torch.compiler.is_compiling() or isinstance(x, Proxy) or hooked_everywhere()
        )
        before: nn.Module | None = None
        for stage in self:
            if overwrites and type(stage) is nn.ReLU and not (is_hooked(stage) or is_hooked(before)):
                x = F.relu_(x)
            else:
                x = stage(x)
            before = stage
        return x


def is_hooked(module: nn.Module | None) -> bool:
    """Return whether a hook sees the inputs, outputs or gradients of a module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return module is not None and any(getattr(module, kind) for kind in kinds)


def hooked_everywhere() -> bool:
    """Return whether a hook is registered for all modules."""
    return any((_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks))


def compiled_for_gpu(x: Tensor) -> bool:
    """Return whether torch.compile is tracing for a GPU.

    It then joins copies with the operations before and after them. Otherwise, each costs a launch, and the host, which
    has to launch hundreds of kernels for an update, is the limit.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.is_cuda


class GroupedConv2d(nn.Conv2d):
    """A convolution of ``groups`` independent parts, without dilation.

    Compiled for a GPU, each part is a convolution of its own: in bfloat16, cuDNN chose slow kernels for groups.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H', W') for maps (N, in_channels, H, W)."""
        if self.groups == 1 or not compiled_for_gpu(x):
            return super().forward(x)
        assert self.bias is not None
        maps, weights, biases = x.chunk(self.groups, 1), self.weight.chunk(self.groups), self.bias.chunk(self.groups)
        parts = []
        for part, weight, bias in zip(maps, weights, biases, strict=True):
            part = part.contiguous(memory_format=torch.channels_last)
            parts.append(_ContiguousGradient.apply(F.conv2d(part, weight, bias, self.stride, self.padding)))
        return torch.cat(parts, 1)


class _ContiguousGradient(torch.autograd.Function):
    """Copy the gradient of a part, which is every other part of each position, once instead of in each product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.contiguous(memory_format=torch.channels_last)


class StridedConv2d(nn.Conv2d):
    """A convolution whose kernel and stride are square, such as conv1's, of few maps.

    beyond: rows and columns of zeros that are added to the image at the bottom and on the right.

    Compiled for a GPU, it is one of stride 1 over blocks of stride x stride pixels, each of which becomes a position
    with as many more maps. The matrix units can't be used well for three maps.
    """

    def __init__(self, maps: int, outputs: int, size: int, stride: int, beyond: int = 0) -> None:
        super().__init__(maps, outputs, size, stride=stride)
        self.beyond = beyond

    def extra_repr(self) -> str:
        """Return the sizes for print(net)."""
        return super().extra_repr() + f", beyond={self.beyond}"

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H', W') for maps (N, in_channels, H, W)."""
        x = F.pad(x, (0, self.beyond, 0, self.beyond))
        if not compiled_for_gpu(x):
            return super().forward(x)
        size, stride = self.kernel_size[0], self.stride[0]
        blocks = -(-size // stride)  # of a kernel, which is enlarged by zeros
        down, right = [(side - size) // stride + blocks for side in x.shape[2:]]
        x = F.pad(x, (0, right * stride - x.shape[3], 0, down * stride - x.shape[2]))
        x = F.pixel_unshuffle(x, stride).contiguous(memory_format=torch.channels_last)
        wider = F.pad(self.weight, 2 * (0, blocks * stride - size))
        weight = F.pixel_unshuffle(wider, stride).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias)


class GroupedLinear(nn.Module):
    """A fully connected layer of ``groups`` independent parts, analogous to a grouped convolution.

    Part i maps the i-th chunk of the inputs to the i-th chunk of the outputs: (N, inputs) -> (N, outputs). The weight
    has shape (outputs, inputs / groups), so that each tower's part is a slice of dimension 0.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = inputs, outputs, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs) for inputs (N, inputs)."""
        if self.groups == 1:
            return F.linear(x, self.weight, self.bias)
        parts = zip(*(t.chunk(self.groups, -1) for t in (x, self.bias)), self.weight.chunk(self.groups), strict=True)
        return torch.cat([F.linear(part, weight, bias) for part, bias, weight in parts], 1)

    def extra_repr(self) -> str:
        """Return the layer sizes for print(net)."""
        return f"{self.in_features}, {self.out_features}, groups={self.groups}"


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise a ValueError that names the option net.<name> if ``value`` is not in ``allowed``."""
    if value not in allowed:
        raise ValueError(f"net.{name}={value}: this must be one of {', '.join(map(str, allowed))}")


def refuse_other_size(images: Tensor, size: int) -> None:
    """Raise ValueError unless images or maps (N, C, H, W) are size x size. While torch.fx traces, sizes are not known."""
    if not isinstance(images, Proxy) and images.shape[2:] != (size, size):
        raise ValueError(
            f"{images.shape[2]}x{images.shape[3]}: the net was built for {size}x{size}; its convolutional layers, net[:n] up to "
            "flatten, take images of any size"
        )
