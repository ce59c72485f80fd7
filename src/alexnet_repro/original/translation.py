"""Name the layers of a layer file as this package does, and hand weights from one net to the other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from alexnet_repro.configs import CONF
from alexnet_repro.errors import UserError
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.build import build
from alexnet_repro.original.layer_files import Layer
from alexnet_repro.original.plain_net import PlainNet


def recipe_of(*files: str) -> Any:
    """Return conf's values for recipe=as_run with other config files, such as ablation/no_lrn."""
    loaded = [OmegaConf.load(Path(CONF) / f"{file}.yaml") for file in ("recipe/paper", "recipe/as_run", *files)]
    return OmegaConf.merge({"net": OmegaConf.load(Path(CONF) / "net" / "alexnet.yaml")}, *loaded)


def own_net(recipe: Any, layers: list[Layer]) -> AlexNet:
    """Return this package's net, as wide as that of the layer file, in float64.

    Raises UserError for a file without a convolutional or a fully connected layer.
    """
    for kind in ("conv", "fc"):
        if not any(layer.kind == kind for layer in layers):
            raise UserError(f"the layer file has no layer with type={kind}", "choose the layer file of an ImageNet run")
    first = next(layer for layer in layers if layer.kind == "conv")
    last = [layer for layer in layers if layer.kind == "fc"][-1]
    options: dict[str, Any] = {**recipe.net, "image_size": 224}
    options |= {"classes": int(last.number("outputs")), "width": first.number("filters") / 48}
    return build(**options).double()


def names_here(layers: list[Layer]) -> dict[str, tuple[str, str]]:
    """Return {layer with weights: (its name here, its tower: a, b, or nothing if it belongs to both)}."""
    stages: dict[str, str] = {}
    found = {}
    for layer in layers:
        if layer.kind in ("conv", "fc"):
            tower = layer.name[-1] if layer.name[-1] in "ab" else ""
            stage = layer.name.removesuffix(tower)
            fully_connected = ("fc6", "fc7", "fc8")[min(2, sum(name.startswith("fc") for name in stages.values()))]
            stages.setdefault(stage, stage if layer.kind == "conv" else fully_connected)
            found[layer.name] = (stages[stage], tower)
    return found


def _part(tensor: Tensor, tower: str, dimension: int, towers: int) -> Tensor:
    return tensor if not tower or towers == 1 else tensor.chunk(2, dimension)["ab".index(tower)]


def in_file_order(
    net: AlexNet, layers: list[Layer], of: Callable[[str], Tensor]
) -> Iterator[tuple[Layer, list[Tensor]]]:
    """Yield each layer of the file with its part of the tensors of this package's net: weights by input, then bias.

    of: returns the tensor of a parameter, such as fc7.weight.
    """
    columns = names_here(layers)
    by_name = {layer.name: layer for layer in layers}
    for layer in layers:
        if layer.name not in columns:
            continue
        name, tower = columns[layer.name]
        weight = _part(of(f"{name}.weight"), tower, 0, net.towers)
        joined = len(layer.inputs) > 1  # else the weight has only the inputs of its own tower
        parts = []
        for source in layer.inputs:
            while by_name[source].kind not in ("conv", "fc", "data"):
                source = by_name[source].inputs[0]
            parts.append(_part(weight, source[-1] if joined else "", 1, net.towers))
        yield layer, [*parts, _part(of(f"{name}.bias"), tower, 0, net.towers)]


def plain_copy(net: AlexNet, layers: list[Layer]) -> PlainNet:
    """Return the plain net with a copy of the weights of this package's net.

    Raises ValueError if a layer of the file has weights of another shape.
    """
    plain = PlainNet(layers)
    for layer, parts in in_file_order(net, layers, lambda name: net.get_parameter(name).detach()):
        for own, part in zip(plain.parameters[layer.name], parts, strict=True):
            if own.shape != part.shape:
                raise ValueError(f"{layer.name} has weights {list(part.shape)} and {list(own.shape)}")
            own.copy_(part)
    return plain


def relative(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference of two tensors as a share of the norm of the other."""
    return float((one - other).norm() / other.norm()) if other.norm() else float(one.norm())
