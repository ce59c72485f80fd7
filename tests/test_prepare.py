"""Prepare stores from real files, and test their contents and which sources are refused."""

import contextlib
import gc
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from conftest import image_folder, one_image_per_file, picture, save_picture
from filelock import FileLock
from PIL import Image

from alexnet_repro.data import devkit, photos
from alexnet_repro.data.images import read_image
from alexnet_repro.data.shard_writer import Example
from alexnet_repro.data.source import scan
from alexnet_repro.data.store import Store
from alexnet_repro.data.store_writer import write_store
from alexnet_repro.errors import UserError

Run = Callable[..., tuple[int, str, str]]


def tar_of(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=".")
    return path


def same_store(one: Path, other: Path) -> bool:
    left, right = Store(one), Store(other)
    return left.manifest["sha256"] == right.manifest["sha256"] and left.classes == right.classes


class TestReadImage:
    def of(self, image: Image.Image, **options: object) -> np.ndarray:
        file = io.BytesIO()
        image.save(file, **{"format": "PNG", **options})  # type: ignore[arg-type]
        return read_image(file.getvalue, 256)

    def test_shorter_side_is_resized_to_256_and_the_centre_cropped(self) -> None:
        """Compare with PIL, which does the two steps of Section 2 in turn, on sizes that divide evenly."""
        image = Image.fromarray(picture(0, 768, 512))
        expected = np.asarray(image.resize((384, 256), Image.Resampling.BICUBIC))[:, 64:320]
        assert np.abs(self.of(image).astype(int) - expected).max() <= 1

    def test_resize_is_antialiased(self) -> None:
        stripes = np.tile(np.array([[0, 255]], np.uint8), (1024, 512))
        grey = self.of(Image.fromarray(stripes))
        assert np.abs(grey[5:-5, 5:-5].astype(int) - 127).max() <= 2

    def test_grey_cmyk_palette_and_transparent_images_become_rgb(self) -> None:
        colour = Image.fromarray(picture(1))
        grey = self.of(colour.convert("L"))
        assert grey.shape == (256, 256, 3)
        assert (grey[..., 0] == grey[..., 2]).all()
        expected = self.of(colour).astype(int)
        cmyk = self.of(colour.convert("CMYK"), format="JPEG", quality=95)
        assert np.abs(cmyk - expected).mean() < 6
        assert np.abs(self.of(colour.convert("RGBA")) - expected).max() == 0
        assert np.abs(self.of(colour.quantize(256)) - expected).mean() < 12

    def test_tiny_and_huge_images_are_read(self) -> None:
        assert (self.of(Image.new("RGB", (1, 3), (9, 8, 7))) == (9, 8, 7)).all()
        huge = self.of(Image.new("RGB", (9000, 4000), (200, 100, 50)), format="JPEG")
        assert np.abs(huge.astype(int) - (200, 100, 50)).max() <= 2

    def test_exif_rotation_is_applied(self) -> None:
        upright = Image.fromarray(picture(2))
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate clockwise by 90 degrees to display
        rotated = self.of(upright.transpose(Image.Transpose.ROTATE_90), format="JPEG", quality=95, exif=exif)
        assert np.abs(rotated.astype(int) - self.of(upright, format="JPEG", quality=95)).mean() < 1

    def test_gzipped_jpeg_equals_the_plain_file(self) -> None:
        file = io.BytesIO()
        Image.fromarray(picture(3)).save(file, "JPEG")
        assert np.array_equal(read_image(lambda: gzip.compress(file.getvalue()), 256), read_image(file.getvalue, 256))

    @pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken", b"\x1f\x8b broken"])
    def test_data_that_is_not_an_image_is_refused(self, data: bytes) -> None:
        with pytest.raises((OSError, ValueError)):
            read_image(lambda: data, 256)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000", "PPM", "TGA", "QOI"])
    def test_damaged_files_are_read_or_refused(self, form: str) -> None:
        """Pillow's readers raise all kinds of errors; ours raises two."""
        file = io.BytesIO()
        Image.fromarray(picture(5, 24, 24)).save(file, form)
        rng = np.random.default_rng(0)
        for _ in range(150):
            data = bytearray(file.getvalue())
            for place in rng.integers(0, min(len(data), 200), rng.integers(1, 9)):
                data[place] = rng.integers(256)
            with contextlib.suppress(OSError, ValueError):
                assert read_image(lambda data=data: bytes(data), 16).shape == (16, 16, 3)

    def test_other_errors_of_decoders_are_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def decode(*_: object, **__: object) -> None:
            raise NotImplementedError("no such compression")

        monkeypatch.setattr(Image, "open", decode)
        with pytest.raises(ValueError, match="no such compression"):
            read_image(lambda: b"data", 16)

    def test_truncated_jpeg_is_refused(self) -> None:
        file = io.BytesIO()
        Image.fromarray(picture(4)).save(file, "JPEG")
        with pytest.raises(OSError, match="truncated"):
            read_image(lambda: file.getvalue()[: len(file.getvalue()) // 2], 256)


def test_store_holds_the_images_and_their_mean_and_covariance(source_folder: Path, small_store: Path) -> None:
    store = Store(small_store)
    assert store.classes == ["cat", "dog"]
    train, val = store.split("train"), store.split("val")
    assert (len(train), len(val)) == (12, 6)
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    for i, file in enumerate(sorted((source_folder / "train").rglob("*.jpg"))):
        assert np.array_equal(train[i], read_image(file.read_bytes, 256))
    pixels = np.stack([train[i] for i in range(12)]).astype(np.float64)
    np.testing.assert_allclose(store.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(store.covariance, np.cov(pixels.reshape(-1, 3).T, bias=True), rtol=1e-9)
    with pytest.raises(IndexError):
        train[12]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_store_of_a_tar_equals_the_store_of_its_folder(
    mode: str, source_folder: Path, small_store: Path, cwd: Path, run_command: Run
) -> None:
    tar = tar_of(source_folder, cwd / "images.tar", mode)
    assert run_command("prepare", "data=folder", f"source={tar}", "data.store=stores/tar")[0] == 0
    assert [path.name for path in Path("stores").iterdir()] == ["tar"]  # no unpacked files remain
    assert same_store(Path("stores/tar"), small_store)


def test_splits_are_found_in_a_subfolder(source_folder: Path, small_store: Path, cwd: Path, run_command: Run) -> None:
    shutil.copytree(source_folder, cwd / "in" / "imagenette2")
    assert run_command("prepare", "data=folder", "source=in", "data.store=stores/deep")[0] == 0
    assert same_store(Path("stores/deep"), small_store)


def test_files_beside_the_splits_are_ignored_and_named(
    source_folder: Path, small_store: Path, cwd: Path, run_command: Run
) -> None:
    shutil.copytree(source_folder, cwd / "in" / "imagenette2")
    (cwd / "in/imagenette2/noisy_imagenette.csv").write_text("a list")
    save_picture(cwd / "in/imagenette2/ILSVRC2012_bbox_val_v3/ILSVRC2012_val_00000001.JPEG", 5)
    tar_of(cwd / "in", cwd / "in.tar")
    status, out, err = run_command("prepare", "data=folder", "source=in.tar", "data.store=stores/beside")
    assert status == 0, err
    assert same_store(Path("stores/beside"), small_store)
    assert "noisy_imagenette.csv" in out
    assert "1 files in ILSVRC2012_bbox_val_v3/, beside the splits" in out


def test_class_may_be_named_train(cwd: Path, run_command: Run) -> None:
    for label, name in enumerate(("bus", "car", "train")):
        for i in range(4):
            save_picture(cwd / "vehicles" / name / f"{i}.jpg", 10 * label + i)
    assert run_command("prepare", "data=folder", "source=vehicles", "data.hold_out_every=4")[0] == 0
    assert Store("stores/folder").classes == ["bus", "car", "train"]


def test_train_beside_an_unknown_folder_is_a_split(source_folder: Path, cwd: Path, run_command: Run) -> None:
    shutil.copytree(source_folder / "train", cwd / "in/train")
    shutil.copytree(source_folder / "val", cwd / "in/extra")
    status, out, err = run_command("prepare", "data=folder", "source=in", "data.hold_out_every=3")
    assert status == 0, err
    assert Store("stores/folder").classes == ["cat", "dog"]
    assert "6 files in extra/, beside the splits" in out


def test_reading_leaves_few_files_open(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of ImageNet has 1252 files. A process may open only 1024, or 256 on a Mac."""
    monkeypatch.setattr("alexnet_repro.data.split.OPEN_FILES", 48)
    split = one_image_per_file(Path("store"), 100)

    def opened() -> int:
        links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        return sum(link.startswith(str(cwd.resolve())) for link in links)

    assert opened() == 0
    assert [int(split[i][0, 0, 0]) for i in range(100)] == list(range(100))
    assert opened() == 48
    del split
    gc.collect()
    assert opened() == 0


def test_two_processes_may_prepare_the_same_store_at_once(cwd: Path) -> None:
    line = [sys.executable, "-m", "alexnet_repro.prepare", "data=photos", "data.train_per_class=20"]
    both = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert {process.wait() for process in both} <= {0, 2}  # 2: the other process had already made the store
    assert len(Store("stores/photos").split("train")) == 200
    assert [path.name for path in Path("stores").iterdir()] == ["photos"]


def ilsvrc(folder: Path, year: int = 2012) -> Path:
    """Write small versions of ImageNet's own archives and return their folder.

    They are a tar of class tars, tars of the val and test images, and the development kit with the labels. In 2012 the
    tar of val is flat, and the test labels are not public. In 2010 the tars hold a folder, and the test labels are in a
    separate file.
    """
    img, kit_name = ("img", "devkit_t12") if year == 2012 else ("images", "devkit-1.0")
    plain = image_folder(folder / "plain", train=3, val=0, classes=("n01440764", "n01443537"))
    folder.joinpath("source").mkdir()
    with tarfile.open(folder / "source" / f"ILSVRC{year}_{img}_train.tar", "w") as outer:
        for wnid in ("n01440764", "n01443537"):
            with tarfile.open(folder / f"{wnid}.tar", "w") as inner:
                for i, file in enumerate(sorted((plain / "train" / wnid).iterdir())):
                    inner.add(file, f"{wnid}_{i}.JPEG")
            outer.add(folder / f"{wnid}.tar", f"{wnid}.tar")
    for split, seeds in (("val", (71, 72, 73)), ("test", (81, 82, 83, 84))):
        revision = "_v10102019" if (year, split) == (2012, "test") else ""
        with tarfile.open(folder / "source" / f"ILSVRC{year}_{img}_{split}{revision}.tar", "w") as tar:
            for i, seed in enumerate(seeds):
                save_picture(folder / "one.jpg", seed)
                inside = f"{split}/" if year == 2010 or revision else ""
                tar.add(folder / "one.jpg", f"{inside}ILSVRC{year}_{split}_{i + 1:08d}.JPEG")
    kit = folder / f"ILSVRC{year}_{kit_name}" / "data"
    kit.mkdir(parents=True)
    rows = [(2, "n01440764", "tench"), (1, "n01443537", "goldfish")]
    synsets = np.array(rows, dtype=[(f"ILSVRC{year}_ID", float), ("WNID", object), ("words", object)])
    scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / f"ILSVRC{year}_validation_ground_truth.txt").write_text("1\n2\n1\n")
    with tarfile.open(folder / "source" / f"ILSVRC{year}_{kit_name}.tar.gz", "w:gz") as tar:
        tar.add(kit.parent, kit.parent.name)
    if year == 2010:
        (folder / "source" / "ILSVRC2010_test_ground_truth.txt").write_text("2\n2\n1\n2\n")
    return folder / "source"


def test_original_archives_of_2012_are_prepared(cwd: Path, run_command: Run) -> None:
    source = ilsvrc(cwd)
    status, out, err = run_command("prepare", "data=ilsvrc2012", f"source={source}", "data.subset=true")
    assert status == 0, err
    assert "6 train, 3 val, 4 unlabelled images of 2 classes" in out
    store = Store("stores/ilsvrc2012")
    assert (store.watched_split, store.measured_split) == ("val", "val")
    assert store.split("unlabelled").labels.tolist() == [-1] * 4
    assert store.manifest["class_numbers"] == [2, 1]
    line = ("prepare", "data=ilsvrc2012", "source=stores/ilsvrc2012", "data.store=copy", "encoding=jpeg")
    assert run_command(*line)[0] == 0
    assert (len(Store("copy").split("unlabelled")), Store("copy").manifest["class_numbers"]) == (4, [2, 1])
    assert store.classes == ["n01440764", "n01443537"]
    assert store.split("val").labels.tolist() == [1, 0, 1]
    assert store.split("train").labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = cwd / "plain" / "train" / "n01440764" / "000.jpg"
    assert np.array_equal(store.split("train")[0], read_image(first.read_bytes, 256))


def test_original_archives_of_2010_include_labelled_test_images(cwd: Path, run_command: Run) -> None:
    source = ilsvrc(cwd, 2010)
    status, out, err = run_command("prepare", "data=ilsvrc2010", f"source={source}", "data.subset=true")
    assert status == 0, err
    assert "6 train, 3 val, 4 test images of 2 classes" in out
    store = Store("stores/ilsvrc2010")
    assert store.split("val").labels.tolist() == [1, 0, 1]
    assert store.split("test").labels.tolist() == [0, 0, 1, 0]
    assert (store.watched_split, store.measured_split) == ("val", "test")
    save_picture(cwd / "third.jpg", 83)
    assert np.array_equal(store.split("test")[2], read_image((cwd / "third.jpg").read_bytes, 256))


def test_imagenet_validation_images_require_the_development_kit(cwd: Path, run_command: Run) -> None:
    source = ilsvrc(cwd)
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    status, _, err = run_command("prepare", "data=ilsvrc2012", f"source={source}", "data.subset=true")
    assert status == 2
    assert "development kit" in err


def test_damaged_labels_of_imagenet_are_reported(cwd: Path, run_command: Run) -> None:
    source = ilsvrc(cwd, 2010)
    kit, truth = source / "ILSVRC2010_devkit-1.0.tar.gz", source / "ILSVRC2010_test_ground_truth.txt"
    for text, message in (("2\n1\n", "end before"), ("<html>\n", "doesn't hold numbers of classes")):
        truth.write_text(text)
        status, _, err = run_command("prepare", "data=ilsvrc2010", f"source={source}", "data.subset=true")
        assert (status, message in err) == (2, True), err
        source = source.rename(cwd / f"source{len(text)}")  # labels are cached per source
        truth = source / truth.name
    (source / kit.name).write_bytes(b"no tar")
    status, _, err = run_command("prepare", "data=ilsvrc2010", f"source={source}", "data.subset=true")
    assert (status, "development kit" in err) == (2, True), err
    source = source.rename(cwd / "without")
    (source / kit.name).unlink()
    status, _, err = run_command("prepare", "data=ilsvrc2010", f"source={source}", "data.subset=true")
    assert (status, "ILSVRC2010_devkit" in err) == (2, True), err
    image_folder(cwd / "plain2", train=2, val=1)
    (cwd / "plain2" / "devkit_readme.txt").write_text("a text")
    (cwd / "plain2" / "train" / "cat").rename(cwd / "plain2" / "train" / "my devkits")  # a class, and no kit
    (cwd / "plain2" / "val" / "cat").rename(cwd / "plain2" / "val" / "my devkits")
    status, out, err = run_command("prepare", "data=folder", "source=plain2")
    assert (status, "4 train, 2 val images of 2 classes" in out) == (0, True), err


def test_images_are_held_out_and_reported_if_the_source_has_no_val(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "s", train=10, val=0)
    shutil.move(cwd / "s" / "train", cwd / "flat")
    status, out, _ = run_command("prepare", "data=folder", "source=flat", "data.hold_out_every=5")
    assert status == 0
    assert "16 train, 4 val" in out
    assert "one of 5 images of each class became it (4 images)" in out


def test_sources_without_training_images_are_refused_and_too_few_are_named(cwd: Path, run_command: Run) -> None:
    save_picture(cwd / "only" / "ILSVRC2012_test_00000001.JPEG", 1)
    image_folder(cwd / "few", train=3, val=0)
    status, _, err = run_command("prepare", "data=folder", "source=only")
    assert (status, "has no training images" in err) == (2, True), err
    status, out, _ = run_command("prepare", "data=folder", "source=few/train")
    assert (status, "held out: no image: no class has the 10 images" in out) == (0, True), out


def test_valid_is_a_name_of_the_validation_images(cwd: Path) -> None:
    image_folder(cwd / "s", train=3, val=2)
    (cwd / "s" / "val").rename(cwd / "s" / "valid")
    found = scan(cwd / "s", 2, cwd)
    assert (found.classes, sum(file.split == "val" for file in found.files)) == (["cat", "dog"], 4)


def test_interrupted_removal_of_the_replaced_store_loses_nothing(
    cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("prepare", "data=folder", "data.image_size=32", "data.store=s", "overwrite=true")
    for name, count in (("old", 3), ("new", 4)):
        image_folder(cwd / name, train=count, val=1)
    assert run_command(*line, "source=old")[0] == 0
    with monkeypatch.context() as patch:

        def interrupted(path: Path) -> None:
            next(path.glob("*.npy")).unlink()
            raise KeyboardInterrupt

        patch.setattr(shutil, "rmtree", interrupted)
        assert run_command(*line, "source=new")[0] != 0
    assert len(Store("s").split("train")) == 8
    assert run_command(*line, "source=old")[0] == 0
    assert len(Store("s").split("train")) == 6
    assert [path.name for path in cwd.glob("s*")] == ["s"]


@pytest.mark.parametrize("taken", ["s.partial", "s.replaced"])
def test_folders_of_the_user_beside_the_store_are_never_touched(cwd: Path, run_command: Run, taken: str) -> None:
    image_folder(cwd / "source", train=2, val=1)
    line = ("prepare", "data=folder", "data.image_size=32", "data.store=s", "source=source", "overwrite=true")
    assert run_command(*line)[0] == 0
    before = Store("s").images_sha256
    Path(taken).mkdir()
    Path(taken, "thesis.tex").write_text("all of it")
    status, _, err = run_command(*line)
    assert (status, f"{taken}, which would be used" in err) == (2, True), err
    assert (Path(taken, "thesis.tex").read_text(), Store("s").images_sha256) == ("all of it", before)


def test_overwriting_through_a_link_replaces_the_store_and_keeps_the_link(cwd: Path, run_command: Run) -> None:
    line = ("prepare", "data=folder", "data.image_size=32", "data.store=link", "overwrite=true")
    Path("disk").mkdir()
    Path("link").symlink_to("disk/store")
    for count in (2, 3):
        image_folder(cwd / f"source{count}", train=count, val=1)
        status, _, err = run_command(*line, f"source=source{count}")
        assert status == 0, err
        assert (Path("link").is_symlink(), len(Store("disk/store").split("train"))) == (True, 2 * count)
    assert [path.name for path in Path("disk").iterdir()] == ["store"]
    Path("disk/store/train").rename("train-elsewhere")
    Path("disk/store/train").symlink_to(cwd / "train-elsewhere")
    status, _, err = run_command(*line, "source=source2")
    assert (status, len(Store("link").split("train"))) == (0, 4), err
    assert Path("train-elsewhere").is_dir()
    Path("disk/store.replaced").symlink_to(cwd / "source2")
    status, _, err = run_command(*line, "source=source2")
    assert (status, "store.replaced, which would be used" in err) == (2, True), err
    assert sorted(path.name for path in Path("source2").iterdir()) == ["train", "val"]


def test_half_of_each_class_is_drawn_with_a_seed(cwd: Path) -> None:
    image_folder(cwd / "s", train=100, val=0)

    def drawn(seed: int | None) -> set[str]:
        found = scan(cwd / "s" / "train", 2, cwd, "test", seed)
        held = {file.name for file in found.files if file.split == "test"}
        assert {label: sum(name.startswith(label) for name in held) for label in ("cat", "dog")} == {
            "cat": 50,
            "dog": 50,
        }
        assert len(found.files) == 200
        assert (f"drawn with seed {seed}" in found.held_out) == (seed is not None)
        return held

    assert drawn(None) == {f"{label}/{i:03d}.jpg" for label in ("cat", "dog") for i in range(1, 100, 2)}
    assert drawn(0) == drawn(0)
    # two independent halves of 100 have 25 in common, with a standard deviation of 2.5, in each class
    for one, other in ((0, 1), (0, None)):
        both = drawn(one) & drawn(other)
        assert all(15 < sum(name.startswith(label) for name in both) < 35 for label in ("cat", "dog"))
    cats, dogs = ({name[4:] for name in drawn(0) if name.startswith(label)} for label in ("cat", "dog"))
    assert cats != dogs


def test_flat_files_are_classified_by_their_wordnet_id(cwd: Path, run_command: Run) -> None:
    for i, name in enumerate(("n01704323_triceratops", "n01704323_other", "n01729322_hognose_snake")):
        save_picture(cwd / "flat" / f"{name}.JPEG", i)
    tar_of(cwd / "flat", cwd / "flat.tar")
    assert run_command("prepare", "data=folder", "source=flat.tar")[0] == 0
    assert Store("stores/folder").classes == ["n01704323", "n01729322"]


class TestBadFiles:
    def source(self, cwd: Path, bad: int) -> Path:
        image_folder(cwd / "source")
        whole = (cwd / "source/train/cat/000.jpg").read_bytes()
        for i in range(bad):
            (cwd / f"source/train/cat/bad{i}.jpg").write_bytes(whole[:1000] if i % 2 else b"no image")
        return cwd / "source"

    def test_bad_files_are_skipped_and_named(self, cwd: Path, run_command: Run, small_store: Path) -> None:
        status, out, _ = run_command("prepare", "data=folder", f"source={self.source(cwd, 3)}")
        assert status == 0
        assert "left out 3 files" in out
        assert "train/cat/bad0.jpg" in out
        store = Store("stores/folder")
        assert len(store.manifest["bad"]) == 3
        whole = Store(small_store)
        np.testing.assert_array_equal(store.mean, whole.mean)
        assert all(np.array_equal(store.split("train")[i], whole.split("train")[i]) for i in range(12))

    def test_class_without_a_readable_image_is_refused(self, cwd: Path, run_command: Run) -> None:
        source = self.source(cwd, 1)
        for file in (source / "train/cat").iterdir():
            file.write_bytes(b"no image")
        status, _, err = run_command("prepare", "data=folder", f"source={source}", "max_bad=99")
        assert (status, "no training image of cat can be read: train/cat/" in err) == (2, True), err
        shutil.rmtree("stores/folder.partial")
        save_picture(source / "train/cat/good.jpg", 1)
        for file in (source / "train/dog").iterdir():
            file.write_bytes(b"no image")
        status, _, err = run_command("prepare", "data=folder", f"source={source}", "max_bad=99")
        assert (status, "no training image of dog can be read: train/dog/" in err) == (2, True), err

    def test_too_many_bad_files_stop_preparation_until_they_are_repaired_or_allowed(
        self, cwd: Path, run_command: Run
    ) -> None:
        source = self.source(cwd, 4)
        status, _, err = run_command("prepare", "data=folder", f"source={source}", "max_bad=3")
        assert status == 2
        assert "4 files can't be read" in err
        assert "max_bad=8" in err
        assert not Path("stores/folder").exists()
        shutil.copy(source / "train/cat/000.jpg", source / "train/cat/bad0.jpg")
        status, out, err = run_command("prepare", "data=folder", f"source={source}", "max_bad=3")
        assert status == 0, err
        assert "left out 3 files" in out
        assert len(Store("stores/folder").split("train")) == 13
        (source / "train/cat/bad0.jpg").write_bytes(b"no image")
        shutil.rmtree("stores")
        assert run_command("prepare", "data=folder", f"source={source}", "max_bad=3")[0] == 2
        assert run_command("prepare", "data=folder", f"source={source}", "max_bad=8")[0] == 0
        assert len(Store("stores/folder").split("train")) == 12


def test_interrupted_preparation_resumes_where_it_stopped(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, small_store: Path, source_folder: Path
) -> None:
    monkeypatch.setattr("alexnet_repro.data.shard_writer.SHARD", 4)
    files = [(s, f) for s in ("train", "val") for f in sorted((source_folder / s).rglob("*.jpg"))]
    reads: list[str] = []

    def examples(stop_at: int | None) -> list[Example]:
        def read(number: int, file: Path) -> np.ndarray:
            if number == stop_at:
                raise KeyboardInterrupt
            reads.append(file.name)
            return read_image(file.read_bytes, 256)

        return [
            Example(split, int(f.parent.name == "dog"), f"{split}/{f.name}", lambda n=n, f=f: read(n, f))  # type: ignore[misc]
            for n, (split, f) in enumerate(files)
        ]

    from alexnet_repro.errors import Interrupted

    with pytest.raises(Interrupted, match="of 18 images were read; the same command continues"):
        write_store(examples(stop_at=9), ["cat", "dog"], Path("store"), workers=1)
    assert not Path("store").exists()
    done_before = len(reads)
    assert done_before >= 8
    write_store(examples(stop_at=None), ["cat", "dog"], Path("store"), workers=1)
    assert len(reads) - done_before == 18 - 8  # two files of four images had been written
    store, whole = Store("store"), Store(small_store)
    assert store.manifest["splits"]["train"]["shards"] == [4, 4, 4]
    assert np.array_equal(store.mean, whole.mean)
    assert store.manifest["covariance"] == whole.manifest["covariance"]
    for split in ("train", "val"):
        assert all(np.array_equal(store.split(split)[i], whole.split(split)[i]) for i in range(len(whole.split(split))))


def test_unfinished_store_of_other_files_is_not_resumed(cwd: Path, source_folder: Path) -> None:
    def fail() -> np.ndarray:
        raise KeyboardInterrupt

    from alexnet_repro.errors import Interrupted

    with pytest.raises(Interrupted):
        write_store([Example("train", 0, "a", fail)], ["c"], Path("store"))
    with pytest.raises(UserError, match="made from other files"):
        write_store([Example("train", 0, "b", fail)], ["c"], Path("store"))


def test_resumed_preparation_reads_replaced_images_again(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources with the same names, of which the first was interrupted, give the second one's store."""
    monkeypatch.setattr("alexnet_repro.data.shard_writer.SHARD", 2)
    from alexnet_repro.errors import Interrupted

    def examples(value: int, sizes: list[int], stop_at: int | None = None) -> list[Example]:
        def read(number: int) -> np.ndarray:
            if number == stop_at:
                raise KeyboardInterrupt
            return np.full((8, 8, 3), value, np.uint8)

        return [Example("train", i % 2, str(i), partial(read, i), size) for i, size in enumerate(sizes)]

    def values(store: str) -> list[int]:
        split = Store(store).split("train")
        return [int(split[i].max()) for i in range(len(split))]

    options: dict[str, Any] = {"image_size": 8, "workers": 1}
    for store in ("same", "other", "damaged"):
        with pytest.raises(Interrupted):
            write_store(examples(1, [50] * 6, stop_at=4), ["c", "d"], Path(store), **options)
    Path("damaged.partial/train/00000.npz").write_bytes(b"PK")
    for store, size in (("same", 50), ("other", 51), ("damaged", 50)):
        write_store(examples(2, [50, size, *[50] * 4]), ["c", "d"], Path(store), **options)
    assert values("same") == [1, 1, 1, 1, 2, 2]
    assert values("other") == values("damaged") == [2, 2, 1, 1, 2, 2]


def test_one_process_prepares_a_store_at_a_time(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "source", train=2, val=1)
    line = ("prepare", "data=folder", "data.image_size=32", "data.store=s", "source=source")
    assert run_command(*line[:3], "data.store=.", "source=source", "overwrite=true")[0] == 2
    assert run_command(*line[:3], "data.store=new/s", "source=nowhere")[0] == 2
    assert not Path("new").exists()
    with FileLock("s.lock"):
        status, _, err = run_command(*line)
        assert (status, "another process is preparing s" in err) == (2, True), err
        assert not Path("s.partial").exists()
    assert run_command(*line)[0] == 0
    assert sorted(path.name for path in cwd.glob("s*")) == ["s", "source"]


@pytest.mark.slow
def test_killed_preparation_leaves_no_partial_store(cwd: Path) -> None:
    """Kill a real process while it is preparing, then run the same command again."""
    image_folder(cwd / "source", train=500, val=20)
    line = [sys.executable, "-m", "alexnet_repro.prepare", "data=folder", "source=source"]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            time.sleep(0.05)
            if Path("stores/folder.partial/train").exists():
                break
        process.send_signal(signal.SIGKILL)
    assert not Path("stores/folder").exists()
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0
    assert len(Store("stores/folder").split("train")) == 1000


def test_store_is_overwritten_only_on_request(cwd: Path, source_folder: Path, run_command: Run) -> None:
    line = ("prepare", "data=folder", f"source={source_folder}")
    assert run_command(*line)[0] == 0
    before = (cwd / "stores/folder/manifest.json").stat().st_mtime_ns
    status, _, err = run_command(*line)
    assert status == 2
    assert "overwrite=true" in err
    assert (cwd / "stores/folder/manifest.json").stat().st_mtime_ns == before
    assert run_command(*line, "overwrite=true")[0] == 0
    assert (cwd / "stores/folder/manifest.json").stat().st_mtime_ns > before


def test_verify_finds_a_changed_byte(cwd: Path, small_store: Path, run_command: Run) -> None:
    shutil.copytree(small_store, "copy")
    assert run_command("prepare", "data=folder", "data.store=copy", "verify=true")[0] == 0
    shard = cwd / "copy/val/00000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    status, _, err = run_command("prepare", "data=folder", "data.store=copy", "verify=true")
    assert status == 2
    assert "val/00000.npy" in err


def test_damaged_stores_are_reported(cwd: Path, small_store: Path) -> None:
    shutil.copytree(small_store, "copy")
    (cwd / "copy/train/00000.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000\.npy has 0 bytes, which is not its whole length"):
        Store("copy").split("train")[0]
    manifest = json.loads((cwd / "copy/manifest.json").read_text())
    (cwd / "copy/manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        Store("copy")


@pytest.mark.slow
def test_train_and_val_photo_patches_do_not_overlap() -> None:
    covered: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for split, _, name, _ in photos.patches(100, 20, 256):
        photograph, box = name.split(" at ")
        left, top, right, bottom = eval(box)
        pixels = {(x, y) for x in range(left, right) for y in range(top, bottom)}
        covered.setdefault((photograph, split), set()).update(pixels)
    assert len(covered) == 20
    for photograph in photos.PHOTOGRAPHS:
        assert not covered[photograph, "train"] & covered[photograph, "val"]


def test_disk_that_is_too_small_is_refused_before_anything_is_written(
    cwd: Path, source_folder: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    status, _, err = run_command("prepare", "data=folder", f"source={source_folder}", "data.store=s")
    assert status == 2
    assert "the store needs about 0.0 GB" in err  # 18 images of 197 kB
    assert not list(cwd.iterdir())


def test_half_of_each_synset_tar_is_held_out_as_test(cwd: Path, run_command: Run) -> None:
    """ImageNet Fall 2009 as it comes: one tar per synset."""
    for label, wnid in enumerate(("n01440764", "n01443537", "n02084071")):
        for i in range(6):
            save_picture(cwd / wnid / f"{wnid}_{i}.jpg", seed=10 * label + i)
        (cwd / "release").mkdir(exist_ok=True)
        with tarfile.open(cwd / "release" / f"{wnid}.tar", "w") as tar:
            for path in sorted((cwd / wnid).iterdir()):
                tar.add(path, path.name)
    status, _, err = run_command("prepare", "data=imagenet_fall2009", "source=release", "encoding=jpeg")
    assert status == 0, err
    store = Store("stores/imagenet_fall2009")
    assert store.classes == ["n01440764", "n01443537", "n02084071"]
    assert {name: facts["count"] for name, facts in store.manifest["splits"].items()} == {"train": 9, "test": 9}
    assert (
        store.manifest["held_out"]
        == "the source has no test split: one of 2 images of each class, drawn with seed 0, became it (9 images)"
    )


def test_kaggles_layout_is_read(cwd: Path, run_command: Run) -> None:
    """train/ has class folders, val/ and test/ are flat, and the labels of val are in a list three folders above."""
    data = cwd / "kaggle/ILSVRC/Data/CLS-LOC"
    wnids = ("n01440764", "n01443537")
    for label, wnid in enumerate(wnids):
        for i in range(3):
            save_picture(data / "train" / wnid / f"{wnid}_{i}.JPEG", seed=10 * label + i)
    lines = ["ImageId,PredictionString"]
    for number, label in enumerate((1, 0, 0, 1), 1):
        name = f"ILSVRC2012_val_{number:08d}"
        save_picture(data / "val" / f"{name}.JPEG", seed=100 + number)
        lines.append(f"{name},{wnids[label]} 10 20 30 40 {wnids[label]} 1 2 3 4 ")
    save_picture(data / "test" / "ILSVRC2012_test_00000001.JPEG", seed=200)
    solution = cwd / "kaggle/LOC_val_solution.csv"
    solution.write_text("\n".join([*lines[:-1], ""]))
    options = ("data=ilsvrc2012", f"source={data}", "data.store=s", "data.subset=true")
    status, _, err = run_command("prepare", *options)
    assert (status, "has no label of ILSVRC2012_val_00000004.JPEG" in err) == (2, True), err
    devkit._kaggle.cache_clear()
    solution.write_text("\n".join([*lines, ""]))
    status, out, err = run_command("prepare", *options)
    assert status == 0, err
    assert "6 train, 4 val, 1 unlabelled images of 2 classes" in out
    assert Store("s").split("val").labels.tolist() == [1, 0, 0, 1]


def test_lock_file_of_another_program_is_left_alone(source_folder: Path, cwd: Path, run_command: Run) -> None:
    Path("poetry.lock").write_text("all of it")
    status, _, err = run_command("prepare", "data=folder", f"source={source_folder}", "data.store=poetry")
    assert (status, "poetry.lock is not a lock of this program" in err) == (2, True), err
    assert Path("poetry.lock").read_text() == "all of it"
