"""What the nets share: activation functions, a linear layer in parts, and checks of options and sizes."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F


def abs_tanh(x: Tensor) -> Tensor:
    """Return |tanh x|, the nonlinearity of Jarrett et al. 2009, cited in Section 3.1."""
    return torch.tanh(x).abs()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,  # in place, since nothing else uses the layer output that it overwrites
    "tanh": torch.tanh,
    "abs_tanh": abs_tanh,
    "sigmoid": torch.sigmoid,
}


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
        raise ValueError(f"{images.shape[2]}x{images.shape[3]}: the net was built for {size}x{size}")
