"""The net of a layer file, written as plainly as possible, in float64. It shares no code with net/."""

from collections.abc import Mapping, Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from alexnet_repro.errors import UserError
from alexnet_repro.original.layer_files import Layer

# What people get wrong, and how it changes this net.
MISTAKES = {
    "alpha_not_divided": "the scale of the normalisation across maps is not divided by the 5 maps",
    "relu_before_norm": "in layer 1, the ReLU is applied before the normalisation",
    "norm_crosses_towers": "the windows of the normalisation cross from one tower into the other",
    "norm_left_out": "the second normalisation of layer 2, within each map, is left out",
    "floor": "conv1 is padded by 2 on all sides and its size rounded down, instead of by 3 at the right and bottom",
    "not_halved": "the outputs of fc6 and fc7 are not halved in testing",
    "bgr": "the colours of the images are in the order blue, green, red",
    "unit_scale": "pixels are from 0 to 1 instead of from 0 to 255",
}


class PlainNet:
    """A net as its layer file describes it.

    layers: from read_layers. mistake: a key of MISTAKES to make on purpose; it can be set to another at any time.

    ``weights[layer][i]`` is the weight of a layer's i-th input, (outputs, inputs, k, k) or (outputs, inputs), and
    ``biases[layer]`` its bias, (outputs,), all float64 and 0 at first. ``velocities`` has the increments of the update
    rule by the same keys.

    Raises UserError for a kind of layer that none of these nets has.
    """

    def __init__(self, layers: Sequence[Layer], image_size: int = 224, mistake: str | None = None) -> None:
        self.layers, self.mistake = list(layers), mistake
        self.weights: dict[str, list[Tensor]] = {}
        self.biases: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"data": (3, image_size, image_size)}
        for layer in layers:
            if layer.kind in ("data", "softmax", "cost.logreg"):
                continue
            if layer.kind not in ("conv", "fc", "pool", "cmrnorm", "rnorm", "hs"):
                raise UserError(f"layer {layer.name} is of type {layer.kind!r}, which this comparison does not know")
            shapes = [self.shapes[name] for name in layer.inputs]
            self.shapes[layer.name] = self._shape(layer, shapes[0])
            if layer.kind in ("conv", "fc"):
                out = self.shapes[layer.name][0]
                side = (int(layer.number("filterSize")),) * 2 if layer.kind == "conv" else ()
                inputs = [shape[0] if layer.kind == "conv" else _size(shape) for shape in shapes]
                self.weights[layer.name] = [torch.zeros(out, n, *side, dtype=torch.float64) for n in inputs]
                self.biases[layer.name] = torch.zeros(out, dtype=torch.float64)
        self.velocities: dict[str, list[Tensor]] = {}

    def _shape(self, layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
        if layer.kind == "fc":
            return (int(layer.number("outputs")),)
        if layer.kind == "conv":
            beyond = shape[1] + 2 * layer.number("padding") - layer.number("filterSize")
            return (int(layer.number("filters")), *(1 + ceil(beyond / layer.number("stride")),) * 2)
        if layer.kind == "pool":
            return (shape[0], *(1 + ceil((shape[1] - layer.number("sizeX")) / layer.number("stride")),) * 2)
        return shape

    @property
    def parameters(self) -> dict[str, list[Tensor]]:
        """The weights and, last, the bias of each layer that has any."""
        return {name: [*weights, self.biases[name]] for name, weights in self.weights.items()}

    def logits(self, images: Tensor, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits (N, classes) of mean-subtracted images (N, 3, s, s) on the 0-255 scale.

        masks: {hs layer: (N, neurons) of 0 and 1} in training; None in testing, when outputs are multiplied by ``keep``.
        """
        if self.mistake == "bgr":
            images = images.flip(1)
        values = {"data": images / 255 if self.mistake == "unit_scale" else images}
        for layer in self.layers:
            if layer.kind in ("softmax", "cost.logreg"):
                break
            if layer.kind != "data":
                values[layer.name] = x = self._output(layer, values, masks)
        return x

    def _output(self, layer: Layer, values: dict[str, Tensor], masks: Mapping[str, Tensor] | None) -> Tensor:
        parts = [values[name] for name in layer.inputs]
        x = parts[0]
        if layer.kind == "conv":
            sums = [self._convolution(layer, i, part) for i, part in enumerate(parts)]
            x = sum(sums[1:], sums[0]) + self.biases[layer.name][:, None, None]
        elif layer.kind == "fc":
            products = [part.flatten(1) @ w.T for part, w in zip(parts, self.weights[layer.name], strict=True)]
            x = sum(products[1:], products[0]) + self.biases[layer.name]
        elif layer.kind == "cmrnorm":
            if self.mistake == "relu_before_norm" and layer.name.startswith("rnorm1"):
                x = x.relu()
            x = self._across_maps(layer, x, values)
        elif layer.kind == "rnorm" and self.mistake != "norm_left_out":
            size = int(layer.number("size"))
            square = F.pad(x.square(), (size // 2,) * 4)
            total = square.unfold(2, size, 1).unfold(3, size, 1).sum((4, 5))
            x = x * (1 + layer.number("scale") / size**2 * total) ** -layer.number("pow")
        elif layer.kind == "pool":
            size, stride, side = int(layer.number("sizeX")), int(layer.number("stride")), self.shapes[layer.name][1]
            beyond = (side - 1) * stride + size - x.shape[2]
            x = F.max_pool2d(F.pad(x, (0, beyond, 0, beyond), value=-torch.inf), size, stride)
        elif layer.kind == "hs":
            keep = 1 if self.mistake == "not_halved" else layer.number("keep")
            x = x * (keep if masks is None else masks[layer.name])
        return x.relu() if layer.options.get("neuron") == "relu" else x

    def _convolution(self, layer: Layer, i: int, x: Tensor) -> Tensor:
        kernel, stride, before = self.weights[layer.name][i], int(layer.number("stride")), int(layer.number("padding"))
        if self.mistake == "floor" and layer.name.startswith("conv1"):
            return F.conv2d(F.pad(x, (2, 2, 2, 2)), kernel, stride=stride)
        after = (self.shapes[layer.name][1] - 1) * stride + kernel.shape[2] - x.shape[2] - before
        return F.conv2d(F.pad(x, (before, after, before, after)), kernel, stride=stride)

    def _across_maps(self, layer: Layer, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        size, maps = int(layer.number("size")), x.shape[1]
        square, first = x.square(), 0
        own = layer.inputs[0]
        towers = [own[:-1] + letter for letter in "ab"]
        if self.mistake == "norm_crosses_towers" and all(name in values for name in towers):
            square, first = torch.cat([values[name] for name in towers], 1).square(), towers.index(own) * maps
        total = F.pad(square, (0, 0, 0, 0, size // 2, size // 2)).unfold(1, size, 1).sum(-1)[:, first : first + maps]
        divisor = 1 if self.mistake == "alpha_not_divided" else size
        scale = layer.number("scale") / divisor
        return x * (layer.number("minDiv", 1.0) + scale * total) ** -layer.number("pow")

    def loss(self, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the negative log-likelihood of the labels (N,), averaged over the images."""
        logits = self.logits(images, masks)
        return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()

    def gradients(self, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return the gradients of the loss: for each layer, those of its weights and, last, that of its bias."""
        parameters = self.parameters
        flat = [p.requires_grad_() for group in parameters.values() for p in group]
        found = iter(torch.autograd.grad(self.loss(images, labels, masks), flat))
        for p in flat:
            p.requires_grad_(False)
        return {name: [next(found) for _ in group] for name, group in parameters.items()}

    def update(self, gradients: dict[str, list[Tensor]], rate: float, bias_rate: float) -> None:
        """Change weights and biases by the update rule of the program, with momenta and decay of the parameter file.

        rate, bias_rate: learning rates of all weights and of all biases.
        """
        for layer in self.layers:
            if layer.name not in self.weights:
                continue
            weights = self.weights[layer.name]
            own = self.velocities.setdefault(layer.name, [torch.zeros_like(g) for g in gradients[layer.name]])
            for i, (w, velocity, gradient) in enumerate(zip(weights, own, gradients[layer.name], strict=False)):
                velocity.mul_(layer.number("momW", place=i)).sub_(gradient, alpha=rate)
                velocity.sub_(w, alpha=layer.number("wc", place=i) * rate)
                w += velocity
            own[-1].mul_(layer.number("momB")).sub_(gradients[layer.name][-1], alpha=bias_rate)
            self.biases[layer.name] += own[-1]


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
