"""Test that tools of others see what the net computes: hooks, torchvision, captum, torchlens, torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from alexnet_repro import AlexNet, Classifier, LocalResponseNorm
from alexnet_repro.configs import CHECKOUT as ROOT
from alexnet_repro.net.cifar import FourLayer, LocallyConnected
from alexnet_repro.net.lrn import SameMapNorm, plain_local_response_norm

AS_RUN: dict[str, Any] = {"layer1_order": "norm_pool_relu", "same_map_norm": True, "lrn_alpha": 2e-5}
UPPER = [
    "conv3",
    "relu3",
    "conv4",
    "relu4",
    "conv5",
    "relu5",
    "pool5",
    "flatten",
    "fc6",
    "relu6",
    "drop6",
    "fc7",
    "relu7",
]


def small_net(**options: Any) -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(10, width=0.25, image_size=96, **options).eval()


def some_images(count: int = 2) -> Tensor:
    return 60 * torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("options", "lower"),
    [
        ({}, ["conv1", "relu1", "norm1", "pool1", "conv2", "relu2", "norm2", "pool2"]),
        (AS_RUN, ["conv1", "norm1", "pool1", "relu1", "conv2", "relu2", "norm2", "same_map_norm2", "pool2"]),
        ({"lrn": False}, ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2"]),
        ({"pool_first": True}, ["conv1", "relu1", "pool1", "norm1", "conv2", "relu2", "pool2", "norm2"]),
    ],
)
def test_the_net_is_the_sequence_of_section_3_5(options: dict[str, Any], lower: list[str]) -> None:
    names = [name for name, _ in small_net(**options).named_children()]
    assert names == [*lower, *UPPER, "drop7", "fc8"]
    more = [name for name, _ in small_net(**options, conv4=False, conv6=True, bottleneck=8).named_children()]
    assert [name for name in more if name not in names] == ["conv6", "relu_conv6", "bottleneck"]
    assert [name for name in names if name not in more] == ["conv4", "relu4"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("net", [small_net(), small_net(**AS_RUN), small_net(activation="tanh")])
def test_hooks_see_the_output_of_each_stage(net: AlexNet, training: bool) -> None:
    """A hook that keeps the output, and one that copies it at once; and what ``activations`` gives, all the same."""
    net.train(training)
    net.draw_dropout(1, 2)
    kept: dict[str, Tensor] = {}
    copied: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            kept[name], copied[name] = output, output.detach().cpu().clone()

        return see

    unhooked = net(some_images())
    handles = [stage.register_forward_hook(hook(name)) for name, stage in net.named_children()]
    assert torch.equal(net(some_images()), unhooked)
    x = some_images()
    for name, stage in net.named_children():
        x = stage(x)
        assert torch.equal(kept[name], x), name
        assert torch.equal(copied[name], x), name
    for handle in handles:
        handle.remove()
    found = net.activations(
        some_images(), ["conv1.linear", "conv5", "pool5", "fc6", "fc7.linear", "fc8", "relu5", "drop6"]
    )
    stages = ["conv1", "relu5", "pool5", "relu6", "fc7", "fc8", "relu5", "drop6"]
    for (name, value), stage in zip(found.items(), stages, strict=True):
        assert torch.equal(value, kept[stage]), name


def test_a_global_hook_and_a_hook_on_the_relu_alone_see_the_linear_output() -> None:
    net = small_net().train()
    seen: list[Tensor] = []
    with_hook = nn.modules.module.register_module_forward_hook(
        lambda m, _, y: seen.append(y) if m is net.conv1 else None
    )
    net(some_images())
    with_hook.remove()
    assert torch.equal(seen[0], net.conv1(some_images()))
    inputs: list[Tensor] = []
    handle = net.relu1.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    net(some_images())
    handle.remove()
    assert torch.equal(inputs[0], net.conv1(some_images()))
    assert float(inputs[0].detach().min()) < 0


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, AS_RUN])
def test_torchvisions_feature_extractor_needs_no_tracer_arguments(options: dict[str, Any], training: bool) -> None:
    net = small_net(**options)
    net.draw_dropout(1, 2)
    extractor = create_feature_extractor(net, ["conv1", "relu5", "pool5", "fc7", "relu7", "fc8"]).train(training)
    found = extractor(some_images())
    net.train(training)
    expected = net.activations(some_images(), ["conv1.linear", "conv5", "pool5", "fc7.linear", "fc7", "fc8"])
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("net", [FourLayer(same_map_norm=True), LocallyConnected(image_size=32)])
def test_nets_for_cifar10_are_sequences_too(net: nn.Sequential) -> None:
    images = 60 * torch.randn(2, 3, 32, 32)
    x, outputs = images, {}
    for name, stage in net.named_children():
        x = outputs[name] = stage(x)
    assert torch.equal(x, net(images))
    found = net.activations(images)  # type: ignore[operator]
    third = "conv3" if "conv3" in outputs else "local3"
    pairs = {"conv1": "relu1", "conv2": "relu2", third: "relu3", "fc10": "fc10"}
    assert all(torch.equal(found[name], outputs[stage]) for name, stage in pairs.items())


def reference(net: AlexNet) -> nn.Sequential:
    """Return the same net in PyTorch's own modules, without normalisation and dropout."""
    stages: list[nn.Module] = [nn.ZeroPad2d((0, 3, 0, 3))]
    for name, stage in net.named_children():
        if isinstance(stage, nn.Conv2d):
            own = nn.Conv2d(stage.in_channels, stage.out_channels, stage.kernel_size, stage.stride, stage.padding, groups=stage.groups)  # type: ignore[arg-type]  # fmt: skip
            own.load_state_dict(stage.state_dict())
            stages.append(own)
        elif name.startswith("fc"):
            full = nn.Linear(stage.in_features, stage.out_features)  # type: ignore[arg-type]
            full.load_state_dict(stage.state_dict())
            stages.append(full)
        elif name.startswith("pool"):
            stages.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        elif name.startswith(("relu", "flatten")):
            stages.append(nn.ReLU() if name.startswith("relu") else nn.Flatten())
    return nn.Sequential(*stages).eval()


def test_captum_sees_activations_and_attributes_as_on_plain_modules() -> None:
    attr = pytest.importorskip("captum.attr")
    net = small_net(lrn=False, dropout=0.0, bias_init=0.0)
    plain = reference(net)
    images = some_images().requires_grad_()
    assert torch.allclose(net(images), plain(images), atol=1e-5)
    seen = attr.LayerActivation(net, net.conv1).attribute(images)
    assert torch.equal(seen, net.activations(images, ["conv1.linear"])["conv1.linear"])
    guided = [attr.GuidedBackprop(one).attribute(images, target=1) for one in (net, plain)]
    gradient = attr.Saliency(net).attribute(images, target=1, abs=False)
    torch.testing.assert_close(guided[0], guided[1])
    assert (guided[0] - gradient).norm() > 0.1 * gradient.norm()  # it differs from the gradient
    deep = [attr.DeepLift(one).attribute(images, torch.zeros_like(images), target=1) for one in (net, plain)]
    torch.testing.assert_close(deep[0], deep[1], rtol=1e-3, atol=1e-6)
    maps = attr.LayerGradCam(net, net.relu5).attribute(images, target=1)
    conv5 = net.activations(images, ["conv5"])["conv5"].detach().requires_grad_()
    x = conv5
    for stage in list(net)[[name for name, _ in net.named_children()].index("relu5") + 1 :]:
        x = stage(x)
    weights = torch.autograd.grad(x[:, 1].sum(), conv5)[0].mean((2, 3), keepdim=True)
    torch.testing.assert_close(maps, (weights * conv5).sum(1, keepdim=True))


def test_torchlens_traces_every_stage() -> None:
    torchlens = pytest.importorskip("torchlens")
    try:
        trace = torchlens.trace(small_net(), some_images(1))
    except Exception as error:  # its optional parts
        if "Missing" in type(error).__name__:
            pytest.skip(str(error))
        raise
    seen = " ".join(map(str, trace.layer_labels))
    for kind, number in (("conv2d", 5), ("relu", 7), ("maxpool2d", 3), ("linear", 3)):
        assert sum(f"{kind}_{n}_" in seen for n in range(1, 10)) == number, kind


def test_a_channel_can_be_made_visible_by_ascent_through_any_stage() -> None:
    """In the manner of lucid: an image that excites a map of conv4 more than noise does."""
    net = small_net()
    image = some_images(1).requires_grad_()
    before = float(net.activations(image, ["relu4"])["relu4"][0, 3].mean())
    for _ in range(20):
        score = net.activations(image, ["relu4"])["relu4"][0, 3].mean()
        (step,) = torch.autograd.grad(score, image)
        image = (image + 30 * step / step.abs().max()).detach().requires_grad_()
    assert float(net.activations(image, ["relu4"])["relu4"][0, 3].mean()) > 1.1 * before


def test_convolutional_part_takes_images_of_any_size() -> None:
    net = small_net()
    part = net[: [name for name, _ in net.named_children()].index("flatten")]
    assert torch.equal(part(some_images()), net.activations(some_images(), ["pool5"])["pool5"])
    assert part(torch.zeros(1, 3, 256, 320)).shape[2:] == (7, 9)
    with pytest.raises(ValueError, match=r"the net was built for 96x96.*net\[:"):
        net(torch.zeros(1, 3, 256, 256))


@pytest.mark.parametrize("norm", [LocalResponseNorm(5, 0.01, 0.75, 2.0, 2), SameMapNorm(5, 0.01, 0.75, 1.0)])
def test_derivatives_of_every_kind_are_right_or_an_error(norm: nn.Module) -> None:
    """Against finite differences in float64."""
    x, v = (torch.randn(1, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    h = 1e-6
    along = (norm(x + h * v) - norm(x - h * v)) / (2 * h)
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (v,))[1], along, rtol=1e-6, atol=1e-8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent
    torch.testing.assert_close(tangent, along, rtol=1e-6, atol=1e-8)

    def gradient(y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad(norm(y).square().sum(), y)[0]

    torch.testing.assert_close(torch.func.grad(lambda y: norm(y).square().sum())(x), gradient(x))
    second = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
    product = torch.func.jvp(torch.func.grad(lambda y: norm(y).square().sum()), (x,), (v,))[1]
    torch.testing.assert_close(product, second, rtol=1e-5, atol=1e-7)
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(norm(y).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative: use torch\.func"):
        torch.autograd.grad(first.sum(), y)


def test_whole_net_in_torch_func_equals_the_fused_net() -> None:
    net = small_net().double()
    images = some_images(1).double()
    params = dict(net.named_parameters())
    loss = lambda p: F.cross_entropy(torch.func.functional_call(net, p, images), torch.tensor([1]))  # noqa: E731
    gradients = torch.func.grad(loss)(params)
    F.cross_entropy(net(images), torch.tensor([1])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12)
    a = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(
        torch.func.vmap(lambda one: LocalResponseNorm(5, 0.1, 0.75, 2.0, 2)(one[None])[0])(a),
        plain_local_response_norm(a, 5, 0.1, 0.75, 2.0, 2),
    )


@pytest.mark.parametrize("recipe", ["paper", "as_run"])
def test_torch_hub_loads_the_net_of_a_recipe(recipe: str) -> None:
    torch.manual_seed(0)
    net = torch.hub.load(str(ROOT), "alexnet", recipe=recipe, classes=10, width=0.25, source="local")
    torch.manual_seed(0)
    expected = Classifier.from_recipe(recipe, classes=10, net={"width": 0.25}).net
    assert str(net) == str(expected)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match="one of paper, as_run"):
        torch.hub.load(str(ROOT), "alexnet", recipe="mine", source="local")
