"""Build a net by its name, and compile it."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.cifar import FourLayer, LocallyConnected

# A net of your own is one line here (docs/CONTRIBUTING.md): a module with the keyword arguments classes and its options.
NETS: dict[str, type[nn.Module]] = {
    "alexnet": AlexNet,
    "four_layer": FourLayer,
    "locally_connected": LocallyConnected,
}


def build(name: str, **options: Any) -> Any:
    """Build a net by its name. Raise ValueError for an unknown name or option, or an invalid value."""
    known = parameters(name)
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"net={name} has no {', '.join(unknown)} option{'s' * (len(unknown) > 1)}")
    return NETS[name](**options)


def parameters(name: str) -> dict[str, Parameter]:
    """Return the keyword arguments of a net by its name. Raise ValueError for an unknown name."""
    if name not in NETS:
        raise ValueError(f"net.name={name}: this must be one of {', '.join(NETS)}")
    return dict(signature(NETS[name], eval_str=True).parameters)


def compiled(net: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """Return the net's forward pass, which is compiled with its backward pass when it is first called.

    mode: "default", or "graphs" to record both as CUDA graphs, too.
    """
    modes = {"default": "default", "graphs": "reduce-overhead"}
    forward: Callable[[Tensor], Tensor] = torch.compile(net.forward, mode=modes[mode], dynamic=False, fullgraph=True)
    return forward
