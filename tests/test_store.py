"""Test that a damaged, changed or replaced store is noticed before it does harm."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, one_image_per_file, stopping_after_an_epoch

from alexnet_repro.data.store import Store, sha256
from alexnet_repro.errors import UserError
from alexnet_repro.training.checkpoints import load_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copy(small_store: Path, cwd: Path) -> Path:
    shutil.copytree(small_store, cwd / "copy")
    return cwd / "copy"


def rewrite(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as someone would who removes its own checksum, too."""
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("checksum", None)
    change(manifest)
    path.write_text(json.dumps(manifest))


MANIFESTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.clear() or m.update(format=1), "image_size: field required"),
    (lambda m: m.update(image_size=-5), "image_size"),
    (lambda m: m.update(image_size="256"), "image_size"),
    (lambda m: m.update(classes=[]), "classes"),
    (lambda m: m.update(classes=["cat", "cat"]), "names a class twice"),
    (lambda m: m["splits"]["train"].update(count=-400), "splits.train.count"),
    (lambda m: m["splits"]["train"].update(count=13), "do not hold 13 images"),
    (lambda m: m["splits"]["train"].update(shards=[6, 6]), "train/00000.npy has"),
    (lambda m: m["splits"].update(extra={"count": 0, "shards": []}), "splits.extra"),
    (lambda m: m.update(covariance=[[1.0, 2.0], [3.0, 4.0]]), "covariance"),
    (lambda m: m.update(covariance=[[float("nan")] * 3] * 3), "covariance"),
    (lambda m: m.update(sha256=[]), "sha256"),
    (lambda m: m.update(format=9), "format 9"),
]


@pytest.mark.parametrize(("change", "problem"), MANIFESTS, ids=[problem for _, problem in MANIFESTS])
def test_damaged_manifest_is_named(change: Callable[[dict[str, Any]], object], problem: str, copy: Path) -> None:
    rewrite(copy, change)
    with pytest.raises(UserError) as error:
        Store(copy)
    assert problem in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", "", "\x00"])
def test_manifest_that_holds_something_else_is_named(content: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Store(copy)


def test_flipped_byte_of_the_manifest_is_noticed(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"cat"', '"cab"'))
    with pytest.raises(UserError, match="its own checksum is wrong"):
        Store(copy)


@pytest.mark.parametrize("label", [2, -1, -100])
def test_label_out_of_range_is_refused(label: int, copy: Path) -> None:
    labels = np.load(copy / "train/labels.npy")
    labels[3] = label
    np.save(copy / "train/labels.npy", labels)
    with pytest.raises(UserError, match=r"labels\.npy is damaged"):
        Store(copy).split("train")
    rewrite(copy, lambda m: m["sha256"].update({"train/labels.npy": sha256(copy / "train/labels.npy")}))
    with pytest.raises(UserError, match="holds a label outside 0 to 1"):
        Store(copy).split("train")
    rewrite(copy, lambda m: m["sha256"].pop("train/labels.npy"))
    with pytest.raises(UserError, match=r"has no checksum of train/labels\.npy"):
        Store(copy)


def test_missing_or_short_file_of_any_split_is_noticed_on_opening(copy: Path) -> None:
    shard = copy / "val/00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"val/00000\.npy has"):
        Store(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"val/00000\.npy is missing"):
        Store(copy)


@pytest.mark.parametrize("file", ["train/00000.npy", "mean.npy"])
def test_flipped_byte_is_noticed_when_first_read(file: str, copy: Path) -> None:
    data = bytearray((copy / file).read_bytes())
    data[-1000] ^= 1
    (copy / file).write_bytes(data)
    store = Store(copy)
    with pytest.raises(UserError, match="checksum"):
        store.mean if file == "mean.npy" else store.split("train")[11]
    if file != "mean.npy":
        assert store.split("train")[0].shape == (256, 256, 3)  # the other images are whole


def test_training_on_a_damaged_image_ends_with_status_2(copy: Path, run_command: Run) -> None:
    path = copy / "train/00000.npy"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    options = ("data=folder", f"data.store={copy}", "epochs=1", "batch_size=6", "trainer=cpu", "run=r")
    for workers in (0, 2):
        status, _, err = run_command("train", *options, f"trainer.workers={workers}")
        assert status == 2, err
        assert "image 11 of" in err
        assert "Traceback" not in err
        assert not Path("r").exists()


def test_store_that_changes_while_in_use_is_noticed(copy: Path, small_store: Path) -> None:
    store = Store(copy)
    (copy / "train/00000.npy").touch()
    store.refuse_changes()  # another time alone is no change
    data = bytearray((copy / "val/00000.npy").read_bytes())
    data[-1] ^= 1
    (copy / "val/00000.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"was changed while in use: val/00000\.npy"):
        store.refuse_changes()


def test_stores_of_the_same_images_have_the_same_checksum(copy: Path, source_folder: Path, run_command: Run) -> None:
    """Even from another source, with another version of Pillow, and from a version that made no CRC-32."""
    before = Store(copy).images_sha256
    shutil.copytree(source_folder, "moved")
    options = ("data=folder", "source=moved", "data.store=again")
    assert run_command("prepare", *options)[0] == 0
    assert Store("again").manifest["source"] != Store(copy).manifest["source"]
    assert Store("again").images_sha256 == before
    rewrite(copy, lambda m: (m.update(decoder="Pillow 1.0"), m["sha256"].pop("val/crc32.npy")))
    assert Store(copy).images_sha256 == before


def test_stores_of_other_images_labels_or_classes_have_other_checksums(copy: Path) -> None:
    found = {Store(copy).images_sha256}
    for name in ("train/00000.npy", "val/00000.npy", "train/labels.npy", "mean.npy"):
        rewrite(copy, lambda m, name=name: m["sha256"].update({name: 64 * "0"}))
        found.add(Store(copy).images_sha256)
    rewrite(copy, lambda m: m["classes"].reverse())
    found.add(Store(copy).images_sha256)
    assert len(found) == 6


def test_store_of_version_0_1_is_still_read(copy: Path, run_command: Run) -> None:
    """It had no checksum of its own and none of single images."""
    for split in ("train", "val"):
        (copy / split / "crc32.npy").unlink()
        rewrite_only = f"{split}/crc32.npy"
        path = copy / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["sha256"].pop(rewrite_only)
        manifest.pop("checksum", None)
        path.write_text(json.dumps(manifest))
    assert Store(copy).split("train")[0].shape == (256, 256, 3)
    assert not Store(copy).damaged_files()
    data = bytearray((copy / "val/00000.npy").read_bytes())
    data[-1] ^= 1
    (copy / "val/00000.npy").write_bytes(data)
    options = ("data=folder", f"source={copy}", "data.store=converted", "encoding=jpeg")
    status, _, err = run_command("prepare", *options)
    assert (status, "val/00000.npy" in err, Path("converted").exists()) == (2, True, False), err


@pytest.fixture
def as_jpeg(source_folder: Path, cwd: Path, run_command: Run) -> Path:
    options = ("data=folder", f"source={source_folder}", "data.store=jpeg", "encoding=jpeg")
    status, out, err = run_command("prepare", *options)
    assert status == 0, err
    assert "256x256, as JPEG" in out
    return cwd / "jpeg"


def test_jpeg_store_holds_the_same_images_in_less_space(as_jpeg: Path, small_store: Path) -> None:
    raw, encoded = Store(small_store), Store(as_jpeg)
    assert encoded.classes == raw.classes
    for name in ("train", "val"):
        one, other = raw.split(name), encoded.split(name)
        assert np.array_equal(one.labels, other.labels)
        assert len(one) == len(other)
        for i in range(len(one)):
            error = one[i].astype(float) - other[i]
            assert 0 < np.sqrt((error**2).mean()) < 6  # grey levels
    images = np.stack([encoded.split("train")[i] for i in range(len(encoded.split("train")))]).astype(float)
    np.testing.assert_allclose(encoded.mean, images.mean(0), atol=1e-4)  # of the images that are read
    np.testing.assert_allclose(encoded.covariance, np.cov(images.reshape(-1, 3).T, bias=True), rtol=1e-9)
    size = {store: sum(file.stat().st_size for file in store.glob("train/0*")) for store in (small_store, as_jpeg)}
    assert size[as_jpeg] < size[small_store] / 5
    assert encoded.manifest["jpeg_decoder"].startswith("Pillow with libjpeg-turbo ")


def test_converted_store_equals_the_prepared_one(as_jpeg: Path, small_store: Path, run_command: Run) -> None:
    options = ("data=folder", f"source={small_store}", "data.store=converted", "encoding=jpeg")
    assert run_command("prepare", *options)[0] == 0
    one, other = Store(as_jpeg), Store("converted")
    for name in ("train/00000.jpegs", "train/ends.npy", "train/labels.npy", "val/00000.jpegs", "mean.npy"):
        assert one.manifest["sha256"][name] == other.manifest["sha256"][name]
    assert other.manifest["from_store"] == Store(small_store).images_sha256
    for more, problem in (
        (["data.image_size=64"], "are 256x256, not 64x64"),
        (["encoding=raw"], "has encoding=raw already"),
        (["data=imagenette"], "was made with data=folder, not data=imagenette"),
    ):
        status, _, err = run_command("prepare", *options, "data.store=other", *more)
        assert status == 2
        assert problem in err


def test_threads_share_a_split_of_more_files_than_may_be_open(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_repro.data.split.OPEN_FILES", 3)
    split = one_image_per_file(cwd / "store", 40)
    indices = [*range(40), *range(39, -1, -1)] * 5
    with ThreadPoolExecutor(8) as threads:
        assert [int(image[0, 0, 0]) for image in threads.map(split.__getitem__, indices)] == indices
    assert [int(image[0, 0, 0]) for image in split.read([7, 39, 7, 0])] == [7, 39, 7, 0]


@pytest.mark.parametrize("file", ["train/00000.jpegs", "train/ends.npy", "train/crc32.npy", "train/labels.npy"])
def test_damage_of_a_jpeg_store_is_noticed(file: str, as_jpeg: Path) -> None:
    path = as_jpeg / file
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert Store(as_jpeg).damaged_files() == [file]
    with pytest.raises(UserError, match="damaged"):
        list(map(Store(as_jpeg).split("train").__getitem__, range(12)))
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="not its whole length"):
        Store(as_jpeg)


def test_another_decoder_gives_a_warning(as_jpeg: Path) -> None:
    rewrite(as_jpeg, lambda m: m.update(jpeg_decoder="Pillow with libjpeg-turbo 1.0"))
    with pytest.warns(UserWarning, match=r"made with Pillow with libjpeg-turbo 1\.0.*may differ"):
        Store(as_jpeg)


def test_training_on_jpegs_resumes_exactly(tiny_store: Path, cwd: Path, run_command: Run) -> None:
    options = ["data=folder", "data.image_size=32", f"source={tiny_store}", "data.store=jpeg", "encoding=jpeg"]
    assert run_command("prepare", *options)[0] == 0
    line = ("train", *SMALL, "data.store=jpeg", "epochs=2")
    with stopping_after_an_epoch():
        assert run_command(*line, "run=parts")[0] == 130
    assert run_command(*line, "run=parts", "resume=true")[0] == 0
    assert run_command(*line, "run=whole")[0] == 0
    one, other = (load_checkpoint(cwd / run / "checkpoints/last.ckpt")["state_dict"] for run in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
