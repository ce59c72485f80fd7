"""The net as a list of operations that any engine has, for files that run without this package."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.dropout import Dropout
from alexnet_repro.net.layers import ACTIVATIONS, GroupedLinear
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm
from alexnet_repro.net.pool import MaxPool


@dataclass(frozen=True)
class Step:
    """One operation: conv, linear, activation, norm, same_map_norm, pool, flatten or scale.

    name: of the layer's output, or of the layer with the weights. options: by the kind of operation.
    """

    kind: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


FUNCTIONS = {module: name for name, module in ACTIVATIONS.items()}


def steps(net: AlexNet) -> Iterator[Step]:
    """Yield the operations of a net in evaluation mode, from mean-subtracted images to logits: one for each stage."""
    before = ""
    for name, stage in net.named_children():
        match stage:
            case nn.Conv2d():
                pad, beyond = int(stage.padding[0]), getattr(stage, "beyond", 0)
                pads = (pad, pad, pad + beyond, pad + beyond)  # top, left, bottom, right
                yield Step("conv", name, {"pads": pads, "stride": stage.stride[0], "groups": stage.groups})
            case GroupedLinear():
                yield Step("linear", name, {"groups": stage.groups})
            case LocalResponseNorm() | SameMapNorm():
                constants = {"size": stage.size, "alpha": stage.alpha, "beta": stage.beta, "k": stage.k}
                if isinstance(stage, LocalResponseNorm):
                    yield Step("norm", name, constants | {"groups": stage.groups})
                else:
                    yield Step("same_map_norm", "same_map_norm", constants)
            case MaxPool():
                yield Step("pool", name, {"size": stage.size, "ceil": stage.ceil})
            case nn.Flatten():
                yield Step("flatten")
            case Dropout():
                if stage.p:  # Section 4.2, at test time
                    yield Step("scale", f"{before}.scaled", {"factor": 1 - stage.p})
            case _:
                yield Step("activation", options={"function": FUNCTIONS[type(stage)]})
        before = name if isinstance(stage, GroupedLinear) else before


class ExportedNet(nn.Module):
    """The net in PyTorch's own operations, in evaluation mode: RGB images (N, 3, s, s) from 0 to 255 to logits.

    mean: the mean image's central patch, (3, s, s), which is subtracted first.
    """

    mean: Tensor

    def __init__(self, net: AlexNet, mean: Tensor) -> None:
        super().__init__()
        self.steps = list(steps(net))
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
