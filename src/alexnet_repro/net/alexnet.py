"""The network of Figure 2, its options and its initialisation (Sections 3 and 5).

The network is written for one device. Each of the two towers of Figure 2 is one half of the feature maps of every
layer. conv2, conv4 and conv5 read only their own tower. conv3 and the fully connected layers read both towers.
Normalisation does not cross towers.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_repro.net.dropout import Dropout
from alexnet_repro.net.layers import (
    ACTIVATIONS,
    GroupedConv2d,
    GroupedLinear,
    Stages,
    StridedConv2d,
    one_of,
    refuse_other_size,
)
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm
from alexnet_repro.net.pool import MaxPool

LAYER1_ORDERS = ("relu_norm_pool", "norm_pool_relu")
POOLS = ("pool1", "pool2", "pool5")
POOLINGS = ("overlapping", "non_overlapping")
# "We initialized the neuron biases in the second, fourth, and fifth convolutional layers, as well as in the
# fully-connected hidden layers, with the constant 1 [...] the remaining layers with the constant 0" (Section 5).
# conv6 has it in the 2012 code.
BIAS_ONE = ("conv2", "conv4", "conv5", "conv6", "fc6", "fc7")
BEFORE_NORM = "relu1 before norm1"  # with layer1_order="norm_pool_relu", a stage that only ``activations`` computes
WEIGHT_STD = {
    "paper": dict.fromkeys(
        ("conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "fc6", "fc7", "bottleneck", "fc8"), 0.01
    ),
    "as_run": {"conv1": 0.01, "conv2": 0.01, "conv3": 0.03, "conv4": 0.03, "conv5": 0.03, "conv6": 0.03}
    | dict.fromkeys(("fc6", "fc7", "bottleneck", "fc8"), 0.01),
}


class AlexNet(Stages):
    """AlexNet for 224x224x3 images, as printed: 60,965,224 parameters with 1000 classes.

    Images are float (N, 3, 224, 224), RGB on the 0-255 scale, with the mean image subtracted. Output sizes: conv1
    96x55x55, conv2 256x27x27, conv3 384x13x13, conv4 384x13x13, conv5 256x13x13, pool5 256x6x6, fc6 4096, fc7 4096,
    fc8 ``classes``. The first half of each layer's maps belongs to tower 0.

    As in the 2012 code, conv1 has 55 positions per axis for 224 pixels: its windows start at 0, 4, ..., 216. The last
    window extends three pixels beyond the image. These pixels are zero, which corresponds to the mean image.

    classes: number of classes, which are the outputs of fc8.
    image_size: side length of the images, in pixels; 224 in Section 4.1. Other sizes give smaller or larger maps, and
        fc6 then has fewer or more inputs.
    width: number of maps of each convolutional layer, and of neurons of fc6 and fc7, as a multiple of the paper's; a
        whole number of sixteenths. With another width or size, the standard deviation of the initial weights is
        multiplied by the square root of (inputs of a neuron in the full-size network / inputs here), so that the
        responses have the spread of the full-size network.
    towers: 2, or 1 for the one-GPU network with half as many kernels (Section 3.2). The one-GPU network keeps the width
        of the last convolutional layer and of the fully connected layers: 59,798,312 parameters.
    communication: whether conv3, fc6 and fc7 read both towers. False gives the network of run 150 in the 2012 log: 160
        maps per tower in conv2, 4096 neurons per tower in fc6 and 2048 in fc7. fc8 joins the towers; 60,714,408
        parameters.
    conv3, conv4, conv5: whether to include the layer (Section 7). The other layers keep their width and groups.
    conv6: whether to add "a sixth convolutional layer over the last pooling layer" (Section 6): 3x3 with padding 1, 256
        maps that read both towers, as in run 146 of the 2012 log. fc6 then reads conv6: 61,555,304 parameters.
    init: standard deviation of the initial weights. "paper" uses 0.01 (Section 5); "as_run" uses 0.03 in conv3 to
        conv6 and 0.01 elsewhere.
    bias_init: initial biases of conv2, conv4, conv5, conv6, fc6 and fc7; 1 in Section 5. All other biases start at 0.
    activation: relu, tanh, abs_tanh or sigmoid (Section 3.1).
    lrn: whether to apply local response normalisation in layers 1 and 2 (Section 3.3). False also disables
        ``same_map_norm``.
    lrn_n, lrn_k, lrn_alpha, lrn_beta: constants of the normalisation. alpha multiplies the plain sum, as printed.
    layer1_order: "relu_norm_pool" as printed, or "norm_pool_relu" as in the 2012 code.
    lrn_across_towers: whether the windows of the normalisation cross from one tower into the other, as in the nets that
        Caffe distributed.
    pool_first: whether layers 1 and 2 apply the activation function, pooling and normalisation in this order, as in
        CaffeNet.
    same_map_norm: whether layer 2 has a second normalisation, over 5x5 positions of a map (2012 code, not in the
        paper).
    pooling: "overlapping", 3x3 windows with stride 2 (Section 3.4), or "non_overlapping", 2x2 windows with stride 2.
        With non-overlapping pooling, conv2 has padding 1 and conv5 has padding 0, as in run 147 of the 2012 log. The
        maps then have side lengths 55 (conv1), 28 (pool1), 26 (conv2), 13 (pool2), 13 (conv3), 13 (conv4), 11 (conv5)
        and 6 (pool5).
    floor_pools: pooling layers (pool1, pool2, pool5) that leave out a last window which would extend beyond the map.
        The 2012 code has none. A net that was converted for ONNX has them.
    bottleneck: number of neurons of a linear layer between fc7 and fc8, without activation function and dropout; 0 for
        no such layer. The 2012 net for ImageNet Fall 2011 had one of 2048, 1024 per tower, before its 21,843 outputs.
    dropout: probability of setting a neuron of fc6 or fc7 to zero in training (Section 4.2).

    Weights are drawn from PyTorch's global generator; call torch.manual_seed first for reproducible weights. Raises
    ValueError for an unsupported value.
    """

    fc6: GroupedLinear
    fc8: GroupedLinear

    def __init__(
        self,
        classes: int = 1000,
        *,
        image_size: int = 224,
        width: float = 1.0,
        towers: int = 2,
        communication: bool = True,
        conv3: bool = True,
        conv4: bool = True,
        conv5: bool = True,
        conv6: bool = False,
        init: str = "paper",
        bias_init: float = 1.0,
        activation: str = "relu",
        lrn: bool = True,
        lrn_n: int = 5,
        lrn_k: float = 2.0,
        lrn_alpha: float = 1e-4,
        lrn_beta: float = 0.75,
        lrn_across_towers: bool = False,
        layer1_order: str = "relu_norm_pool",
        pool_first: bool = False,
        same_map_norm: bool = False,
        pooling: str = "overlapping",
        floor_pools: Collection[str] = (),
        dropout: float = 0.5,
        bottleneck: int = 0,
    ) -> None:
        super().__init__()
        one_of("init", init, WEIGHT_STD)
        one_of("activation", activation, ACTIVATIONS)
        one_of("layer1_order", layer1_order, LAYER1_ORDERS)
        one_of("pooling", pooling, POOLINGS)
        one_of("towers", towers, (1, 2))
        if towers == 1 and not communication:
            raise ValueError(
                "net.communication=false needs two towers: with one tower there is no communication to disable"
            )
        for name in floor_pools:
            one_of("floor_pools", name, POOLS)
        if pool_first and (layer1_order != "relu_norm_pool" or same_map_norm):
            raise ValueError("net.pool_first=true needs net.layer1_order=relu_norm_pool and net.same_map_norm=false")
        if bottleneck < 0 or bottleneck % 2:
            raise ValueError(f"net.bottleneck={bottleneck}: this must be even, and not negative")
        if width <= 0 or not float(16 * width).is_integer():
            raise ValueError(f"net.width={width:g}: this must be a multiple of 1/16 = 0.0625")
        self.image_size, self.towers = image_size, towers
        cross_groups = 1 if communication else towers  # groups of the layers that read both towers in Figure 2
        size, pad2, pad5 = (3, 2, 1) if pooling == "overlapping" else (2, 1, 0)

        def scaled(number: int) -> int:
            return round(number * width)  # whole, since all numbers are multiples of 16

        def pooled(side: int, name: str) -> int:
            """Return the side length of a map after a pooling layer; not positive if nothing is left."""
            return ((side - size) // 2 if name in floor_pools else -(-(side - size) // 2)) + 1

        def sides(image: int) -> tuple[int, int]:
            """Return the side lengths of pool2 and pool5 for images of this size."""
            pool2 = pooled(pooled(-(-(image - 11) // 4) + 1, "pool1") + 2 * pad2 - 4, "pool2")
            return pool2, pooled(pool2 + 2 * pad5 - 2 if conv5 else pool2, "pool5")

        self.pool2_side, side = sides(image_size)
        if side < 1:
            raise ValueError(
                f"net.image_size={image_size}: nothing is left of such images after the last pooling layer"
            )

        def active(number: str) -> tuple[str, nn.Module]:
            return f"relu{number}", ACTIVATIONS[activation]()

        def norms(number: int) -> Iterator[tuple[str, nn.Module]]:
            if lrn:
                groups = 1 if lrn_across_towers else towers
                yield f"norm{number}", LocalResponseNorm(lrn_n, lrn_alpha, lrn_beta, lrn_k, groups)
            if lrn and same_map_norm and number == 2:
                yield "same_map_norm2", SameMapNorm(5, 0.001 / 25, 0.75, 1.0)  # 2012 code: s = 0.001 / 25 positions

        def pool(number: int) -> tuple[str, nn.Module]:
            return f"pool{number}", MaxPool(size, f"pool{number}" not in floor_pools)

        def upper(number: int) -> list[tuple[str, nn.Module]]:
            """Return what follows conv1 or conv2, in its order."""
            if number == 1 and layer1_order == "norm_pool_relu":
                return [*norms(1), pool(1), active("1")]
            both = [pool(number), *norms(number)] if pool_first else [*norms(number), pool(number)]
            return [active(str(number)), *both]

        def conv(inputs: int, outputs: int, size: int, pad: int, groups: int) -> GroupedConv2d:
            return GroupedConv2d(inputs, outputs, size, padding=pad, groups=groups)

        maps, maps2 = scaled(48 * towers), scaled((128 if communication else 160) * towers)
        stages: list[tuple[str, nn.Module]] = [
            ("conv1", StridedConv2d(3, maps, 11, 4, (11 - image_size) % 4)),
            *upper(1),
        ]
        stages += [("conv2", conv(maps, maps2, 5, pad2, towers)), *upper(2)]
        maps = maps2
        middle = {
            "3": (conv3, 192 * towers, 1, cross_groups),
            "4": (conv4, 192 * towers, 1, towers),
            "5": (conv5, 256, pad5, towers),
        }
        for number, (present, outputs, pad, groups) in middle.items():
            if present:
                stages += [(f"conv{number}", conv(maps, scaled(outputs), 3, pad, groups)), active(number)]
                maps = scaled(outputs)
        stages.append(pool(5))
        if conv6:
            stages += [("conv6", conv(maps, scaled(256), 3, 1, cross_groups)), active("_conv6")]
            maps = scaled(256)
        inputs = maps * side**2
        stages.append(("flatten", nn.Flatten()))
        for number, outputs in (("6", 4096 if communication else 4096 * towers), ("7", 4096)):
            stages += [(f"fc{number}", GroupedLinear(inputs, scaled(outputs), cross_groups)), active(number)]
            stages.append((f"drop{number}", Dropout(dropout, towers, int(number))))
            inputs = scaled(outputs)
        if bottleneck:
            stages.append(("bottleneck", GroupedLinear(inputs, bottleneck, cross_groups)))
        stages.append(("fc8", GroupedLinear(bottleneck or inputs, classes, 1)))
        for name, stage in stages:
            self.add_module(name, stage)

        wider = dict.fromkeys(WEIGHT_STD[init], width**-0.5)
        wider |= {"conv1": 1.0, "fc6": wider["fc6"] * sides(224)[1] / side}
        if bottleneck:
            wider["fc8"] = 1.0  # its inputs do not depend on the width
        self.initialise({name: std * wider[name] for name, std in WEIGHT_STD[init].items()}, bias_init)

    @torch.no_grad()
    def initialise(self, std: dict[str, float], bias: float = 1.0) -> None:
        """Draw weights from zero-mean Gaussians and set the biases to constants (Section 5).

        std: standard deviation of each layer's weights, by layer name. bias: value of the biases of the layers in
        BIAS_ONE; other biases are 0.
        """
        for name, layer in self.named_children():
            if isinstance(layer, nn.Conv2d | GroupedLinear):
                assert layer.bias is not None
                layer.weight.normal_(0, std[name])
                layer.bias.fill_(bias if name in BIAS_ONE else 0)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for images (N, 3, image_size, image_size).

        Raises ValueError for images of another size.
        """
        refuse_other_size(images, self.image_size)
        return self.run(images)

    def draw_dropout(self, seed: int, step: int, first: int = 0) -> None:
        """Set the seed and the step that determine the masks of fc6 and fc7, as ``Dropout.draw_from``."""
        for stage in self:
            if isinstance(stage, Dropout):
                stage.draw_from(seed, step, first)

    def activations(self, images: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the outputs of layers by name.

        layers: names out of ``layer_names``, or names of stages, as in print(net). None: conv1 ... conv5, pool5, conv6 if there is one, fc6, fc7 and fc8.

        The name of a layer with an activation function, such as conv1 or fc7, is its output after this function; with
        ".linear", as in conv1.linear, it is the output before. Those of conv1 and conv2 are taken before normalisation
        and pooling, those of fc6 and fc7 before dropout. norm1 and norm2 are the normalised maps, pool1 and pool2 what
        the next layer reads. With layer1_order="norm_pool_relu", conv1 is the activation function applied to the
        responses before normalisation.

        The layers above the last of these names are not computed. Raises ValueError for an unknown name, or for images of
        another size than the net's.
        """
        names = self._stages_of_names()
        known = {**{stage: stage for stage, _ in self.named_children()}, **names}  # conv1: relu1, as always
        if layers is None:
            layers = [name for name in names if "." not in name and name not in ("norm1", "pool1", "norm2", "pool2")]
        for name in layers:
            if name not in known:
                raise ValueError(f"there is no layer '{name}': there are {', '.join(names)}")
        refuse_other_size(images, self.image_size)
        outputs: dict[str, Any] = dict.fromkeys(layers)
        after: dict[str, list[str]] = {}  # which outputs are those of a stage
        for name in outputs:
            after.setdefault(known[name], []).append(name)
        x = images
        for stage, module in self.named_children():
            if not after:
                break
            x = module(x)
            outputs |= dict.fromkeys(after.pop(stage, ()), x)
            if stage == "conv1" and BEFORE_NORM in after:
                outputs |= dict.fromkeys(after.pop(BEFORE_NORM), self.get_submodule("relu1")(x))
        return outputs

    @property
    def layer_names(self) -> list[str]:
        """Names of all layer outputs, in the order of computation."""
        return list(self._stages_of_names())

    def _stages_of_names(self) -> dict[str, str]:
        """Return the stage that each of ``layer_names`` is the output of."""
        stages = [name for name, _ in self.named_children()]
        names: dict[str, str] = {}
        for stage, following in zip(stages, [*stages[1:], ""], strict=True):
            if stage in ("bottleneck", "fc8") or stage.startswith("pool"):
                names[stage] = stage
            elif stage.startswith(("conv", "fc")):
                names |= {f"{stage}.linear": stage, stage: following if following.startswith("relu") else BEFORE_NORM}
            elif "norm" in stage and not following.startswith("same_map_norm"):
                names[f"norm{stage[-1]}"] = stage
        if BEFORE_NORM in names.values():
            names["pool1"] = "relu1"  # which follows it
        return names
