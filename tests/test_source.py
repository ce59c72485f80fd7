"""Test that every item of a source is used, left out with a reason, or an error, and that it is the named data set."""

import bz2
import errno
import gzip
import io
import json
import random
import shutil
import subprocess
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from conftest import image_folder, picture, save_picture
from omegaconf import OmegaConf
from PIL import Image

from alexnet_repro.data import parquet, store_writer
from alexnet_repro.data.identity import differences
from alexnet_repro.data.images import read_image
from alexnet_repro.data.listing import Account, File
from alexnet_repro.data.source import Found, scan
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError

Run = Callable[..., tuple[int, str, str]]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, 40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def contents(found: Found) -> dict[str, bytes]:
    return {f"{file.split}/{file.name}": file.read_bytes() for file in found.files}


def shard(
    folder: Path, rows: list[tuple[str | None, bytes, int | None]], names: list[str], split: str = "train"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": path} for path, data, _ in rows]),
            "label": pa.array([label for *_, label in rows], pa.int64()),
        }
    )
    about = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    pq.write_table(table.replace_schema_metadata(about), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    "name",
    [
        lambda i: "image.png",
        lambda i: f"a{i}/1.png",
        lambda i: f".hidden/{i}.png",
        lambda i: f"../../{i}.png",
        lambda i: f"/abs/{i % 3}.png",
        lambda i: None,
        lambda i: "",
        lambda i: f"{i % 2}.tar",
        lambda i: f"@eaDir/{i}",
    ],
)
def test_every_row_of_a_shard_becomes_an_image_whatever_its_name(
    name: Callable[[int], str | None], cwd: Path, run_command: Run
) -> None:
    images = [png(i) for i in range(24)]
    shard(cwd / "s/data", [(name(i), data, i % 2) for i, data in enumerate(images)], ["cat", "dog"])
    status, _, err = run_command("prepare", "data=folder", "source=s", "data.image_size=40", "data.hold_out_every=4")
    assert status == 0, err
    store = Store("stores/folder")
    found = [(split, i) for split in ("train", "val") for i in range(len(store.split(split)))]
    pixels = {store.split(split)[i].tobytes(): int(store.split(split).labels[i]) for split, i in found}
    assert pixels == {read_image(lambda data=data: data, 40).tobytes(): i % 2 for i, data in enumerate(images)}
    assert store.manifest["accounting"] == {"seen": 24, "used": 24, "left_out": {}}


def test_rows_without_a_label_are_counted_also_by_a_resumed_command(tmp_path: Path) -> None:
    rows = [(f"{i}.png", png(i), (0, 1, -1, None)[i % 4]) for i in range(12)]
    shard(tmp_path / "s", rows, ["a/b", ".."])
    (tmp_path / "s/README.md").write_text("about")
    for _ in range(2):  # the second time from the unpacked copy
        found = scan(tmp_path / "s", None, tmp_path / "store")
        assert found.classes == [".. (1)", "a b"]
        left_out = {"files and folders beside the Parquet shards": 1, "images without a label": 6}
        assert found.account.settle(6) == {"seen": 13, "used": 6, "left_out": left_out}


def test_names_that_contradict_labels_are_refused_and_equal_names_of_labels_told_apart(tmp_path: Path) -> None:
    rows = [(f"n0000000{i}_{i}.png", png(i), i % 2) for i in range(4)]  # numbers, which are no WordNet IDs
    shard(tmp_path / "one", rows, ["a", "b"])
    with pytest.raises(UserError, match=r"row 2, n00000002_2.png: label 0 stands for n00000000"):
        scan(tmp_path / "one", None, tmp_path / "store")
    shard(tmp_path / "two", [(f"{i}.png", png(i), i % 3) for i in range(6)], ["crane", "maillot", "crane"])
    assert scan(tmp_path / "two", None, tmp_path / "store").classes == ["crane (0)", "crane (2)", "maillot"]


def test_reader_that_loses_an_image_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(tmp_path / "s", [(f"{i}.png", png(i), i % 2) for i in range(6)], ["a", "b"])
    whole = parquet._add
    monkeypatch.setattr(parquet, "_add", lambda tar, name, data: None if "3" in name else whole(tar, name, data))
    with pytest.raises(RuntimeError, match="of 6 items of the source, 5 are used and 0 left out"):
        scan(tmp_path / "s", None, tmp_path / "store")


def test_writer_that_loses_an_image_is_an_error(cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(cwd / "s")
    whole = store_writer.write_shards
    monkeypatch.setattr(store_writer, "write_shards", lambda members, *rest: whole(members[:-1], *rest))
    with pytest.raises(RuntimeError, match=r"of \d+ images, \d+ are stored and 0 left out"):
        run_command("prepare", "data=folder", "source=s", "data.image_size=16")


def test_account_of_a_folder_adds_up(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "s", train=4, val=2)
    (cwd / "s/train/cat/.DS_Store").write_bytes(b"x")
    (cwd / "s/train/cat/bad.jpg").write_bytes(b"no image")
    (cwd / "s/.cache").mkdir()
    (cwd / "s/extra").mkdir()
    (cwd / "s/extra/1.jpg").write_bytes(b"x")
    (cwd / "s/README").write_text("x")
    (cwd / "s/train/cat/gone.jpg").symlink_to("nothing")
    assert run_command("prepare", "data=folder", "source=s", "data.image_size=16")[0] == 0
    account = Store("stores/folder").manifest["accounting"]
    everything = [path for path in (cwd / "s").rglob("*") if not path.is_dir()]
    assert account["seen"] == len(everything) + 1  # .cache is empty and counts as a folder that is not entered
    assert account["used"] == 12
    assert sum(account["left_out"].values()) == account["seen"] - account["used"]
    assert account["left_out"]["files that can't be read as images"] == 1


@pytest.mark.skipif("GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout, reason="no GNU tar")  # fmt: skip
@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_members_have_the_bytes_of_their_files(form: str, tmp_path: Path) -> None:
    image_folder(tmp_path / "s", train=2, val=1)
    for number, path in enumerate(sorted((tmp_path / "s").rglob("*.jpg"))):
        data = png(number) + bytes(300_000) + b"end"
        with path.open("wb") as file:
            file.write(data[: len(png(number))])
            file.seek(300_000, io.SEEK_CUR)
            file.write(b"end")
    options = ["--format=gnu"] if form == "gnu" else ["--format=posix", f"--sparse-version={form}"]
    subprocess.run(["tar", "--sparse", *options, "-cf", tmp_path / "a.tar", "-C", tmp_path / "s", "."], check=True)
    with tarfile.open(tmp_path / "a.tar") as tar:
        if not any(member.sparse for member in tar):
            pytest.skip("the file system has no sparse files")
    assert contents(scan(tmp_path / "a.tar", None, tmp_path)) == contents(scan(tmp_path / "s", None, tmp_path))


FIRST = (("cat/0.png", png(0)), ("dog/0.png", png(1)))
SECOND = (("cat/1.png", png(2)), ("dog/0.png", png(3)))


@pytest.mark.parametrize("compressed", [False, True])
def test_joined_tars_are_read_to_the_end(compressed: bool, tmp_path: Path) -> None:
    one, two = tar_bytes(*FIRST), tar_bytes(*SECOND)
    path = tmp_path / "joined.tar"
    path.write_bytes(gzip.compress(one) + gzip.compress(two) if compressed else one + two)
    found = scan(path, None, tmp_path / "store")
    assert contents(found) == {"train/cat/0.png": png(0), "train/cat/1.png": png(2), "train/dog/0.png": png(3)}
    assert found.account.settle(3)["seen"] == 4


def test_what_follows_a_tar_and_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(*FIRST) + b"something else" * 100)
    with pytest.raises(UserError, match="followed by something else"):
        scan(tmp_path / "a.tar", None, tmp_path / "store")
    (tmp_path / "a.tar").write_bytes(tar_bytes(*FIRST) + bytes(5000))  # padding
    assert len(scan(tmp_path / "a.tar", None, tmp_path / "store").files) == 2


JUNK = (
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/0.png", "Thumbs.db", "._0.png", "SYNOINDEX_0.png",
    "0.png@SynoEAStream", "#recycle/0.png", "@__thumb/0.png", "0.png:Zone.Identifier", "__MACOSX/._0.png", "desktop.ini",
)  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "tar", "tar with dots"])
def test_thumbnails_and_resource_forks_are_no_images(form: str, tmp_path: Path) -> None:
    images = {f"train/{name}/{i}.png": png(10 * label + i) for label, name in enumerate("ab") for i in range(2)}
    everything = images | {f"train/a/{name}": png(50 + i) for i, name in enumerate(JUNK)}
    everything |= {"__MACOSX/train/a/._0.png": png(90), "@eaDir/x.png": png(91)}
    if form == "folder":
        for name, data in everything.items():
            (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "s" / name).write_bytes(data)
        path = tmp_path / "s"
    else:
        path = tmp_path / "s.tar"
        path.write_bytes(tar_bytes(*(("./" * ("dots" in form) + name, data) for name, data in everything.items())))
    found = scan(path, None, tmp_path / "store")
    assert contents(found) == images
    assert found.account.settle(len(found.files))


def test_tars_made_inside_their_folder_are_read_at_any_depth(tmp_path: Path) -> None:
    inner = [(f"./{name}.tar", tar_bytes(*((f"./{i}.png", png(i)) for i in range(2)))) for name in "ab"]
    path = tmp_path / "s"
    path.mkdir()
    for split in ("train", "val"):
        (path / f"{split}.tar").write_bytes(tar_bytes(*inner))
    assert sorted(contents(scan(path, None, tmp_path / "store"))) == sorted(
        f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ab" for i in range(2)
    )
    for split in ("train", "val"):  # made with "cd train && tar -cf ../train.tar ."
        image_folder(tmp_path / "plain", train=2, val=1)
        with tarfile.open(tmp_path / "s" / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "plain" / split, arcname=".")
    assert contents(scan(path, None, tmp_path / "store")) == contents(
        scan(tmp_path / "plain", None, tmp_path / "store")
    )
    deep = tar_bytes(*FIRST)
    for _ in range(20):
        deep = tar_bytes(("x.tar", deep))
    (tmp_path / "deep.tar").write_bytes(deep)
    with pytest.raises(UserError, match="more than 8 tars inside each other"):
        scan(tmp_path / "deep.tar", None, tmp_path / "store")


@pytest.mark.parametrize("every_seed", [(None, None), (3, None), (3, 7)])
def test_the_order_of_an_archive_decides_nothing(
    every_seed: tuple[int | None, int | None], tmp_path: Path, run_command: Run
) -> None:
    names = [(f"{name}/{i}.png", png(20 * label + i)) for label, name in enumerate("ab") for i in range(12)]
    every, seed = every_seed
    found = []
    for order in range(3):
        random.Random(order).shuffle(names)
        (tmp_path / f"{order}.tar").write_bytes(tar_bytes(*names))
        found.append(scan(tmp_path / f"{order}.tar", every, tmp_path / "store", "val", seed))
    for name, data in names:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    found.append(scan(tmp_path / "folder", every, tmp_path / "store", "val", seed))
    listed = [[(file.split, file.label, file.name) for file in one.files] for one in found]
    assert listed[0] == listed[1] == listed[2] == listed[3]
    assert sum(split == "val" for split, *_ in listed[0]) == (24 // every if every else 0)


def test_all_forms_of_imagenet_give_the_same_images_in_the_same_order(cwd: Path, run_command: Run) -> None:
    """Names are compared as in ImageNet's archives: 1002.JPEG, 10026.JPEG, but 10026_n00000002.JPEG, 1002_n00000002.JPEG."""
    train = {w: [(f"{w}_{n}", png(i * 7 + n)) for n in (1002, 10026, 3)] for i, w in enumerate(WNIDS[2012])}
    val = [(f"ILSVRC2012_val_{i + 1:08d}", w, png(900 + i)) for i, w in enumerate(WNIDS[2012][::-1] * 2)]
    for end in (False, True):  # class folders, with the names of ImageNet and of Hugging Face
        for w, images in train.items():
            for name, data in images:
                path = cwd / f"folders{end}/train" / w / f"{name}{f'_{w}' * end}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        for name, w, data in val:
            path = cwd / f"folders{end}/val" / w / f"{name}{f'_{w}' * end}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    archives = ilsvrc(cwd / "archives", 2012)
    inner = [(f"{w}.tar", tar_bytes(*((f"{n}.JPEG", data) for n, data in images[::-1]))) for w, images in train.items()]
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(*inner[::-1]))
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(*((f"{n}.JPEG", data) for n, _, data in val[::-1])))
    kit = archives / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(kit) as tar:
        tar.extractall(archives, filter="data")
    kit.unlink()
    truth = archives / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n3\n" * 2)  # the kit counts from the last class
    (cwd / "kaggle/ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    shutil.copytree(cwd / "foldersFalse/train", cwd / "kaggle/ILSVRC/Data/CLS-LOC/train")
    for name, _, data in val:
        path = cwd / f"kaggle/ILSVRC/Data/CLS-LOC/val/{name}.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    lines = ["ImageId,PredictionString", *(f"{name},{w} 1 2 3 4" for name, w, _ in val)]
    (cwd / "kaggle/LOC_val_solution.csv").write_text("\n".join(lines))
    rows = [(f"{name}_{w}.JPEG", data, i) for i, (w, images) in enumerate(train.items()) for name, data in images]
    shard(cwd / "hf/data", rows[::2] + rows[1::2], ["a", "b", "c"])
    shard(
        cwd / "hf/data",
        [(f"{n}_{w}.JPEG", data, WNIDS[2012].index(w)) for n, w, data in val],
        ["a", "b", "c"],
        "validation",
    )
    found = {}
    for source in ("foldersFalse", "foldersTrue", "archives", "kaggle", "hf"):
        options = (
            "data=ilsvrc2012",
            "data.subset=true",
            f"source={source}",
            f"data.store=st/{source}",
            "data.image_size=16",
        )
        status, out, err = run_command("prepare", *options)
        assert status == 0, err
        assert "9 train, 6 val images of 3 classes" in out
        store = Store(f"st/{source}")
        found[source] = store.images_sha256
        assert store.split("val").labels.tolist() == [2, 1, 0] * 2
    assert len(set(found.values())) == 1, found


def test_stores_say_whose_order_they_have(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "s")
    assert run_command("prepare", "data=folder", "source=s", "data.image_size=16", "data.store=st")[0] == 0
    assert Store("st").manifest["order"] == "class and name"
    status, out, _ = run_command("prepare", "data=folder", "data.store=st", "verify=true")
    assert (status, f"images_sha256 {Store('st').images_sha256}, images in the order of class and name" in out) == (
        0,
        True,
    )
    manifest = json.loads((cwd / "st/manifest.json").read_text())
    before = Store("st").images_sha256
    del manifest["order"], manifest["checksum"]  # as an earlier version wrote it
    (cwd / "st/manifest.json").write_text(json.dumps(manifest))
    status, out, _ = run_command("prepare", "data=folder", "data.store=st", "verify=true")
    assert (status, f"images_sha256 {before}, images in the order of the source" in out) == (0, True), out


WNIDS = {2010: ("n00000002", "n00000003", "n00000009"), 2012: ("n00000001", "n00000002", "n00000003")}


def ilsvrc(folder: Path, year: int, kit: int | None = None) -> Path:
    """Write the archives of a year, with three classes, and the kit of the year ``kit``."""
    folder.mkdir(exist_ok=True)
    kit = kit or year
    word = "img" if year == 2012 else "images"
    inner = [(f"{w}.tar", tar_bytes(*((f"{w}_{i}.JPEG", png(year + i)) for i in range(2)))) for w in WNIDS[year]]
    (folder / f"ILSVRC{year}_{word}_train.tar").write_bytes(tar_bytes(*inner))
    val = [(f"ILSVRC{year}_val_{i + 1:08d}.JPEG", png(i)) for i in range(3)]
    (folder / f"ILSVRC{year}_{word}_val.tar").write_bytes(tar_bytes(*val))
    rows = [(i + 1, wnid) for i, wnid in enumerate(reversed(WNIDS[kit]))]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=[(f"ILSVRC{kit}_ID", object), ("WNID", object)])})
    name = {2012: "ILSVRC2012_devkit_t12", 2010: "devkit-1.0"}[kit]
    files = (
        (f"{name}/data/meta.mat", meta.getvalue()),
        (f"{name}/data/ILSVRC{kit}_validation_ground_truth.txt", b"1\n1\n2\n"),
    )
    prefix = "" if name.startswith("ILSVRC") else f"ILSVRC{kit}_"
    (folder / f"{prefix}{name}.tar.gz").write_bytes(gzip.compress(tar_bytes(*files)))
    return folder


@pytest.mark.parametrize("year", [2010, 2012])
def test_archives_of_both_years_in_one_folder_are_told_apart(year: int, tmp_path: Path) -> None:
    both, one = tmp_path / "both", ilsvrc(tmp_path / "one", year)
    for other in (2010, 2012):
        ilsvrc(both, other)
    found = scan(both, None, tmp_path / "store", year=year)
    assert found.classes == list(WNIDS[year])
    assert contents(found) == contents(scan(one, None, tmp_path / "store", year=year))
    labels = [found.classes[file.label] for file in found.files if file.split == "val"]
    assert labels == [WNIDS[year][2], WNIDS[year][2], WNIDS[year][1]]  # by the kit of this year
    with pytest.raises(UserError, match="of several years: 2010, 2012"):
        scan(both, None, tmp_path / "store")
    with pytest.raises(UserError, match=f"holds ILSVRC of {year}, not of {4022 - year}"):
        scan(one, None, tmp_path / "store", year=4022 - year)
    with pytest.raises(UserError, match=f"holds ILSVRC of {year}, not of {4022 - year}"):
        scan(next(one.glob("*_train.tar")), None, tmp_path / "store", year=4022 - year)


@pytest.mark.parametrize("name", [None, "devkit", "ILSVRC2012_devkit_t12"])
def test_labels_of_another_year_are_not_used(name: str | None, tmp_path: Path) -> None:
    folder = ilsvrc(tmp_path / "s", 2012, kit=2010)
    message = "put the development kit with their labels into the same folder"
    if name:  # its name does not say, or says another year
        kit = next(folder.glob("*devkit*"))
        with tarfile.open(kit) as tar:
            tar.extractall(folder, filter="data")
        kit.unlink()
        (folder / "devkit-1.0").rename(folder / name)
        message = "is that of ILSVRC 2010, and the images are those of 2012"
    with pytest.raises(UserError, match=message):
        scan(folder, None, tmp_path / "store", year=2012)


def test_whole_data_set_is_told_from_a_part_and_from_another(cwd: Path, run_command: Run) -> None:
    data = OmegaConf.create(
        {"name": "x", "source": "yours", "classes": 2, "images": {"train": 8, "val": 4}, "hold_out_as": "val"}
    )

    def found(train: int, val: int, classes: int = 2, held_out: str = "") -> Found:
        files = [File("", Path("x"), 0, 0, split="train")] * train + [File("", Path("x"), 0, 0, split="val")] * val
        return Found(files, [str(i) for i in range(classes)], held_out)

    assert differences(found(8, 4), data) == []
    assert differences(found(6, 2, held_out="one of 4"), data) == []
    assert differences(found(8, 0), data) == ["0 val images, not 4"]
    assert differences(found(7, 4, 3), data) == ["3 classes, not 2", "7 train images, not 8"]

    ilsvrc(cwd / "s", 2012)
    status, _, err = run_command("prepare", "data=ilsvrc2012", "source=s", "data.image_size=16")
    assert status == 2
    assert "it holds 3 classes, not 1,000; 6 train images, not 1,281,167; 3 val images, not 50,000" in err
    assert "data.subset=true" in err
    assert not Path("stores/ilsvrc2012").exists()
    line = ("prepare", "data=ilsvrc2012", "source=s", "data.image_size=16", "data.subset=true")
    status, out, err = run_command(*line)
    assert (status, "a part of data=ilsvrc2012: 3 classes, not 1,000" in out) == (0, True), err
    assert Store("stores/ilsvrc2012").manifest["subset"][0] == "3 classes, not 1,000"
    status, _, err = run_command("prepare", "data=folder", "source=s", "data.subset=true")
    assert (status, "data.subset" in err) == (2, True)


def test_names_in_two_unicode_forms_are_one_class_or_refused(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for i, folder in enumerate((f"train/{composed}", "train/dog", f"val/{apart}", "val/dog")):
        save_picture(tmp_path / "s" / folder / f"{i}.jpg", i)
    assert scan(tmp_path / "s", None, tmp_path / "store").classes == [composed, "dog"]
    save_picture(tmp_path / "s" / "train" / apart / "9.jpg", 9)
    with pytest.raises(UserError, match="exists twice, in two Unicode forms"):
        scan(tmp_path / "s", None, tmp_path / "store")


@pytest.mark.parametrize("kind", ["zip", "zst", "7z", "gz"])
def test_other_archives_are_called_by_their_name(kind: str, tmp_path: Path) -> None:
    magic = {"zst": b"\x28\xb5\x2f\xfd", "7z": b"7z\xbc\xaf\x27\x1c"}
    packed = tar_bytes(*FIRST)
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("cat/0.png", png(0))
        packed = buffer.getvalue()
    elif kind == "gz":
        packed = gzip.compress(packed)
    else:
        packed = magic[kind] + bytes(1000)
    told = {"zip": "zip archive", "zst": "compressed with zstd", "7z": "7z archive", "gz": "compressed with gzip"}[kind]
    if kind != "gz":
        (tmp_path / f"a.{kind}").write_bytes(packed)
        with pytest.raises(UserError, match=told):
            scan(tmp_path / f"a.{kind}", None, tmp_path / "store")
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "train.tar").write_bytes(packed)
    with pytest.raises(UserError, match=f"{told}, although its name ends in .tar"):
        scan(folder, None, tmp_path / "store")
    (tmp_path / "outer.tar").write_bytes(tar_bytes(*FIRST, ("inner.tar", packed)))
    with pytest.raises(UserError, match=f"inner.tar in .*outer.tar is (a )?{told}"):
        scan(tmp_path / "outer.tar", None, tmp_path / "store")


def test_archives_beside_images_are_left_out_unless_they_seem_to_hold_a_split(tmp_path: Path) -> None:
    image_folder(tmp_path / "s")
    (tmp_path / "s/notes.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "s/ILSVRC2012_bbox_val_v3.tgz").write_bytes(bz2.compress(b""))
    found = scan(tmp_path / "s", None, tmp_path / "store")
    assert found.account.left_out["archives, which are not unpacked"][0] == 2
    (tmp_path / "s/train_more.tar.gz").write_bytes(gzip.compress(tar_bytes(*FIRST)))
    with pytest.raises(UserError, match=r"train_more.tar.gz .* is an archive that is not read"):
        scan(tmp_path / "s", None, tmp_path / "store")


def test_escape_characters_in_names_do_not_reach_the_terminal(cwd: Path, run_command: Run) -> None:
    evil = "\x1b]0;title\x07\x1b[2J"
    members = [(f"{name}/{i}{evil}.png", png(i)) for name in (f"cat{evil}", "dog") for i in range(3)]
    members += [(f"cat{evil}/bad{evil}.png", b"no image"), (f".{evil}", b""), (f"../{evil}", b"")]
    (cwd / "a.tar").write_bytes(tar_bytes(*members))
    status, out, err = run_command(
        "prepare", "data=folder", "source=a.tar", "data.image_size=16", "data.hold_out_every=3"
    )
    assert status == 0, err
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert "bad\\x1b]0;title\\x07" in out
    assert Store("stores/folder").classes == ["cat\\x1b]0;title\\x07\\x1b[2J", "dog"]
    (cwd / "cut.tar").write_bytes(tar_bytes((f"cat/{evil}.png", bytes(5000)))[:3000])
    status, out, err = run_command("prepare", "data=folder", "source=cut.tar", "data.store=other")
    assert (status, "is cut" in err, "\x1b" in err) == (2, True, False)


@pytest.mark.parametrize("above", ["ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"])
def test_folder_above_kaggles_images_is_read(above: str, tmp_path: Path) -> None:
    root = tmp_path / "kaggle"
    for w in ("n01440764", "n01443537"):
        save_picture(root / above / "train" / w / f"{w}_1.JPEG", 1)
        (root / above).parent.parent.joinpath("Annotations", w).mkdir(parents=True)
        (root / above).parent.parent.joinpath("Annotations", w, "1.xml").write_text("x")
    assert scan(root, None, tmp_path / "store").classes == ["n01440764", "n01443537"]


def test_tiny_imagenet_is_a_data_set(cwd: Path, run_command: Run) -> None:
    root = cwd / "tiny-imagenet-200"
    for label, w in enumerate(("n01443537", "n02058221")):
        for i in range(3):
            save_picture(root / f"train/{w}/images/{w}_{i}.JPEG", 10 * label + i, 64, 64)
        save_picture(root / f"val/images/val_{label}.JPEG", 100 + label, 64, 64)
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02058221\t0\nval_1.JPEG\tn01443537\t0\n")
    (root / "wnids.txt").write_text("n01443537\nn02058221\n")
    status, _, err = run_command("prepare", "data=tiny_imagenet", f"source={root}")
    assert (status, "2 classes, not 200; 6 train images, not 100,000" in err) == (2, True), err
    status, out, err = run_command("prepare", "data=tiny_imagenet", f"source={root}", "data.subset=true")
    assert (status, "6 train, 2 val images of 2 classes, 64x64" in out) == (0, True), err
    store = Store("stores/tiny_imagenet")
    right = read_image((root / "val/images/val_0.JPEG").read_bytes, 64)
    assert np.array_equal(store.split("val")[int(np.argmax(store.split("val").labels == 1))], right)


def test_account_names_the_number_and_an_example() -> None:
    account = Account()
    account.leave_out("things", "a\x1b")
    account.leave_out("things", "b", 1000)
    assert account.lines() == [r"1,001 things, such as a\x1b"]


def test_empty_folders_matter_only_where_a_class_is_expected(tmp_path: Path) -> None:
    image_folder(tmp_path / "s")
    for folder in ("notes", "val/images", "train/cat/old", "lost+found"):
        (tmp_path / "s" / folder).mkdir()
    assert len(scan(tmp_path / "s", None, tmp_path / "store").classes) == 2
    for folder in ("train/fox", "val/cat"):
        shutil.rmtree(tmp_path / "s" / folder, ignore_errors=True)
        (tmp_path / "s" / folder).mkdir()
        with pytest.raises(UserError, match=f"hold no images: {folder}"):
            scan(tmp_path / "s", None, tmp_path / "store")
        shutil.rmtree(tmp_path / "s" / folder)


@pytest.mark.parametrize("data", ["folder", "photos"])
def test_folder_that_cannot_be_written_names_the_option(
    data: str, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(cwd / "s")
    mkdir = Path.mkdir

    def read_only(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.startswith("read-only"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    source = [] if data == "photos" else ["source=s"]
    status, _, err = run_command("prepare", f"data={data}", *source, "data.store=read-only/st")
    assert status == 2
    assert "Read-only file system" in err
    assert "data.store=PATH" in err


@pytest.mark.parametrize("archive", ["train.tar", "ILSVRC2012_img_train.tar"])
def test_archive_beside_its_unpacked_folder_is_refused(archive: str, tmp_path: Path) -> None:
    image_folder(tmp_path / "s", train=2, val=1)
    with tarfile.open(tmp_path / "s" / archive, "w") as tar:
        tar.add(tmp_path / "s/train", arcname=".")
    with pytest.raises(UserError, match=r"has train/cat/000.jpg twice: in .*train.* and in "):
        scan(tmp_path / "s", None, tmp_path / "store")
