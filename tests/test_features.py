"""Compare features with the net's own layers, for images in every form, and files with what is computed in memory."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from alexnet_repro import Classifier, Store, features, load_net, preprocess
from alexnet_repro.configs import CONF
from alexnet_repro.data.images import formats
from alexnet_repro.errors import UserError
from alexnet_repro.sharing.feature_file import Partial
from alexnet_repro.sharing.features import Inputs
from alexnet_repro.sharing.index import index
from alexnet_repro.sharing.nets import load
from alexnet_repro.training.checkpoints import load_checkpoint
from tests.conftest import picture, save_picture

Run = Callable[..., tuple[int, str, str]]
LAYERS = ["conv1.linear", "norm1", "conv5", "fc7", "fc8"]


@pytest.fixture(scope="module")
def model(small_alexnet: Path) -> Classifier:
    return load_net(small_alexnet, at_chance=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with six images of different forms, two of them in a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(4):
        save_picture(folder / f"{number}.jpg", number, 150 + 10 * number, 120)
    Image.fromarray(picture(4)).convert("L").save(folder / "more" / "grey.png")
    Image.fromarray(picture(5)).convert("RGBA").save(folder / "more" / "transparent.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_features_of_a_store_are_the_net_applied_to_central_patches(model: Classifier, small_alexnet: Path) -> None:
    store = Store(small_alexnet.parent / "store")
    split = store.split("val")
    patches = np.stack([split[i].astype(np.float32) - store.mean for i in range(len(split))])[:, 7:103, 7:103]
    inputs = torch.from_numpy(patches.transpose(0, 3, 1, 2))
    with torch.inference_mode():
        logits = model.net(inputs)
        conv1 = torch.nn.functional.conv2d(torch.nn.functional.pad(inputs, (0, 3, 0, 3)), model.net.conv1.weight, model.net.conv1.bias, 4)  # fmt: skip
    for images in (store, split, store.path):
        found = features(model, images, LAYERS, batch_size=4)
        assert list(found) == LAYERS
        np.testing.assert_allclose(found["fc8"], logits, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["conv1.linear"], conv1, rtol=1e-4, atol=1e-3)
    assert found["fc7"].shape == (6, 512)
    assert found["fc7"].dtype == np.float32


def test_all_forms_of_images_give_the_same(model: Classifier, pictures: Path) -> None:
    paths = [pictures / f"{n}.jpg" for n in range(4)]
    expected = features(model, paths)["fc7"]
    opened = [Image.open(path) for path in paths]
    np.testing.assert_allclose(features(model, opened)["fc7"], expected, rtol=1e-3, atol=1e-3)
    inputs = torch.stack([preprocess(path, model) for path in paths])
    assert inputs.shape == (4, 3, 96, 96)
    np.testing.assert_allclose(features(model, inputs)["fc7"], expected, rtol=1e-4, atol=1e-6)
    pixels = np.stack([np.asarray(Image.open(paths[0]))] * 2)
    for array in (pixels, torch.from_numpy(pixels), pixels.transpose(0, 3, 1, 2)):
        np.testing.assert_allclose(features(model, array)["fc7"][1], expected[0], rtol=1e-3, atol=1e-3)
    whole = features(model, pictures)["fc7"]  # sorted by path: 0 to 3, then more/
    assert len(whole) == 6
    np.testing.assert_allclose(whole[:4], expected, rtol=1e-4, atol=1e-6)


def test_a_preprocessed_image_has_the_mean_subtracted_and_nothing_else(model: Classifier, tmp_path: Path) -> None:
    """A uniform colour stays what it is at any size, so its patch is this colour minus the mean image's centre."""
    Image.new("RGB", (300, 200), (10, 120, 250)).save(tmp_path / "colour.png")
    expected = torch.tensor([10.0, 120.0, 250.0]) - model.mean[7:103, 7:103]
    torch.testing.assert_close(preprocess(tmp_path / "colour.png", model), expected.permute(2, 0, 1))


def test_towers_are_halves_of_the_maps(model: Classifier, pictures: Path) -> None:
    whole = features(model, pictures, ["conv5", "fc7"])
    towers = features(model, pictures, ["conv5", "fc7"], per_tower=True)
    assert towers["conv5"].shape == (6, 2, 16, *whole["conv5"].shape[2:])
    np.testing.assert_array_equal(np.concatenate([towers["conv5"][:, 0], towers["conv5"][:, 1]], 1), whole["conv5"])
    np.testing.assert_array_equal(towers["fc7"][:, 1], whole["fc7"][:, 256:])


@pytest.mark.parametrize(
    ("images", "layers", "message"),
    [
        ([], ["fc7"], "no images"),
        (np.zeros((2, 5), np.float32), ["fc7"], r"shape \(2, 5\)"),
        (np.zeros((1, 20, 20, 3), np.uint8), ["conv9"], "it has: conv1.linear, conv1"),
        (3.5, ["fc7"], "float"),
        ([np.zeros((5, 5, 3))], ["fc7"], "0 is not a readable image"),
        ([None], ["fc7"], "0 is not a readable image"),
        (np.zeros((1, 20, 20, 3), np.uint8), [], "no layers are named"),
        ("nowhere", ["fc7"], "nothing at nowhere"),
    ],
)
def test_wrong_arguments_are_named(model: Classifier, images: object, layers: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        features(model, images, layers)


@pytest.mark.parametrize("device", ["somewhere", "mps", "cuda:99"])
def test_devices_that_are_not_there_are_told(device: str, model: Classifier) -> None:
    with pytest.raises(UserError, match=f"device={device} cannot be used here"):
        features(model, [picture(0)], device=device)


def test_error_before_an_unfinished_epoch_is_not_that_of_the_weights(small_alexnet: Path, tmp_path: Path) -> None:
    run = shutil.copytree(small_alexnet, tmp_path / "run")
    for name in run.glob("*.json"):
        name.unlink()
    path = run / "checkpoints/last.ckpt"
    assert load(run, at_chance=True).facts["validation_error"] is not None
    checkpoint = torch.load(path)
    checkpoint["training_means"] = torch.tensor([[3.0, 9.0, 12.0]])  # 12 images of the next epoch
    torch.save(checkpoint, path)
    assert load(run).facts["validation_error"] is None
    assert re.search(r",none,.*,last,1,,", index([run]))


def test_net_at_chance_is_refused_unless_told(small_alexnet: Path, tmp_path: Path, run_command: Run) -> None:
    path = tmp_path / "untrained.ckpt"
    content = load_checkpoint(small_alexnet / "checkpoints" / "last.ckpt")
    content["history"][-1]["val_error"] = 49.5  # of two classes
    torch.save(content, path)
    with pytest.raises(UserError, match=r"error of 49.5%, and guessing one of its 2 classes has 50.0%"):
        load_net(path)
    assert load_net(path, at_chance=True).class_names == ["cat", "dog"]
    status, _, err = run_command("export", f"run={path}", f"out={tmp_path / 'x.onnx'}", "format=onnx")
    assert (status, "at_chance=true" in err) == (2, True)
    content["history"][-1]["val_error"] = 20.0
    torch.save(content, path)
    assert not load_net(path).training


def read_back(path: Path, layer: str) -> tuple[list[str], np.ndarray, dict[str, object]]:
    """Read a file of features with the library made for it."""
    if path.suffix == ".npz":
        content = np.load(path)
        return content["names"].tolist(), content[layer], json.loads(str(content["description"]))
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            return [name.decode() for name in file["names"][:]], file[layer][:], json.loads(file.attrs["description"])
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    shape = json.loads(table.schema.field(layer).metadata[b"shape"])
    rows = np.array(table[layer].to_pylist(), np.float32).reshape(len(table), *shape)
    return table["name"].to_pylist(), rows, json.loads(table.schema.metadata[b"description"])


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".parquet"])
def test_file_holds_names_features_and_a_description(
    suffix: str, model: Classifier, small_alexnet: Path, pictures: Path, tmp_path: Path, run_command: Run
) -> None:
    out = tmp_path / f"features{suffix}"
    options = [f"run={small_alexnet}", f"source={pictures}", "layers=[conv5,fc7]", f"out={out}", "at_chance=true"]
    (pictures / "2.jpg").write_bytes(b"damaged")
    status, printed, err = run_command("features", *options, "batch_size=2")
    assert (status, "2.jpg" in printed) == (0, True), err
    names, conv5, description = read_back(out, "conv5")
    assert names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/grey.png", "more/transparent.png"]
    good = [0, 1, 3, 4, 5]
    expected = features(model, [pictures / name for i, name in enumerate(names) if i in good], ["conv5"])["conv5"]
    np.testing.assert_allclose(conv5[good], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(conv5[2]).all()
    assert description["unreadable"] == ["2.jpg"]
    assert description["recipe"] == "as_run"
    assert not out.with_name(out.name + ".partial").exists()
    status, _, err = run_command("features", *options)
    assert (status, "exists" in err) == (2, True)


def test_an_interrupted_command_continues(
    small_alexnet: Path, pictures: Path, tmp_path: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(out: str) -> list[str]:
        return [f"run={small_alexnet}", f"source={pictures}", f"out={tmp_path / out}", "batch_size=1", "at_chance=true"]

    assert run_command("features", *options("whole.npz"))[0] == 0
    add, calls = Partial.add, iter(range(10))

    def interrupted(self: Partial, *arguments: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "add", interrupted)
        status, _, err = run_command("features", *options("stopped.npz"))
    assert (status, "3 of 6 images are done" in err) == (130, True)
    with (tmp_path / "stopped.npz.partial" / "fc7.f32").open("ab") as file:
        file.write(b"part of a row")  # a kill may leave this
    status, _, err = run_command("features", *options("stopped.npz"), "layers=[fc6]")
    assert (status, "other layers" in err) == (2, True)
    for name, content, problem in (
        ("fc7.f32", b"too short", "lacks some of 3 rows"),
        ("progress.json", b"{", "is damaged"),
    ):
        path = tmp_path / "stopped.npz.partial" / name
        before = path.read_bytes()
        path.write_bytes(content)
        status, _, err = run_command("features", *options("stopped.npz"))
        assert (status, problem in err) == (2, True), err
        path.write_bytes(before)
    assert run_command("features", *options("stopped.npz"))[0] == 0
    whole, resumed = (np.load(tmp_path / name)["fc7"] for name in ("whole.npz", "stopped.npz"))
    np.testing.assert_array_equal(whole, resumed)


def test_rows_of_unknown_origin_are_not_used_and_two_processes_do_not_mix(
    small_alexnet: Path, pictures: Path, tmp_path: Path, run_command: Run
) -> None:
    out = tmp_path / "features.npz"
    options = [f"run={small_alexnet}", f"source={pictures}", f"out={out}", "at_chance=true"]
    (tmp_path / "features.npz.partial").mkdir()
    np.full((5, 512), 7, np.float32).tofile(tmp_path / "features.npz.partial" / "fc7.f32")
    with FileLock(tmp_path / "features.npz.lock"):
        status, _, err = run_command("features", *options)
    assert (status, "is being written by another process" in err) == (2, True)
    assert run_command("features", *options)[0] == 0
    assert np.load(out)["fc7"].shape == (6, 512)
    assert np.load(out)["fc7"].max() < 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npz", "pictures"]
    thesis = tmp_path / "more.npz.partial" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("all of it")
    status, _, err = run_command("features", *options[:2], f"out={tmp_path / 'more.npz'}", "at_chance=true")
    assert (status, "exists and holds something else" in err, thesis.read_text()) == (2, True, "all of it")


def test_full_disk_is_told_before_a_file_is_written(
    small_alexnet: Path, pictures: Path, tmp_path: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HDF5 library crashes on a full disk."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6 * 4 * 512 - 1))
    line = ("features", f"run={small_alexnet}", f"source={pictures}", f"out={tmp_path / 'f.h5'}", "at_chance=true")
    status, _, err = run_command(*line)
    assert (status, "the disk is full" in err) == (2, True), err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6 * 4 * 512))
    assert run_command(*line)[0] == 0


def test_sixteen_bits_and_exif_are_understood_and_floats_refused(model: Classifier, tmp_path: Path) -> None:
    grey = picture(3, 120, 110)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    eight, sixteen = (preprocess(tmp_path / name, model) for name in ("8.png", "16.png"))
    torch.testing.assert_close(eight, sixteen)
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="signed integers or floats"):
        preprocess(tmp_path / "float.tiff", model)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture(4, 120, 110)).save(tmp_path / "turned.png", exif=turned)
    by_path, opened = preprocess(tmp_path / "turned.png", model), preprocess(Image.open(tmp_path / "turned.png"), model)
    torch.testing.assert_close(by_path, opened)


@pytest.mark.slow
def test_a_killed_command_continues_and_gives_the_same_bytes(small_alexnet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        save_picture(folder / f"{number:02}.png", number, 500, 400)

    def start(out: str, *more: str) -> "subprocess.Popen[bytes]":
        line = [sys.executable, "-m", "alexnet_repro.features", f"run={small_alexnet}", f"source={folder}"]
        line += ["layers=[fc6]", f"out={tmp_path / out}", "batch_size=1", "at_chance=true", *more]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)

    assert start("whole.npz").wait() == 0
    killed = start("killed.npz")
    progress = tmp_path / "killed.npz.partial" / "progress.json"
    deadline = time.monotonic() + 60
    while not progress.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = json.loads(progress.read_text())["rows"]
    assert 0 < done < 40, "the command ended before it could be killed"
    other = start("killed.npz", "layers=[fc7]")
    assert other.wait() == 2
    assert b"another net, other layers or other images" in other.communicate()[1]
    assert start("killed.npz").wait() == 0
    whole, resumed = (np.load(tmp_path / name) for name in ("whole.npz", "killed.npz"))
    np.testing.assert_array_equal(whole["fc6"], resumed["fc6"])
    np.testing.assert_array_equal(whole["names"], resumed["names"])


def test_documented_code_runs(small_alexnet: Path, pictures: Path, model: Classifier) -> None:
    page = (Path(CONF).parent / "docs" / "features.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        code = re.sub(r'"runs/[\w-]+/seed-\d"', f'"{small_alexnet}", at_chance=True', block)
        exec(code.replace("FOLDER", str(pictures)), names)
    assert names["towers"].shape[:3] == (6, 2, 16)
    assert names["alike"] == pytest.approx(1)  # of a net with itself
    with torch.inference_mode():
        for name, value in (("conv5", names["seen"]["conv5"]), ("fc7", names["extracted"]["relu7"])):
            np.testing.assert_array_equal(value.detach(), names["outputs"][name].detach())


def test_a_folder_has_the_images_that_prepare_reads(
    model: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    suffixes = {
        "JPEG": ("jpg", "jpe", "jfif", "JPEG"),
        "PNG": ("png",),
        "JPEG2000": ("jp2",),
        "TGA": ("tga",),
        "QOI": ("qoi",),
    }
    suffixes |= {"TIFF": ("tif",), "PPM": ("ppm",), "GIF": ("gif",), "WEBP": ("webp",), "MPO": ("mpo",)}
    if "AVIF" in formats():
        suffixes["AVIF"] = ("avif",)
    for form, endings in suffixes.items():
        for ending in endings:
            Image.fromarray(picture(1, 40, 40)).save(folder / f"a.{ending}", form)
    (folder / "@eaDir").mkdir()
    Image.fromarray(picture(2, 40, 40)).save(folder / "@eaDir/a.jpg")
    (folder / "notes.txt").write_text("text")
    inputs = Inputs(folder, model)
    assert len(inputs.names) == sum(map(len, suffixes.values()))
    assert all(inputs.square(i).shape == (110, 110, 3) for i in range(len(inputs.names)))
    out = capsys.readouterr().out
    assert "left out: 1 thumbnails and other files of a file server or a system, such as @eaDir" in out
    assert "left out: 1 files that are not named as images, such as notes.txt" in out


@pytest.mark.parametrize("kind", [str, Path])
def test_an_array_of_objects_may_hold_paths(kind: type, model: Classifier, tmp_path: Path) -> None:
    paths = [kind(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(i, 40, 40)).save(path)
    inputs = Inputs(np.array(paths, dtype=object), model)
    assert inputs.names == [str(path) for path in paths]
    assert np.array_equal(inputs.square(1), Inputs(paths, model).square(1))
