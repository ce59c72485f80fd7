"""Images in Parquet shards, the form in which Hugging Face distributes imagenet-1k."""

import io
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from alexnet_repro.data import devkit
from alexnet_repro.data.tars import refuse_foreign
from alexnet_repro.errors import UserError, needed
from alexnet_repro.files import parse_json, written_whole

SHARD = re.compile(r"(train|validation|val|test)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet")
WNID = re.compile(r"n\d{8}")
ROWS = 64  # that are held in memory
LEFT_OUT = "left_out.json"  # member of the tar: {reason: (number of rows, the first name)}


def as_tar(shards: list[Path], copy: Path) -> Path:
    """Write the images of all shards to one tar, ``copy``, unless it exists, and return its path.

    Parquet has no fast access to a single image, and a store's images are in another order. Members are named
    split/class/file; the class is the WordNet ID in the name of the image, if it has one, otherwise the name of its label.
    Rows may have any names: of those with the same name, the later ones get the number of their row.
    Of the rows without a label, ImageNet's test images become members test/file. Others are left out; the last member,
    LEFT_OUT, holds their number.

    Raises UserError if a shard is missing or damaged, if a name and a label contradict each other, if the labels are not
    in the order of the WordNet IDs, as in the development kit, or if the disk is too small.
    """
    needed("pyarrow", "reading Parquet shards")
    _refuse_gaps(shards)
    refuse_foreign(copy)
    sizes = sum(shard.stat().st_size for shard in shards)
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(copy.parent).free
    if free < 1.05 * sizes:
        raise UserError(
            f"the images of {len(shards)} Parquet shards take {sizes / 1e9:.1f} GB in {copy.parent}, for the time of the preparation, "
            f"and {free / 1e9:.1f} GB are free",
            "free some space, or choose another disk with data.store=PATH",
        )
    with written_whole(copy) as file, tarfile.open(fileobj=file, mode="w:") as tar:
        _write_members(shards, tar)
    return copy


def number_of_rows(shards: list[Path]) -> int:
    """Return the number of rows that the shards say they have."""
    import pyarrow.parquet as pq

    return sum(pq.ParquetFile(shard).metadata.num_rows for shard in shards)


def _write_members(shards: list[Path], tar: tarfile.TarFile) -> None:
    unlabelled: list[str] = []
    label_of: dict[str, int] = {}
    class_of: dict[int, str] = {}
    taken: set[str] = set()
    for shard in tqdm(shards, "unpacking", unit=" shards", delay=2, leave=False):
        split = {"validation": "val"}.get(word := SHARD.fullmatch(shard.name)[1], word)  # type: ignore[index]
        for number, (path, data, label, label_name) in enumerate(_rows(shard)):
            name = "/".join(part for part in PurePosixPath(path).parts if part not in ("/", "..")) or f"{number}.JPEG"
            if label >= 0:
                found = WNID.findall(PurePosixPath(name).stem)
                known = found[-1] if found else label_name
                if label_of.setdefault(known, label) != label or class_of.setdefault(label, known) != known:
                    raise UserError(
                        f"{shard}: row {number}, {path}: label {label} stands for {class_of.get(label, known)}, and "
                        f"{known} for label {label_of[known]}",
                        "download it again, or unpack the images into class folders",
                    )
                if found:  # as ImageNet's own archives name it: n01440764_10026.JPEG
                    stem = PurePosixPath(name).stem.removesuffix(f"_{known}")
                    name = PurePosixPath(name).with_name((stem or known) + PurePosixPath(name).suffix).as_posix()
                member = f"{split}/{known}/{name}"
            elif split == "test" and devkit.NUMBERED.fullmatch(PurePosixPath(name).name):
                member = f"test/{PurePosixPath(name).name}"
            else:
                unlabelled.append(path)
                continue
            while member in taken:
                member = f"{member.rpartition('.')[0]}.{shard.stem}.{number}.{member.rpartition('.')[2]}"
            taken.add(member)
            _add(tar, member, data)
    in_order = sorted(label_of, key=lambda known: label_of[known])
    if all(WNID.fullmatch(known) for known in in_order) and in_order != sorted(in_order):
        raise UserError(
            f"the labels of {shards[0].parent} are not in the order of the WordNet IDs, as those of ImageNet are",
            "download the shards again",
        )
    left_out = {"images without a label": (len(unlabelled), unlabelled[0])} if unlabelled else {}
    _add(tar, LEFT_OUT, json.dumps(left_out).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _refuse_gaps(shards: list[Path]) -> None:
    """Raise UserError if the number of a shard is missing, or if a name is not that of a shard."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for shard in shards:
        match = SHARD.fullmatch(shard.name)
        if not match:
            raise UserError(
                f"{shard} is not named like a shard of imagenet-1k", "for example train-00000-of-00294.parquet"
            )
        found = numbers.setdefault((match[1], int(match[3])), set())
        if int(match[2]) in found:
            raise UserError(
                f"{shard}: there is another shard of {match[1]} with this number", "keep those of one revision"
            )
        found.add(int(match[2]))
    for (split, count), found in numbers.items():
        if missing := sorted(set(range(count)) - found):
            raise UserError(
                f"{len(missing)} of {count} shards of {split} are missing, such as number {missing[0]}", "download them"
            )


def _rows(shard: Path) -> Any:
    """Yield (name of the image, encoded image, label, name of the label)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(shard)
        if not {"image", "label"} <= set(file.schema_arrow.names):
            raise UserError(f"{shard} has no columns image and label", f"it has {', '.join(file.schema_arrow.names)}")
        about = parse_json((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        names = _class_names(about.get("info", {}).get("features", {}).get("label", {}).get("names", []))
        for batch in file.iter_batches(ROWS, columns=["image", "label"]):
            for image, label in zip(batch["image"].to_pylist(), batch["label"].to_pylist(), strict=True):
                if not image["bytes"]:
                    raise ValueError(f"an image has no bytes ({image['path']})")
                label = -1 if label is None else label
                yield (
                    image["path"] or "",
                    image["bytes"],
                    label,
                    names[label] if 0 <= label < len(names) else str(label),
                )
    except (pa.lib.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{shard} is damaged: {' '.join(str(error).split())[:120]}", "download it again") from None


def _class_names(names: list[str]) -> list[str]:
    """Return the names of the labels, as names of folders: those that several labels have get the number of the label."""
    plain = [name.replace("/", " ").strip() for name in names]
    count = Counter(plain)
    return [name if count[name] == 1 and name.strip(".") else f"{name} ({label})" for label, name in enumerate(plain)]
