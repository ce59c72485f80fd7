"""The small CIFAR-10 networks of Sections 3.1 and 3.3.

The paper does not specify these networks. The two networks of Section 3.3 are public as layer files of the authors'
cuda-convnet: conv-local-13pct, and conv-local-11pct in two versions. The "four-layer CNN" of the text counts the two
convolutional and two locally connected layers. The "four-layer convolutional neural network" of Figure 1 may be the
same network without normalisation. It may also be cuda-convnet's simpler network of that time, layers-18pct, with three
convolutional layers and one fully connected layer. This module provides both.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_repro.net.layers import ACTIVATIONS, Stages, one_of, refuse_other_size
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm
from alexnet_repro.net.pool import MaxPool


class _SmallNet(Stages):
    """Base class of networks for float images (N, 3, s, s).

    Images are on the 0-255 scale, with the mean image subtracted.
    """

    @torch.no_grad()
    def initialise(self, **std: float) -> None:
        """Draw each layer's weights from a zero-mean Gaussian and set the biases to 0.

        std: standard deviation by layer name.
        """
        for name, deviation in std.items():
            self.get_parameter(f"{name}.weight").normal_(0, deviation)
            self.get_parameter(f"{name}.bias").zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for images (N, 3, s, s)."""
        return self.run(images)

    def activations(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of each layer by name, after the activation function, before pooling and normalisation."""
        outputs, x, layer = {}, images, ""
        for name, stage in self.named_children():
            x = stage(x)
            layer = name if name.startswith(("conv", "local")) else layer
            if name.startswith("relu"):
                outputs[layer] = x
        return outputs | {"fc10": x}


class FourLayer(_SmallNet):
    """cuda-convnet's layers-18pct: three convolutional layers and one fully connected layer.

    The convolutional layers have 32, 32 and 64 maps and 5x5 kernels with padding 2. A 3x3 pooling with stride 2 follows
    each convolution: max-pooling after the first, mean pooling after the other two.

    image_size: s, in pixels, a multiple of 8.
    activation: as in AlexNet.
    same_map_norm: whether to normalise over 3x3 positions of each map after the first and second pooling, with
        alpha = 0.00005 / 9, beta = 0.75 and k = 1.

    Raises ValueError for an unsupported value.
    """

    def __init__(
        self, classes: int = 10, *, image_size: int = 32, activation: str = "relu", same_map_norm: bool = False
    ) -> None:
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        side = pooled(image_size, 3)
        maps = (3, 32, 32, 64)
        for number in (1, 2, 3):
            self.add_module(f"conv{number}", nn.Conv2d(maps[number - 1], maps[number], 5, padding=2))
            self.add_module(f"relu{number}", ACTIVATIONS[activation]())
            self.add_module(f"pool{number}", MaxPool(3) if number == 1 else MeanPool())
            if same_map_norm and number < 3:
                self.add_module(f"norm{number}", SameMapNorm(3, 0.00005 / 9, 0.75, 1.0))
        self.add_module("flatten", nn.Flatten())
        self.fc10 = nn.Linear(64 * side**2, classes)
        self.initialise(conv1=0.0001, conv2=0.01, conv3=0.01, fc10=0.01)


NORMS = {"n9": (9, 0.001 / 9), "n5_before_pools": (5, 0.001 / 5)}  # (maps in a window, alpha)


class LocallyConnected(_SmallNet):
    """The CIFAR-10 network of Section 3.3, with convolutional and locally connected layers.

    Layers: conv1 (5x5, 64 maps), max-pooling, conv2 (5x5, 64 maps), max-pooling, local3 (3x3), local4 (3x3, 32 maps)
    and fc10 (fully connected).

    image_size: s, in pixels, a multiple of 4; 24 in the 2012 protocol.
    activation: as in AlexNet.
    lrn: whether to normalise across maps, with beta = 0.75 and k = 1.
    norm: position and window of the normalisation. "n9", the published layer file: 9 maps, alpha = 0.001 / 9, after the
        first pooling and before the second. "n5_before_pools", the first layer file: 5 maps, alpha = 0.001 / 5, before
        both poolings.
    local3_maps: 32 in conv-local-13pct and in the first conv-local-11pct, 64 in the published conv-local-11pct.

    Raises ValueError for an unsupported value.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        image_size: int = 24,
        activation: str = "relu",
        lrn: bool = True,
        norm: str = "n9",
        local3_maps: int = 64,
    ) -> None:
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        one_of("norm", norm, NORMS)
        side = pooled(image_size, 2)
        window, alpha = NORMS[norm]
        for number, inputs in ((1, 3), (2, 64)):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, 64, 5, padding=2))
            self.add_module(f"relu{number}", ACTIVATIONS[activation]())
            norms = [(f"norm{number}", LocalResponseNorm(window, alpha, 0.75, 1.0))] if lrn else []
            pool = (f"pool{number}", MaxPool(3))
            pool_first = norm == "n9" and number == 1
            for name, stage in [pool, *norms] if pool_first else [*norms, pool]:
                self.add_module(name, stage)
        self.local3 = LocalConv2d(64, local3_maps, side)
        self.relu3 = ACTIVATIONS[activation]()
        self.local4 = LocalConv2d(local3_maps, 32, side)
        self.relu4 = ACTIVATIONS[activation]()
        self.flatten = nn.Flatten()
        self.fc10 = nn.Linear(32 * side**2, classes)
        self.initialise(conv1=0.0001, conv2=0.01, local3=0.04, local4=0.04, fc10=0.01)


class LocalConv2d(nn.Module):
    """A locally connected layer: a 3x3 convolution with padding 1 and separate kernels at each position.

    (N, inputs, side, side) -> (N, outputs, side, side). The weight has shape (positions, 9 * inputs, outputs).
    Dimension 1 holds the nine pixels of a window row by row, with the inputs of each pixel adjacent. The bias has shape
    (positions, 1, outputs). One batched matrix product computes all positions.
    """

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.empty(side**2, 9 * inputs, outputs))
        self.bias = nn.Parameter(torch.empty(side**2, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, side, side) for x (N, inputs, side, side). Raise ValueError for maps of another size."""
        refuse_other_size(x, self.side)
        padded = F.pad(x, (1, 1, 1, 1)).permute(2, 3, 0, 1)  # rows, columns, N, inputs
        shifted = [
            padded[row : row + self.side, column : column + self.side] for row in range(3) for column in range(3)
        ]
        patches = torch.cat(shifted, -1).flatten(0, 1)
        y = torch.baddbmm(self.bias.to(patches.dtype), patches, self.weight.to(patches.dtype))
        return y.unflatten(0, (self.side, self.side)).permute(2, 3, 0, 1)

    def extra_repr(self) -> str:
        """Return the layer sizes for print(net)."""
        positions, inputs, outputs = self.weight.shape
        return f"{inputs // 9}, {outputs}, positions={positions}"


class MeanPool(nn.Module):
    """Mean-pooling with windows of 3x3 and stride 2, as ``mean_pool``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the means, (N, C, H', W')."""
        return mean_pool(x)


def mean_pool(x: Tensor) -> Tensor:
    """Apply mean pooling over 3x3 windows with stride 2; windows at the edge average the positions that they have.

    Without padding, count_include_pad makes no difference, but with its default of True, torch.compile of torch 2.14
    computes a wrong gradient at the edge (pytorch issue 198119).
    """
    return F.avg_pool2d(x, 3, 2, ceil_mode=True, count_include_pad=False)


def pooled(size: int, times: int) -> int:
    """Return the side of a map after ``times`` poolings, each of which halves it.

    Raises ValueError if ``size`` is not a positive multiple of ``2**times``.
    """
    if size < 1 or size % 2**times:
        raise ValueError(f"net.image_size={size}: the pooling layers of this network need a multiple of {2**times}")
    return size // 2**times
