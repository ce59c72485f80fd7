"""The net as a list of operations that any engine has, for files that run without this package."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.layers import GroupedLinear
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm


@dataclass(frozen=True)
class Step:
    """One operation: conv, linear, activation, norm, same_map_norm, pool, flatten or scale.

    name: of the layer's output, or of the layer with the weights. options: by the kind of operation.
    """

    kind: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def steps(net: AlexNet, activation: str) -> Iterator[Step]:
    """Yield the operations of a net in evaluation mode, from mean-subtracted images to logits.

    activation: name of its activation function.
    """

    def conv(name: str, beyond: int = 0) -> Step:
        layer: nn.Conv2d = net.get_submodule(name)  # type: ignore[assignment]
        pad = int(layer.padding[0])
        pads = (pad, pad, pad + beyond, pad + beyond)  # top, left, bottom, right
        return Step("conv", name, {"pads": pads, "stride": layer.stride[0], "groups": layer.groups})

    def norm(name: str, layer: nn.Module) -> Iterator[Step]:
        if isinstance(layer, LocalResponseNorm | SameMapNorm):
            constants = {"size": layer.size, "alpha": layer.alpha, "beta": layer.beta, "k": layer.k}
            across = isinstance(layer, LocalResponseNorm)
            yield Step("norm", name, constants | {"groups": layer.groups}) if across else Step("same_map_norm", name, constants)  # fmt: skip

    def pool(name: str) -> Step:
        size = 3 if net.pooling == "overlapping" else 2
        return Step("pool", name, {"size": size, "ceil": name not in net.floor_pools})

    active = Step("activation", options={"function": activation})
    yield conv("conv1", (11 - net.image_size) % 4)
    if net.layer1_order == "norm_pool_relu":
        yield from (*norm("norm1", net.norm), pool("pool1"), active)
    elif net.pool_first:
        yield from (active, pool("pool1"), *norm("norm1", net.norm))
    else:
        yield from (active, *norm("norm1", net.norm), pool("pool1"))
    yield from (conv("conv2"), active)
    if net.pool_first:
        yield from (pool("pool2"), *norm("norm2", net.norm))
    else:
        yield from (*norm("norm2", net.norm), *norm("same_map_norm", net.same_map_norm), pool("pool2"))
    for name in net.deep:
        yield from (conv(name), active)
    yield pool("pool5")
    if hasattr(net, "conv6"):
        yield from (conv("conv6"), active)
    yield Step("flatten")
    for name in ("fc6", "fc7"):
        yield from (linear(net, name), active)
        if net.dropout.p:
            yield Step("scale", f"{name}.scaled", {"factor": 1 - net.dropout.p})  # Section 4.2, at test time
    if hasattr(net, "bottleneck"):
        yield linear(net, "bottleneck")
    yield linear(net, "fc8")


def linear(net: AlexNet, name: str) -> Step:
    """Return the step of a fully connected layer."""
    layer = net.get_submodule(name)
    assert isinstance(layer, GroupedLinear)
    return Step("linear", name, {"groups": layer.groups})


class ExportedNet(nn.Module):
    """The net in PyTorch's own operations, in evaluation mode: RGB images (N, 3, s, s) from 0 to 255 to logits.

    mean: the mean image's central patch, (3, s, s), which is subtracted first.
    """

    mean: Tensor

    def __init__(self, net: AlexNet, activation: str, mean: Tensor) -> None:
        super().__init__()
        self.steps = list(steps(net, activation))
        self.layers = nn.ModuleDict({name: layer for name, layer in net.named_children() if list(layer.parameters())})
        self.register_buffer("mean", mean)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes)."""
        x = images - self.mean
        for step in self.steps:
            x = self._done(step, x)
        return x

    def _done(self, step: Step, x: Tensor) -> Tensor:
        own = step.options
        if step.kind == "conv":
            top, left, bottom, right = own["pads"]
            layer = self.layers[step.name]
            return F.conv2d(F.pad(x, (left, right, top, bottom)), layer.weight, layer.bias, own["stride"], 0, 1, own["groups"])  # type: ignore[arg-type]  # fmt: skip
        if step.kind == "linear":
            return self.layers[step.name](x)
        if step.kind == "activation":
            return {
                "relu": torch.relu,
                "tanh": torch.tanh,
                "abs_tanh": lambda y: torch.tanh(y).abs(),
                "sigmoid": torch.sigmoid,
            }[own["function"]](x)
        if step.kind == "norm":  # PyTorch divides alpha by the size
            parts = x.chunk(own["groups"], 1)
            size = own["size"]
            return torch.cat([F.local_response_norm(p, size, own["alpha"] * size, own["beta"], own["k"]) for p in parts], 1)  # fmt: skip
        if step.kind == "same_map_norm":
            size = own["size"]
            sums = F.avg_pool2d(x.square(), size, 1, size // 2, count_include_pad=True) * size**2
            return x / (own["k"] + own["alpha"] * sums) ** own["beta"]
        if step.kind == "pool":
            return F.max_pool2d(x, own["size"], 2, ceil_mode=own["ceil"])
        return x.flatten(1) if step.kind == "flatten" else x * own["factor"]
