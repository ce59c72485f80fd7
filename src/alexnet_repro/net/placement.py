"""Place the two towers on two devices, which exchange only shared tensors (Section 3.2, Figure 2).

Each device keeps its half of every layer's maps, which is half of dimension 0 of every parameter, and runs the network
of alexnet.py on this half. A layer that reads both towers first receives the other tower's maps:

    layer                input                                exchanged
    conv1                the image, the same on both devices  no
    conv2, conv4, conv5  maps of the same tower               no
    conv3                all maps of pool2                    yes
    conv6, if any        all maps of pool5                    yes
    fc6, fc7, fc8        all neurons of the layer below       yes (and bottleneck, if any)
    softmax              all logits                           yes

The ``groups`` of a layer determine its input: 2 for its own tower, 1 for both towers. Placement therefore works for
every two-tower variant of the network.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.dropout import Dropout
from alexnet_repro.net.layers import GroupedLinear
from alexnet_repro.net.lrn import LocalResponseNorm

TOWERS = 2


class Link:
    """Connection to the device of the other tower.

    bytes, seconds: number of bytes sent by this device, and duration of the exchanges, by layer.
    """

    def __init__(self, group: dist.ProcessGroup | None, tower: int) -> None:
        self.group, self.tower = group, tower
        self.bytes: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)

    def swap(self, own: Tensor, layer: str) -> Tensor:
        """Send the contiguous tensor ``own`` and return the other device's tensor of the same shape."""
        began = time.perf_counter()
        both = [torch.empty_like(own) for _ in range(TOWERS)]
        dist.all_gather(both, own, group=self.group)
        self.bytes[layer] += own.numel() * own.element_size()
        self.seconds[layer] += time.perf_counter() - began
        return both[1 - self.tower]

    def join(self, own: Tensor, layer: str) -> Tensor:
        """Concatenate the maps of both towers along dimension 1, in tower order.

        The result keeps the channels-last layout.
        """
        last = own.movedim(1, -1).contiguous()
        parts = [last, self.swap(last, layer)]
        return torch.cat(parts[:: 1 - 2 * self.tower], -1).movedim(-1, 1)


class _ReadBothTowers(torch.autograd.Function):
    """Gather the maps of both towers.

    The backward pass sums both devices' gradients with respect to this tower's maps.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, link: Link, layer: str) -> Tensor:
        ctx.link, ctx.layer = link, layer
        return link.join(own, layer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        link = ctx.link
        parts = [part.movedim(1, -1).contiguous() for part in gradient.chunk(TOWERS, 1)]
        from_other = link.swap(parts[1 - link.tower], ctx.layer)
        return (parts[link.tower] + from_other).movedim(-1, 1), None, None


class _JoinLogits(torch.autograd.Function):
    """Gather all ``classes`` logits.

    The backward pass takes this tower's slice of the gradient, since both devices compute the same loss.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, link: Link, classes: int) -> Tensor:
        half = -(-classes // TOWERS)  # tower 0 has one class more if the number is odd
        ctx.part = slice(link.tower * half, link.tower * half + own.shape[1])
        return link.join(F.pad(own, (0, half - own.shape[1])), "softmax")[:, :classes].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[:, ctx.part], None, None


def keep_tower(net: Any, link: Link) -> None:
    """Reduce the network to this device's tower, in place.

    Sets ``net.whole_rows`` to the number of rows of each parameter of the whole network, by parameter name. Raises
    ValueError for a network with one tower, or with normalisation across towers.
    """
    if net.towers != TOWERS:
        raise ValueError(f"a network with {net.towers} tower has no second tower to place on another device")
    norms = [stage for stage in net if isinstance(stage, LocalResponseNorm)]
    if any(norm.groups == 1 for norm in norms):
        raise ValueError(
            "net.lrn_across_towers=true can't be placed on two devices: its windows need both towers' maps"
        )
    net.whole_rows = {name: len(parameter) for name, parameter in net.named_parameters()}
    for name, layer in net.named_children():
        if not isinstance(layer, nn.Conv2d | GroupedLinear):
            continue
        for key, parameter in list(layer.named_parameters()):
            setattr(layer, key, nn.Parameter(half_of(parameter.detach(), link.tower)))
        if layer.groups == TOWERS:
            layer.groups = 1  # the part on this device is a single group
        elif name != "conv1":
            layer.register_forward_pre_hook(_reader(link, name))
    classes = net.fc8.out_features
    net.fc8.register_forward_hook(lambda _, __, own: _JoinLogits.apply(own, link, classes))
    for norm in norms:
        norm.groups = 1
    for stage in net:
        if isinstance(stage, Dropout):
            stage.towers = [link.tower]


def _reader(link: Link, name: str) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda _, inputs: _ReadBothTowers.apply(inputs[0], link, name)


def half_of(whole: Tensor, tower: int) -> Tensor:
    """Return one tower's half, along dimension 0, of a whole parameter or momentum buffer."""
    return whole.chunk(TOWERS)[tower].clone()


def whole_of(half: Tensor, link: Link, rows: int) -> Tensor:
    """Join the halves of both devices along dimension 0: the inverse of ``half_of``.

    Both devices must call this function. rows: size of dimension 0 of the result.
    """
    largest_half = -(-rows // TOWERS)
    padded = torch.cat([half, half.new_zeros(largest_half - len(half), *half.shape[1:])]).contiguous()
    both = [padded, link.swap(padded, "checkpoint")]
    return torch.cat(both[:: 1 - 2 * link.tower])[:rows]


def crossing_bytes(net: AlexNet, images: int, element: int = 4) -> dict[str, int]:
    """Return the number of bytes that each device sends in one training step, by layer.

    In the forward pass, a device sends its half of the layer's input. In the backward pass, it sends the gradient of
    the other half, which has the same size. A device sends its half of the logits in the forward pass only.

    net: the whole network. images: number of images in the batch. element: bytes per number.
    """
    sent = {}
    for name, layer in net.named_children():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and name != "conv1":
            side = math.isqrt(net.fc6.in_features // layer.out_channels) if name == "conv6" else net.pool2_side
            sent[name] = 2 * images * (layer.in_channels // TOWERS) * side**2 * element
        elif isinstance(layer, GroupedLinear) and layer.groups == 1:
            sent[name] = 2 * images * (layer.in_features // TOWERS) * element
    return sent | {"softmax": images * -(-net.fc8.out_features // TOWERS) * element}
