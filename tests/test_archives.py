"""Test that nothing in an archive or a folder is lost without a word, and that archives cannot do harm."""

import errno
import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import image_folder, picture, save_picture
from PIL import Image

from alexnet_repro.data.images import read_image
from alexnet_repro.data.listing import LARGEST_FILE
from alexnet_repro.data.source import Found, scan
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError

Run = Callable[..., tuple[int, str, str]]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, 40, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(path: Path, *members: tuple[str, bytes | None, str]) -> Path:
    """Write a tar of (name, content, type or link target)."""
    with tarfile.open(path, "w") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            if content is not None:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                link, _, target = kind.partition(" ")
                info.type = {"hard": tarfile.LNKTYPE, "sym": tarfile.SYMTYPE, "pipe": tarfile.FIFOTYPE}[link]
                info.linkname = target
                tar.addfile(info)
    return path


def scanned(path: Path, tmp_path: Path) -> Found:
    return scan(path, None, tmp_path)


def test_links_in_a_tar_stand_for_their_files(tmp_path: Path) -> None:
    tar = tar_of(
        tmp_path / "a.tar",
        ("cat/0.jpg", jpeg(0), ""),
        ("dog/0.jpg", jpeg(1), ""),
        ("cat/hard.jpg", None, "hard cat/0.jpg"),
        ("dog/soft.jpg", None, "sym 0.jpg"),
        ("dog/up.jpg", None, "sym ../cat/0.jpg"),
        ("dog/first.jpg", None, "sym second.jpg"),
        ("dog/second.jpg", None, "sym 0.jpg"),
        ("dog/lost.jpg", None, "sym elsewhere.jpg"),
        ("dog/pipe", None, "pipe"),
    )
    found = scanned(tar, tmp_path)
    content = {file.name: file.read_bytes() for file in found.files}
    assert content["cat/hard.jpg"] == content["dog/up.jpg"] == jpeg(0)
    assert content["dog/soft.jpg"] == content["dog/first.jpg"] == jpeg(1)
    assert len(content) == 7
    notes = " ".join(found.ignored)
    assert "1 links" in notes
    assert "dog/lost.jpg" in notes
    assert "1 members" in notes
    assert "dog/pipe" in notes


def test_last_of_several_members_with_one_name_counts(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar", ("cat/0.jpg", jpeg(0), ""), ("dog/0.jpg", jpeg(1), ""), ("cat/0.jpg", jpeg(2), ""))
    found = scanned(tar, tmp_path)
    assert {file.name: file.read_bytes() for file in found.files} == {"cat/0.jpg": jpeg(2), "dog/0.jpg": jpeg(1)}
    assert "replaced by later ones of the same name, such as cat/0.jpg" in " ".join(found.ignored)


def test_names_that_lead_out_of_the_archive_are_left_out_and_named(tmp_path: Path) -> None:
    tar = tar_of(
        tmp_path / "a.tar",
        ("/cat/0.jpg", jpeg(0), ""),
        ("dog/0.jpg", jpeg(1), ""),
        ("../evil/0.jpg", jpeg(2), ""),
        ("cat/../../x.jpg", jpeg(2), ""),
    )
    found = scanned(tar, tmp_path)
    assert found.classes == ["cat", "dog"]  # an absolute name counts without its /, as when tar unpacks it
    assert "2 members" in found.ignored[0]
    assert "names that lead out of it, such as ../evil/0.jpg" in found.ignored[0]


@pytest.mark.parametrize("cut", ["in a header", "between members", "in a file", "before the end marker"])
@pytest.mark.parametrize("nested", [False, True])
def test_cut_tar_is_refused(cut: str, nested: bool, tmp_path: Path) -> None:
    members = [(f"{name}/{i}.jpg", jpeg(i), "") for name in ("cat", "dog") for i in range(4)]
    whole = tar_of(tmp_path / "whole.tar", *members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        fifth, last = tar.getmembers()[5], tar.getmembers()[-1]
    ends = {
        "in a header": fifth.offset + 100,
        "between members": fifth.offset,
        "in a file": fifth.offset_data + 200,
        "before the end marker": last.offset_data + (last.size + 511) // 512 * 512,
    }
    part = whole[: ends[cut]]
    path = tmp_path / "part.tar"
    path.write_bytes(part)
    if nested:
        tar_of(path, ("inner.tar", part, ""), ("z/0.jpg", jpeg(0), ""))
    with pytest.raises(UserError, match=r"is (cut|damaged)"):
        scanned(path, tmp_path)


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    image_folder(tmp_path / "all", train=2, val=0)
    (tmp_path / "some/train").mkdir(parents=True)
    (tmp_path / "some/train/cat").symlink_to(tmp_path / "all/train/cat")
    (tmp_path / "some/train/dog").mkdir()
    (tmp_path / "some/train/dog/0.jpg").symlink_to(tmp_path / "all/train/dog/000.jpg")
    (tmp_path / "some/train/dog/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "some/train/loop").symlink_to(tmp_path / "some")
    found = scanned(tmp_path / "some", tmp_path)
    assert sorted(file.name for file in found.files) == ["cat/000.jpg", "cat/001.jpg", "dog/0.jpg"]
    assert found.ignored == ["1 names that lead to no file, such as train/dog/gone.jpg"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_read(mode: str, tmp_path: Path) -> None:
    image_folder(tmp_path / "s", train=2, val=1)
    with tarfile.open(tmp_path / "a.tar.z", mode) as tar:  # type: ignore[call-overload]
        tar.add(tmp_path / "s", arcname=".")
    assert len(scanned(tmp_path / "a.tar.z", tmp_path).files) == 6


def test_tiny_imagenet_is_read_as_it_comes(tmp_path: Path, run_command: Run, cwd: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n01443537", "n02058221")):
        for i in range(3):
            save_picture(root / f"train/{name}/images/{name}_{i}.JPEG", 10 * label + i, 64, 64)
        (root / f"train/{name}/{name}_boxes.txt").write_text("box")
    for i in range(4):
        save_picture(root / f"val/images/val_{i}.JPEG", 100 + i, 64, 64)
        save_picture(root / f"test/images/test_{i}.JPEG", 200 + i, 64, 64)
    labels = ["n02058221", "n01443537", "n01443537", "n02058221"]
    lines = [f"val_{i}.JPEG\t{name}\t0\t32\t44\t62" for i, name in enumerate(labels)]
    (root / "val/val_annotations.txt").write_text("\n".join(lines))
    (root / "wnids.txt").write_text("n01443537\nn02058221\n")
    status, out, err = run_command("prepare", "data=folder", f"source={root}", "data.image_size=64")
    assert status == 0, err
    assert "6 train, 4 val images of 2 classes" in out
    assert "4 test images without labels" in out
    found = scan(root, None, tmp_path)
    of = {file.name.rpartition("/")[2]: file.label for file in found.files if file.split == "val"}
    assert [of[f"val_{i}.JPEG"] for i in range(4)] == [1, 0, 0, 1]
    assert len(Store("stores/folder").split("val")) == 4


def test_bombs_are_refused_before_they_take_memory() -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(LARGEST_FILE // 2**20 + 8)) + packer.flush()
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_image(lambda: bomb, 64)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="pixels"):
        read_image(lambda: png, 64)
    good = jpeg(0)
    assert read_image(lambda: gzip.compress(good), 32).shape == (32, 32, 3)


def test_member_that_declares_more_bytes_than_the_archive_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("cat/0.jpg")
    info.size = 2**40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match=r"is cut: it ends inside cat/0\.jpg"):
        scanned(tmp_path / "a.tar", tmp_path)


def test_images_that_end_early_are_left_out_and_listed(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "s", train=3, val=1)
    for i, end in enumerate((-2, 2000)):
        path = cwd / f"s/train/cat/00{i}.jpg"
        path.write_bytes(path.read_bytes()[:end])
    status, out, err = run_command("prepare", "data=folder", "source=s")
    assert status == 0, err
    assert "left out 2 files" in out
    assert [name.split(" ")[0] for name in Store("stores/folder").manifest["bad"]] == [
        "train/cat/000.jpg",
        "train/cat/001.jpg",
    ]


def test_messages_of_decoders_stay_off_the_screen_and_out_of_addresses(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "s", train=3, val=1)
    buffer = io.BytesIO()
    Image.fromarray(picture(3, 64, 64)).save(buffer, "TIFF", compression="tiff_lzw")
    data = bytearray(buffer.getvalue())
    data[60:400] = bytes(340)
    (cwd / "s/train/cat/broken.tif").write_bytes(data)
    (cwd / "s/train/cat/text.jpg").write_text("not an image")
    status, out, err = run_command("prepare", "data=folder", "source=s")
    assert status == 0, err
    assert "text.jpg" in out
    assert "0x" not in out
    assert all("preparing" in line for line in err.replace("\r", "\n").splitlines() if line.strip()), err


WNIDS = ("n01440764", "n02102040", "n03028079")


def shards_of(folder: Path, *, order: tuple[str, ...] = WNIDS, shuffled: bool = True) -> Path:
    """Write Parquet shards as Hugging Face's imagenet-1k has them: two of train, one of validation, one of test.

    order: the WordNet IDs of labels 0, 1 and 2.
    """
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["tench, fish", "dog", "church"]}}}})}
    (folder / "data").mkdir(parents=True)

    def write(name: str, rows: list[tuple[str, bytes, int]]) -> None:
        images = [{"bytes": data, "path": path} for path, data, _ in rows]
        table = pa.table({"image": images, "label": pa.array([label for *_, label in rows], pa.int64())})
        pq.write_table(table.replace_schema_metadata(names), folder / "data" / name, row_group_size=2)

    train = [
        (f"{wnid}_{i}_{wnid}.JPEG", jpeg(10 * label + i), label) for label, wnid in enumerate(order) for i in range(3)
    ]
    val = [
        (f"ILSVRC2012_val_0000000{label + 1}_{wnid}.JPEG", jpeg(50 + label), label) for label, wnid in enumerate(order)
    ]
    mixed = train[::2] + train[1::2] if shuffled else train
    write("train-00000-of-00002.parquet", mixed[:5])
    write("train-00001-of-00002.parquet", mixed[5:])
    write("validation-00000-of-00001.parquet", val)
    write("test-00000-of-00001.parquet", [(f"ILSVRC2012_test_0000000{i}.JPEG", jpeg(90 + i), -1) for i in (2, 1)])
    return folder


def test_parquet_shards_give_the_store_of_the_class_folders(tmp_path: Path, run_command: Run) -> None:
    shards = shards_of(tmp_path / "imagenet-1k")
    for label, wnid in enumerate(WNIDS):
        for split, files in (("train", {f"{wnid}_{i}_{wnid}.JPEG": 10 * label + i for i in range(3)}), ("val", {f"ILSVRC2012_val_0000000{label + 1}_{wnid}.JPEG": 50 + label})):  # fmt: skip
            (tmp_path / "folders" / split / wnid).mkdir(parents=True)
            for name, seed in files.items():
                (tmp_path / "folders" / split / wnid / name).write_bytes(jpeg(seed))
    stores = []
    for source in (shards, tmp_path / "folders"):
        store = tmp_path / f"store-{source.name}"
        status, out, err = run_command("prepare", "data=folder", "data.image_size=32", f"source={source}", f"data.store={store}")  # fmt: skip
        assert status == 0, err
        assert ("2 unlabelled" in out) == (source is shards)
        stores.append(Store(store))
    assert stores[0].classes == stores[1].classes == list(WNIDS)
    for split in ("train", "val"):
        files = [
            store.manifest["sha256"][f"{split}/{name}"] for store in stores for name in ("00000.npy", "labels.npy")
        ]
        assert files[:2] == files[2:], split
    numbered = stores[0].split("unlabelled")
    for i in (1, 2):
        assert np.array_equal(numbered[i - 1], read_image(lambda i=i: jpeg(90 + i), 32)), "in the order of their names"
    assert not list(tmp_path.rglob("*.unpacked.tar")), "the unpacked copy must be removed"


def test_two_stores_unpack_the_same_source_apart(cwd: Path) -> None:
    """Two commands may prepare them at once; each removes its own copy."""
    image_folder(cwd / "source")
    with tarfile.open(cwd / "source.tgz", "w:gz") as tar:
        tar.add("source", arcname=".")
    copies = {scan(cwd / "source.tgz", None, cwd / store).temporary for store in ("one", "other")}
    assert len(copies) == 2
    assert all(copy is not None and copy.is_file() for copy in copies)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "1 of 2 shards of train are missing, such as number 1"),
        ("name", "is not named like a shard of imagenet-1k"),
        ("cut", "is damaged"),
        ("order", "not in the order of the WordNet IDs"),
        ("columns", "has no columns image and label"),
    ],
)
def test_shards_that_are_not_whole_are_refused(damage: str, message: str, tmp_path: Path) -> None:
    order = WNIDS[::-1] if damage == "order" else WNIDS
    folder = shards_of(tmp_path / "imagenet-1k", order=order)
    second = folder / "data" / "train-00001-of-00002.parquet"
    if damage == "missing":
        second.unlink()
    elif damage == "name":
        second.rename(second.with_name("part2.parquet"))
    elif damage == "cut":
        second.write_bytes(second.read_bytes()[:-100])
    elif damage == "columns":
        pq.write_table(pa.table({"text": ["a"]}), second)
    with pytest.raises(UserError, match=message):
        scanned(folder, tmp_path / "here")


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_names_that_are_not_utf8_are_read_and_printed(form: str, cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "source", train=2, val=1)
    for cls in ("cat", "dog"):
        for folder in (Path("source/train", cls), Path("source/val", cls)):
            folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))
    Path(os.fsdecode(b"source/train/cat\xff/bad\xfe.jpg")).write_bytes(b"no image")
    source = "source"
    if form == "tar":
        with tarfile.open("source.tar", "w") as tar:
            tar.add("source", arcname=".")
        source = "source.tar"
    status, out, err = run_command("prepare", "data=folder", f"source={source}", "data.image_size=32")
    assert status == 0, err
    assert r"train/cat\xff/bad\xfe.jpg" in out
    assert Store("stores/folder").classes == [r"cat\xff", r"dog\xff"]


@pytest.mark.parametrize("command", ["prepare", "features"])
def test_subfolder_that_cannot_be_read_is_named(
    command: str, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    image_folder(cwd / "source", train=2, val=1)
    line = ["prepare", "data=folder", "source=source"]
    if command == "features":
        line = [
            "features",
            f"run={request.getfixturevalue('small_alexnet')}",
            "source=source",
            "out=f.npz",
            "at_chance=true",
        ]
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    status, _, err = run_command(*line)
    assert (status, "dog: Permission denied" in err) == (2, True), err
    assert not Path("f.npz").exists()
