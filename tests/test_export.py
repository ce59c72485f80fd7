"""Compare exported nets with ours, in onnxruntime, in TorchScript and after safetensors."""

import errno
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from alexnet_repro import AlexNet, features, load_net
from alexnet_repro.errors import UserError
from alexnet_repro.net.layers import GroupedLinear
from alexnet_repro.sharing.card import _errors
from alexnet_repro.sharing.exporting import SUFFIXES
from alexnet_repro.sharing.nets import METADATA
from alexnet_repro.sharing.onnx_file import write_onnx
from alexnet_repro.sharing.steps import ExportedNet
from tests.conftest import picture, save_picture

Run = Callable[..., tuple[int, str, str]]
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "as_run": {"layer1_order": "norm_pool_relu", "same_map_norm": True, "lrn_alpha": 2e-5, "init": "as_run"},
    "one_gpu": {"towers": 1},
    "no_communication": {"communication": False},
    "six_layers_and_bottleneck": {"conv6": True, "bottleneck": 32},
    "non_overlapping": {"pooling": "non_overlapping", "conv4": False},
    "no_lrn_tanh": {"lrn": False, "activation": "tanh"},
    "sigmoid": {"activation": "sigmoid", "conv3": False, "conv5": False},
    "abs_tanh": {"activation": "abs_tanh", "dropout": 0.0},
    "caffenet": {"pool_first": True, "lrn_across_towers": True, "lrn_k": 1.0},
    "floor": {"floor_pools": ["pool1", "pool2"], "image_size": 95},
}


def responsive_net(**options: Any) -> AlexNet:
    """Return a narrow net whose responses keep their size from layer to layer, so that every layer counts."""
    torch.manual_seed(0)
    net = AlexNet(7, **{"image_size": 96, "width": 0.125, **options}).eval()
    with torch.no_grad():
        for name, layer in net.named_children():
            if isinstance(layer, nn.Conv2d | GroupedLinear):
                inputs = layer.weight[0].numel()
                layer.weight.normal_(0, (2 / inputs) ** 0.5 * (0.05 if name == "conv1" else 1))
                layer.bias.normal_(0, 0.3)
    return net


def photographs(count: int, side: int) -> np.ndarray:
    """Return pictures, (count, 3, side, side) float32 from 0 to 255."""
    return np.stack([picture(i, side, side).astype(np.float32).transpose(2, 0, 1) for i in range(count)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_and_torchscript_give_the_same_logits(variant: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    net = responsive_net(**VARIANTS[variant])
    side = net.image_size
    mean = torch.linspace(90, 130, 3 * side**2).reshape(3, side, side)
    images = photographs(3, side)
    with torch.inference_mode():
        expected = net(torch.from_numpy(images) - mean).numpy()
    plain = ExportedNet(net, mean).eval()
    write_onnx(plain, side, 7, "{}", tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for count in (1, 3):
        (found,) = session.run(None, {"images": images[:count]})
        assert np.abs(found - expected[:count]).max() < 1e-4 * np.abs(expected).max()
    with torch.inference_mode():
        assert np.abs(plain(torch.from_numpy(images)).numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.ptp(expected, 0).max() > 1e-3 * np.abs(expected).max(), "the logits must depend on the images"
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    norms = 0 if variant == "no_lrn_tanh" else 2
    assert kinds.count("LRN") == norms * (1 if variant in ("one_gpu", "caffenet") else 2)


@pytest.fixture
def pictures(tmp_path: Path) -> list[np.ndarray]:
    return [picture(i, 140, 130) for i in range(3)]


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
def test_exported_files_describe_themselves_and_give_the_runs_logits(
    small_alexnet: Path, pictures: list[np.ndarray], tmp_path: Path, run_command: Run
) -> None:
    import onnx
    import onnxruntime

    model = load_net(small_alexnet, at_chance=True)
    logits = features(model, pictures, ["fc8"])["fc8"]
    patches = torch.stack([alexnet_input(model, image) for image in pictures])
    paths = {name: tmp_path / f"net{suffix}" for name, suffix in SUFFIXES.items()}
    for name, path in paths.items():
        status, out, err = run_command("export", f"run={small_alexnet}", f"format={name}", f"out={path}", "at_chance=true")  # fmt: skip
        assert (status, out) == (0, f"written to {path}\n"), err
    (found,) = onnxruntime.InferenceSession(paths["onnx"]).run(None, {"images": patches.numpy()})
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    extra = {"alexnet_repro": ""}
    scripted = torch.jit.load(paths["torchscript"], _extra_files=extra)
    np.testing.assert_allclose(scripted(patches).detach(), logits, rtol=1e-4, atol=1e-5)
    properties = {entry.key: entry.value for entry in onnx.load(paths["onnx"]).metadata_props}
    for written in (properties["alexnet_repro"], extra["alexnet_repro"], (paths["hub"] / "config.json").read_text()):
        content = json.loads(written)
        assert (content["classes"], content["facts"]["recipe"]) == (["cat", "dog"], "as_run")
        assert content["facts"]["centre"]["top1_error"] == json.loads((small_alexnet / "result.json").read_text())["centre"]["top1_error"]  # fmt: skip
        assert "110" in content["preprocessing"]
    for path in (paths["hub"] / "model.safetensors", (tmp_path / "net.safetensors")):
        again = features(load_net(path, at_chance=True), pictures, ["fc8"])["fc8"]
        np.testing.assert_array_equal(again, logits)
    assert "| recipe | as_run |" in (paths["hub"] / "README.md").read_text()


def followed(description: str, image: np.ndarray, mean: np.ndarray) -> torch.Tensor:
    """Return what a program that knows only the description gives to the net, for an image whose sides are as described."""
    stored, crop = (int(number) for number in re.findall(r"cut the central (\d+)x", description))
    height, width = image.shape[:2]
    scale = stored / min(height, width)
    size = (round(width * scale), round(height * scale))
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    top, left = ((side - stored) // 2 for side in scaled.shape[:2])
    x = scaled[top : top + stored, left : left + stored]
    if "subtract the mean image, on the 0-255 scale" in description:
        x = x - mean
    else:
        assert "the file subtracts the mean image itself" in description
    edge = (stored - crop) // 2
    return torch.from_numpy(x[edge : edge + crop, edge : edge + crop]).permute(2, 0, 1)[None]


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
def test_description_of_every_format_followed_literally_gives_the_nets_logits(
    small_alexnet: Path, tmp_path: Path, run_command: Run
) -> None:
    import onnx
    import onnxruntime
    from safetensors import safe_open

    image = picture(3, 110, 110)  # of the stored size, so that decoders' and filters' rounding does not matter
    model = load_net(small_alexnet, at_chance=True)
    logits = features(model, [image], ["fc8"])["fc8"]
    mean = model.model.mean.numpy() if hasattr(model, "model") else model.mean.numpy()
    for name in ("safetensors", "onnx", "torchscript", "hub"):
        out = tmp_path / f"net{SUFFIXES[name]}"
        assert run_command("export", f"run={small_alexnet}", f"format={name}", f"out={out}", "at_chance=true")[0] == 0
        if name == "onnx":
            told = {entry.key: entry.value for entry in onnx.load(out).metadata_props}["alexnet_repro"]
            x = followed(json.loads(told)["preprocessing"], image, mean).numpy()
            (found,) = onnxruntime.InferenceSession(out).run(None, {"images": x})
        elif name == "torchscript":
            extra = {"alexnet_repro": ""}
            scripted = torch.jit.load(out, _extra_files=extra)
            found = scripted(followed(json.loads(extra["alexnet_repro"])["preprocessing"], image, mean)).detach()
        else:
            path = out / "model.safetensors" if name == "hub" else out
            with safe_open(path, "pt") as file:
                told = file.metadata()["alexnet_repro"]
                stored_mean = file.get_tensor("mean").numpy()
            loaded = load_net(path, at_chance=True)
            found = loaded.net(followed(json.loads(told)["preprocessing"], image, stored_mean)).detach()
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5, err_msg=name)


def test_net_of_a_hub_is_that_of_the_exported_folder(
    small_alexnet: Path, tmp_path: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for huggingface_hub that has one repo."""
    hub = pytest.importorskip("huggingface_hub")
    out = tmp_path / "exported"
    assert run_command("export", f"run={small_alexnet}", "format=hub", f"out={out}", "at_chance=true")[0] == 0

    def download(repo: str, name: str) -> str:
        if repo != "me/alexnet":
            raise OSError(f"404: {repo}")
        return str(out / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    net, own = load_net("me/alexnet", at_chance=True), load_net(small_alexnet, at_chance=True)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), own.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="there is no folder me/other, and the hub does not give it: 404"):
        load_net("me/other")
    with pytest.raises(UserError, match="is not the folder of a run"):
        load_net("exported/other")  # a folder of this machine is not looked up


def test_preprocessing_is_a_transform_for_a_data_set(small_alexnet: Path, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from alexnet_repro import preprocess

    for number in range(3):
        save_picture(tmp_path / "images/a" / f"{number}.jpg", number, 140, 130)
    net = load_net(small_alexnet, at_chance=True)
    data = ImageFolder(str(tmp_path / "images"), functools.partial(preprocess, net=net))
    ((images, _),) = DataLoader(data, batch_size=3, num_workers=1)
    expected = [preprocess(tmp_path / "images/a" / f"{number}.jpg", net) for number in range(3)]
    assert torch.equal(images, torch.stack(expected))


def test_card_of_a_result_without_log_loss_leaves_it_empty() -> None:
    """Results of version 0.1 have none."""
    facts = {
        "centre": {"top1_error": 57.5, "top5_error": 9.0},
        "nine_crop": {"top1_error": 57.0, "top5_error": 9.5, "log_loss": 1.5},
    }
    lines = _errors(facts).splitlines()
    assert lines[-2:] == ["| one view | 57.5 | 9.0 |  |", "| nine crops | 57.0 | 9.5 | 1.500 |"]


def test_failed_export_leaves_no_half_of_a_folder(
    small_alexnet: Path, tmp_path: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("alexnet_repro.sharing.exporting.model_card", full)
    line = ("export", f"run={small_alexnet}", "format=hub", f"out={tmp_path / 'net'}", "at_chance=true")
    status, _, err = run_command(*line)
    assert (status, "the disk is full" in err, list(tmp_path.iterdir())) == (2, True, []), err


def alexnet_input(model: Any, image: np.ndarray) -> torch.Tensor:
    """Return the central patch on the 0-255 scale, without subtracting the mean, which the exported graph does."""
    from alexnet_repro import preprocess

    return preprocess(image, model) + model.mean_centre().permute(2, 0, 1)


def test_foreign_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision.models import alexnet

    with torch.device("meta"):
        names = alexnet().state_dict()
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "torchvision.safetensors")
    with pytest.raises(UserError, match="torchvision's alexnet, another net: one tower"):
        load_net(tmp_path / "torchvision.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "torchvision.safetensors").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        load_net(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no file"):
        load_net(tmp_path / "missing.safetensors")
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors", {METADATA: "{}"})
    with pytest.raises(UserError, match="not finite"):
        load_net(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("content", "problem"), [('{"centre": {', "is damaged"), ("[]", "is not a result"), ("{}", "lacks")]
)
def test_damaged_result_of_an_exported_run_is_named(
    content: str, problem: str, small_alexnet: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(small_alexnet, tmp_path / "run")
    (run / "result.json").write_text(content)
    with pytest.raises(UserError, match=rf"result\.json {problem}"):
        load_net(run)
