"""Compare the net with the paper's numbers and with an implementation of two separate towers."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.nn import functional as F

from alexnet_repro.data.photos import patches
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.dropout import Dropout, philox
from alexnet_repro.net.lrn import plain_local_response_norm

# From the 2012 layer file of configuration 145: the sums of its two columns.
PARAMETERS = {
    "conv1": 34_944, "conv2": 307_456, "conv3": 885_120, "conv4": 663_936, "conv5": 442_624,
    "fc6": 37_752_832, "fc7": 16_781_312, "fc8": 4_097_000,
}  # fmt: skip
NEURONS = {
    "conv1": 290_400, "conv2": 186_624, "conv3": 64_896, "conv4": 64_896, "conv5": 43_264,
    "fc6": 4096, "fc7": 4096, "fc8": 1000,
}  # fmt: skip
SIZES = {"conv1": 55, "conv2": 27, "conv3": 13, "conv4": 13, "conv5": 13, "pool5": 6}


@pytest.fixture(scope="module")
def net() -> AlexNet:
    torch.manual_seed(0)
    return AlexNet().eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 60


def test_layers_have_the_parameter_counts_of_2012(net: AlexNet) -> None:
    counted = {name: sum(p.numel() for p in layer.parameters()) for name, layer in net.named_children()}
    assert {name: count for name, count in counted.items() if count} == PARAMETERS
    assert sum(p.numel() for p in net.parameters()) == 60_965_224
    assert [name for name, _ in net.named_parameters()] == [
        f"{n}.{kind}" for n in PARAMETERS for kind in ("weight", "bias")
    ]


def test_layers_have_the_map_sizes_and_neuron_counts_of_the_paper(net: AlexNet, images: torch.Tensor) -> None:
    seen = net.activations(images)
    assert list(seen) == ["conv1", "conv2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8"]
    assert {name: seen[name][0].numel() for name in NEURONS} == NEURONS
    assert {name: tuple(seen[name].shape[2:]) for name in SIZES} == {name: (size, size) for name, size in SIZES.items()}
    torch.testing.assert_close(seen["fc8"], net(images))


def two_towers(net: AlexNet, images: torch.Tensor, as_run: bool = False) -> torch.Tensor:
    """Compute the logits of Figure 2, or of configuration 145 of 2012, in float64.

    Each tower is computed separately. The towers share only the connections that Figure 2 draws as arrows.
    """
    weight = {name: p.detach().double() for name, p in net.named_parameters()}

    def half(name: str, tower: int) -> tuple[torch.Tensor, torch.Tensor]:
        return weight[f"{name}.weight"].chunk(2)[tower], weight[f"{name}.bias"].chunk(2)[tower]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return plain_local_response_norm(x, 5, 1e-4 / 5 if as_run else 1e-4, 0.75, 2.0)

    def same_map_norm(x: torch.Tensor) -> torch.Tensor:
        window = torch.ones(x.shape[1], 1, 5, 5, dtype=x.dtype)
        return x / (1 + 0.001 / 25 * F.conv2d(x**2, window, padding=2, groups=x.shape[1])) ** 0.75

    def pool(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, 2)

    image = torch.zeros(len(images), 3, 227, 227, dtype=torch.float64)
    image[:, :, :224, :224] = images
    below = [image, image]
    below = [F.conv2d(below[t], *half("conv1", t), stride=4) for t in (0, 1)]
    below = [F.relu(pool(norm(x))) if as_run else pool(norm(F.relu(x))) for x in below]
    below = [norm(F.relu(F.conv2d(below[t], *half("conv2", t), padding=2))) for t in (0, 1)]
    below = [pool(same_map_norm(x) if as_run else x) for x in below]
    both = torch.cat(below, 1)
    below = [F.relu(F.conv2d(both, *half("conv3", t), padding=1)) for t in (0, 1)]
    below = [F.relu(F.conv2d(below[t], *half("conv4", t), padding=1)) for t in (0, 1)]
    below = [pool(F.relu(F.conv2d(below[t], *half("conv5", t), padding=1))) for t in (0, 1)]
    both = torch.cat(below, 1).flatten(1)
    for name in ("fc6", "fc7"):
        both = 0.5 * torch.cat([F.relu(F.linear(both, *half(name, t))) for t in (0, 1)], 1)
    return F.linear(both, weight["fc8.weight"], weight["fc8.bias"])


def test_one_device_net_equals_two_towers_in_float64(net: AlexNet, images: torch.Tensor) -> None:
    expected = two_towers(net, images)
    spread = expected.std().item()  # the paper's initialisation gives nearly equal logits, so compare with their spread
    with torch.no_grad():
        assert (net(images).double() - expected).abs().max().item() < 1e-4 * spread
        exact = AlexNet().double().eval()
        exact.load_state_dict(net.state_dict())
        torch.testing.assert_close(exact(images.double()), expected, rtol=1e-10, atol=1e-12)


def test_2012_net_equals_its_layer_file_in_float64(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    options = {"init": "as_run", "lrn_alpha": 2e-5, "layer1_order": "norm_pool_relu", "same_map_norm": True}
    net = AlexNet(classes=10, **options).double().eval()  # type: ignore[arg-type]
    torch.testing.assert_close(net(images.double()), two_towers(net, images, as_run=True), rtol=1e-10, atol=1e-12)


# From the 2012 log and layer files. The counts without a layer are computed from them.
VARIANTS = [
    ({"towers": 1}, 59_798_312, [(48, 55), (128, 27), (192, 13), (192, 13), (256, 13), (256, 6)]),
    ({"pooling": "non_overlapping"}, 60_965_224, [(96, 55), (256, 26), (384, 13), (384, 13), (256, 11), (256, 6)]),
    ({"communication": False}, 60_714_408, [(96, 55), (320, 27), (384, 13), (384, 13), (256, 13), (256, 6)]),
    ({"conv3": False}, 60_965_224 - 885_120 - 384 * 64 * 9, [(96, 55), (256, 27), (384, 13), (256, 13), (256, 6)]),
    ({"conv4": False}, 60_965_224 - 663_936, [(96, 55), (256, 27), (384, 13), (256, 13), (256, 6)]),
    ({"conv6": True}, 61_555_304, [(96, 55), (256, 27), (384, 13), (384, 13), (256, 13), (256, 6), (256, 6)]),
    (
        {"bottleneck": 2048, "classes": 21_843},  # the 2012 net for ImageNet Fall 2011
        60_965_224 - 4_097_000 + 4096 * 2048 + 2048 + 2048 * 21_843 + 21_843,
        [(96, 55), (256, 27), (384, 13), (384, 13), (256, 13), (256, 6)],
    ),
    ({"conv5": False}, 60_965_224 - 442_624 + 128 * 36 * 4096, [(96, 55), (256, 27), (384, 13), (384, 13), (384, 6)]),
]


@pytest.mark.parametrize("options", [{}, {"towers": 1}, {"communication": False}, {"conv6": True}])
def test_quarter_width_has_a_sixteenth_of_the_weights_between_layers(options: dict) -> None:
    with torch.device("meta"):
        whole, quarter = AlexNet(**options), AlexNet(width=0.25, **options)
    counts = [{name: p.numel() for name, p in net.named_parameters()} for net in (whole, quarter)]
    for name, count in counts[0].items():
        fixed = "bias" in name or name in ("conv1.weight", "fc8.weight")  # one end does not get narrower
        expected = count if name == "fc8.bias" else count / (4 if fixed else 16)
        assert counts[1][name] == expected, name


@pytest.mark.parametrize("size", [64, 96, 128, 227])
@pytest.mark.parametrize("pooling", ["overlapping", "non_overlapping"])
@pytest.mark.parametrize("conv5", [True, False])
def test_other_image_sizes_have_the_maps_that_torch_computes(size: int, pooling: str, conv5: bool) -> None:
    with torch.device("meta"):
        net = AlexNet(image_size=size, width=0.25, pooling=pooling, conv5=conv5, lrn=False)
        seen = net.activations(torch.empty(1, 3, size, size))
    assert seen["pool5"][0].numel() == net.fc6.in_features
    assert seen["conv3"].shape[2] == net.pool2_side
    assert seen["conv1"].shape[2] == math.ceil((size - 11) / 4) + 1  # no pixel is left out


@pytest.mark.parametrize(
    ("init", "divisor", "spread"),
    [("as_run", 1, 0.042), ("paper", 1, 0.0030), ("as_run", 58, 0.0014), ("paper", 58, 0.00007)],
)
def test_logits_of_images_differ_at_first_as_a_forward_pass_in_numpy_predicts(
    init: str, divisor: int, spread: float
) -> None:
    """The predictions are for synthetic images; photographs differ a little from them."""
    photographs = [read() for split, _, _, read in patches(0, 2, 224) if split == "val"]
    images = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).float()
    torch.manual_seed(0)
    net = AlexNet(init=init).eval()
    with torch.inference_mode():
        found = net((images - images.mean((0, 2, 3), keepdim=True)) / divisor).std(0).mean().item()
    assert found == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("init", ["paper", "as_run"])
def test_narrow_net_starts_with_the_spread_of_the_whole_net(init: str) -> None:
    deviations = []
    for options in ({}, {"image_size": 96, "width": 0.25}):
        drawn = []
        for seed in range(3):
            torch.manual_seed(seed)
            net = AlexNet(10, init=init, bias_init=0, **options).eval()
            with torch.inference_mode():
                seen = net.activations(60 * torch.randn(4, 3, net.image_size, net.image_size))
            drawn.append({name: float(maps.std()) for name, maps in seen.items()})
        deviations.append({name: sum(d[name] for d in drawn) / 3 for name in drawn[0]})
    for name, whole in deviations[0].items():
        assert 0.6 < deviations[1][name] / whole < 1.6, (name, whole, deviations[1][name])


@pytest.mark.parametrize(("options", "parameters", "maps"), VARIANTS)
def test_ablated_nets_have_the_expected_sizes(options: dict, parameters: int, maps: list[tuple[int, int]]) -> None:
    net = AlexNet(**options)
    assert sum(p.numel() for p in net.parameters()) == parameters
    seen = net.activations(torch.zeros(1, 3, 224, 224))
    assert [(seen[name].shape[1], seen[name].shape[2]) for name in seen if name.startswith(("conv", "pool"))] == maps


def test_biases_start_at_one_or_at_zero() -> None:
    for value in (1.0, 0.0):
        net = AlexNet(2, bias_init=value)
        found = {name for name, p in net.named_parameters() if name.endswith("bias") and p.unique().tolist() == [1.0]}
        ones = {"conv2.bias", "conv4.bias", "conv5.bias", "fc6.bias", "fc7.bias"}
        assert found == (ones if value else set())
        assert all(p.unique().tolist() in ([0.0], [1.0]) for name, p in net.named_parameters() if name.endswith("bias"))


def test_conv1_has_55_positions_on_patches_of_227_without_padding(images: torch.Tensor) -> None:
    """On patches of 227x227, which many texts print, the last window of conv1 ends at the edge of the patch."""
    torch.manual_seed(0)
    net, smaller = AlexNet(2, image_size=227).eval(), AlexNet(2).eval()
    smaller.load_state_dict(net.state_dict())
    larger = torch.randn(2, 3, 227, 227)
    seen = net.activations(larger)
    assert seen["conv1"].shape == (2, 96, 55, 55)
    assert seen["fc6"].shape == (2, 4096)
    plain = torch.nn.functional.conv2d(larger, net.conv1.weight, net.conv1.bias, stride=4).relu()
    torch.testing.assert_close(seen["conv1"], plain)
    # a patch of 224 equals a patch of 227 whose last three rows and columns are the mean, which is zero
    padded = torch.zeros(2, 3, 227, 227)
    padded[:, :, :224, :224] = larger[:, :, :224, :224]
    torch.testing.assert_close(net(padded), smaller(larger[:, :, :224, :224]))
    with pytest.raises(ValueError, match="227x227: the net was built for 224x224"):
        smaller(larger)


def test_non_overlapping_pooling_keeps_partial_windows() -> None:
    x = torch.randn(1, 1, 55, 55)
    pooled = AlexNet(2, pooling="non_overlapping").pool1(x)[0, 0]
    assert pooled.shape == (28, 28)
    assert pooled[0, 3] == x[0, 0, 0:2, 6:8].max()
    assert pooled[27, 5] == x[0, 0, 54, 10:12].max()


def test_towers_without_communication_are_joined_only_in_the_last_layer(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    net = AlexNet(classes=5, communication=False).eval()
    before = net.activations(images)
    with torch.no_grad():
        net.conv1.weight[:48] += 0.01  # tower 0
    after = net.activations(images)
    for name in ("conv2", "conv3", "conv5", "fc6", "fc7"):
        first, second = (before[name] != after[name]).float().mean(dim=0).chunk(2)
        assert first.any(), name
        assert not second.any(), name
    assert (before["fc8"] != after["fc8"]).all()


def test_printed_net_equals_a_graph_of_figure_2_in_onnxruntime_on_photographs(tmp_path: Path) -> None:
    """The graph is written here from Sections 3.1 to 3.5 and Figure 2, and run by an engine that shares no code with ours."""
    import onnx
    import onnxruntime
    from onnx import helper

    torch.manual_seed(0)
    own = AlexNet().eval()
    for name, layer in own.named_children():
        if name in PARAMETERS:  # responses of about one size in all layers, so that every layer counts
            torch.nn.init.normal_(
                layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5 * (0.1 if name == "conv1" else 1)
            )
            torch.nn.init.normal_(layer.bias, std=0.3)
    nodes: list[Any] = []

    def add(kind: str, x: list[str], out: str, **options: Any) -> str:
        nodes.append(helper.make_node(kind, x, [out], **options))
        return out

    def normalised(x: str, out: str) -> str:  # each GPU's own maps; ONNX divides alpha by n, the paper does not
        nodes.append(helper.make_node("Split", [x], [f"{out}0", f"{out}1"], axis=1, num_outputs=2))
        options = {"size": 5, "alpha": 5 * 1e-4, "beta": 0.75, "bias": 2.0}
        return add("Concat", [add("LRN", [f"{out}{i}"], f"{out}n{i}", **options) for i in (0, 1)], out, axis=1)

    def pooled(x: str, out: str) -> str:
        return add("MaxPool", [x], out, kernel_shape=[3, 3], strides=[2, 2])

    def neurons(kind: str, x: str, name: str, **options: Any) -> str:
        return add("Relu", [add(kind, [x, f"{name}.weight", f"{name}.bias"], f"{name}.sum", **options)], name)

    x = neurons("Conv", "images", "conv1", strides=[4, 4], pads=[0, 0, 3, 3])
    x = pooled(normalised(x, "norm1"), "pool1")
    x = neurons("Conv", x, "conv2", pads=[2] * 4, group=2)
    x = pooled(normalised(x, "norm2"), "pool2")
    for name, group in (("conv3", 1), ("conv4", 2), ("conv5", 2)):
        x = neurons("Conv", x, name, pads=[1] * 4, group=group)
    x = add("Flatten", [pooled(x, "pool5")], "flat")
    for name in ("fc6", "fc7"):  # in testing, all neurons are used, and their outputs multiplied by 0.5
        x = add("Mul", [neurons("Gemm", x, name, transB=1), "half"], f"{name}.half")
    add("Gemm", [x, "fc8.weight", "fc8.bias"], "logits", transB=1)
    values = {"half": torch.tensor(0.5), **own.state_dict()}
    constants = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in values.items()]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)]
        for name, shape in (("images", ["N", 3, 224, 224]), ("logits", ["N", 1000]))
    ]
    graph = helper.make_graph(nodes, "figure_2", *ends, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "figure_2.onnx")

    names = ("astronaut", "chelsea", "coffee", "rocket")
    photographs = [Image.fromarray(getattr(skimage.data, name)()).resize((224, 224)) for name in names]
    images = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) - 118 for image in photographs])
    (expected,) = onnxruntime.InferenceSession(tmp_path / "figure_2.onnx").run(None, {"images": images})
    with torch.no_grad():
        found = own(torch.from_numpy(images)).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.ptp(expected, 0).max() > 0.1 * np.abs(expected).max(), "the logits must depend on the images"


@pytest.mark.parametrize(
    ("name", "function"),
    [("tanh", math.tanh), ("abs_tanh", lambda x: abs(math.tanh(x))), ("sigmoid", lambda x: 1 / (1 + math.exp(-x)))],
)
def test_activations_equal_the_functions_of_section_3_1(
    name: str, function: Callable[[float], float], images: torch.Tensor
) -> None:
    torch.manual_seed(0)
    net = AlexNet(classes=2, activation=name)
    responses = net.conv1(F.pad(images, (0, 3, 0, 3)))[0, :, 7, 9]
    seen = net.activations(images)["conv1"][0, :, 7, 9]
    assert seen.tolist() == pytest.approx([function(x) for x in responses.tolist()], abs=1e-5)


def test_initialisation_has_the_deviations_of_2012() -> None:
    torch.manual_seed(0)
    net = AlexNet(classes=10, init="as_run")
    deviations = {name: p.std().item() for name, p in net.named_parameters() if name.endswith("weight")}
    expected = dict.fromkeys(deviations, 0.01) | {f"conv{i}.weight": 0.03 for i in (3, 4, 5)}
    assert deviations == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"init": "xavier"},
        {"activation": "gelu"},
        {"towers": 3},
        {"towers": 1, "communication": False},
        {"bottleneck": -1},
        {"bottleneck": 3},
        {"lrn_k": 0},
        {"lrn_alpha": -1e-4},
    ],
)
def test_invalid_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"must be one of|no communication|even|must be positive"):
        AlexNet(**options)


def test_last_window_of_conv1_reads_three_zero_columns_beyond_the_image() -> None:
    net = AlexNet(classes=2, lrn=False)
    images = torch.randn(1, 3, 224, 224)
    window = torch.zeros(3, 11, 11)
    window[:, :8, :8] = images[0, :, 216:, 216:]
    expected = F.relu((net.conv1.weight * window).sum((1, 2, 3)))
    torch.testing.assert_close(net.activations(images)["conv1"][0, :, 54, 54], expected)


def test_initialisation_follows_section_5() -> None:
    torch.manual_seed(0)
    for name, p in AlexNet(classes=10).named_parameters():
        layer, kind = name.split(".")
        if kind == "weight":
            standard_error = 0.01 / (2 * p.numel()) ** 0.5
            assert p.std().item() == pytest.approx(0.01, abs=5 * standard_error), name
            assert abs(p.mean().item()) < 5 * 0.01 / p.numel() ** 0.5, name
        else:
            assert (p == (1 if layer in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0)).all(), name


def test_net_without_lrn_equals_identity_normalisation(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    plain = AlexNet(classes=3, lrn=False).double().eval()
    torch.manual_seed(0)
    weak = AlexNet(classes=3, lrn_k=1.0, lrn_alpha=0.0).double().eval()
    torch.testing.assert_close(plain(images.double()), weak(images.double()))
    torch.manual_seed(0)
    assert not torch.allclose(AlexNet(classes=3).double().eval()(images.double()), plain(images.double()))


class TestDropout:
    x = torch.rand(400, 64) + 1

    def test_training_does_not_rescale_and_evaluation_halves_the_outputs(self) -> None:
        layer = Dropout(0.5, layer=6)
        out = layer(self.x)
        assert set((out / self.x).unique().tolist()) == {0.0, 1.0}
        assert (out != 0).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / self.x.numel() ** 0.5)
        torch.testing.assert_close(layer.eval()(self.x), self.x * 0.5)

    def test_training_and_evaluation_agree_in_expectation(self) -> None:
        layer = Dropout(0.3, layer=6)
        x = torch.ones(1, 2000)
        trained = torch.stack([layer(x) for _ in range(200)]).mean().item()
        assert trained == pytest.approx(layer.eval()(x).mean().item(), abs=5 * 0.46 / 400_000**0.5)

    def test_masks_depend_only_on_seed_step_layer_tower_and_position(self) -> None:
        def mask(seed: int = 3, step: int = 7, number: int = 6, first: int = 0) -> torch.Tensor:
            layer = Dropout(0.5, layer=number)
            layer.draw_from(seed, step, first)
            return layer(self.x[first:]) != 0

        whole = mask()
        assert whole.float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / self.x.numel() ** 0.5)
        assert torch.equal(mask(first=100), whole[100:])  # a replica drops what one device drops
        for other in (mask(number=7), mask(step=8), mask(seed=4), mask(seed=3 + 2**32), whole.roll(1, 0)):
            assert (other != whole).float().mean().item() == pytest.approx(0.5, abs=0.02)
        assert (whole[:, :32] != whole[:, 32:]).float().mean().item() == pytest.approx(0.5, abs=0.02)
        half = Dropout(0.5, layer=6)
        half.towers = [1]  # as placement does
        half.draw_from(3, 7)
        assert torch.equal(half(self.x[:, 32:]) != 0, whole[:, 32:])

    @pytest.mark.parametrize(
        ("key", "counter", "words"),
        [
            ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ],
    )
    def test_philox_equals_the_known_answers_of_its_authors(self, key: str, counter: str, words: str) -> None:
        """The vectors of philox4x32 with 10 rounds in Random123's file kat_vectors."""
        arguments = [[torch.tensor(int(word, 16)) for word in text.split()] for text in (key, counter)]
        assert [f"{int(word):08x}" for word in philox(*arguments)] == words.split()  # type: ignore[arg-type]

    def test_zero_rate_returns_the_input(self) -> None:
        assert Dropout(0.0)(self.x) is self.x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer1_order": "norm_pool_relu", "same_map_norm": True, "conv4": False},
        {"pool_first": True, "lrn_across_towers": True},
        {"lrn": False, "activation": "tanh", "bottleneck": 8},
    ],
)
def test_every_stage_of_a_layer_has_a_name_and_follows_from_the_one_before(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = AlexNet(classes=5, width=1 / 16, image_size=99, conv6=True, **options).eval()
    images = 50 * torch.randn(2, 3, 99, 99)
    with torch.no_grad():
        out = net.activations(images, net.layer_names)
        assert list(out) == net.layer_names
        norm = functools.partial(plain_local_response_norm, size=5, alpha=1e-4, beta=0.75, k=2.0)
        norm.keywords["groups"] = 1 if options.get("lrn_across_towers") else 2
        act = torch.tanh if options.get("activation") else torch.relu
        for name in ("conv1", "conv2", "conv3", "conv5", "conv6", "fc6", "fc7"):
            assert torch.equal(out[name], act(out[f"{name}.linear"])), name
        if options.get("layer1_order"):
            torch.testing.assert_close(out["norm1"], norm(out["conv1.linear"]))
            torch.testing.assert_close(out["pool1"], torch.relu(net.pool1(out["norm1"])))
        elif options.get("pool_first"):
            torch.testing.assert_close(out["pool1"], net.pool1(out["conv1"]))
            torch.testing.assert_close(out["norm1"], norm(out["pool1"]))
            torch.testing.assert_close(out["norm2"], norm(net.pool1(out["conv2"])))
            torch.testing.assert_close(out["conv3.linear"], net.conv3(out["norm2"]))
        elif options:
            torch.testing.assert_close(out["pool2"], net.pool1(out["conv2"]))
            torch.testing.assert_close(out["fc8"], net.fc8(out["bottleneck"]))
        else:
            torch.testing.assert_close(out["norm1"], norm(out["conv1"]))
            torch.testing.assert_close(out["pool2"], net.pool2(norm(out["conv2"])))
        torch.testing.assert_close(out["fc8"], net(images))
        for name in net.layer_names:  # each alone, computed only as far as it takes
            assert torch.equal(net.activations(images, [name])[name], out[name]), name
    with pytest.raises(ValueError, match="no layer 'conv7'"):
        net.activations(images, ["conv7"])


def test_layers_above_the_last_wanted_one_are_not_computed() -> None:
    net = AlexNet(classes=5, width=1 / 16, image_size=99).eval()
    seen: list[str] = []
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    net.activations(torch.zeros(1, 3, 99, 99), ["conv3"])
    assert "conv3" in seen
    assert not {"conv4", "conv5", "fc6"} & set(seen)
