"""A user's own images: a folder of class folders, a tar of one, or ImageNet's tar of tars, without unpacking any of them."""

import gzip
import hashlib
import os
import pickle
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10

from alexnet_repro import devkit
from alexnet_repro.cli import UserError

# train, val, test, and the names of ImageNet's own archives and of other data sets' folders
SPLIT_NAME = re.compile(r"(?:ILSVRC\d{4}_(?:img|images)_)?(train|val|test)(?:ing|idation)?", re.IGNORECASE)
UNPACKED = ".unpacked.tar"
WNID = re.compile(r"n\d{8}(?=_)")


@dataclass(frozen=True)
class File:
    """Bytes ``offset`` to ``offset + size`` of the file ``path``: an image, once a label is known."""

    name: str
    path: Path
    offset: int
    size: int
    split: str = ""
    label: int = -1

    def read_bytes(self) -> bytes:
        """The encoded image. Raises OSError if it can't be read whole."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends after {len(data)} of {self.size} bytes")
        return data


def cifar10_batches(
    folder: Path, download: bool = False
) -> tuple[list[tuple[str, int, str, NDArray[np.uint8]]], list[str]]:
    """CIFAR-10's official batches: (split, label, name, (32, 32, 3) image) of each image in their order, and the class names.

    The last of the training batches, data_batch_5, is the val split: the authors chose on it.

    folder holds, or with ``download`` will hold, cifar-10-batches-py. Raises UserError if it can't be had or is damaged.
    """
    examples = []
    for split in ("train", "test"):
        try:
            batches = CIFAR10(str(folder), train=split == "train", download=download)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"CIFAR-10 {'could not be downloaded' if download else 'is damaged'}: {str(error).splitlines()[0]}",
                "give your copy with source=PATH: the folder that holds cifar-10-batches-py, or train/ and test/ of class folders",
            ) from None
        first_of_val = len(batches.data) - len(batches.data) // len(CIFAR10.train_list) if split == "train" else None
        for i, (image, label) in enumerate(zip(batches.data, batches.targets, strict=True)):
            part = "val" if first_of_val is not None and i >= first_of_val else split
            examples.append((part, label, f"{part}/{i:05d}", image))
    return examples, batches.classes


@dataclass
class Found:
    """Files with split and label, class names, and in words what was held out and which files are in no split."""

    files: list[File]
    classes: list[str]
    held_out: str = ""
    temporary: Path | None = None  # a copy that was unpacked, to be removed when the images are read
    ignored: list[str] = field(default_factory=list)


def scan(path: Path, hold_out_every: int | None, unpack_into: Path) -> Found:
    """Find the images of ``path`` and what class and split each belongs to.

    The class is the name of the folder (or of the tar inside the tar); without one, the WordNet number that the file's name
    begins with; for ILSVRC's flat validation and test images, what the development kit beside them says (that of 2010 needs
    ILSVRC2010_test_ground_truth.txt, too; test images without labels are ignored). Splits are folders or tars named train,
    val, test above the class folders; where there is no val, every ``hold_out_every``-th image of each class becomes it
    (None: none does). A compressed tar is unpacked once, as one file, into ``unpack_into``.

    Raises UserError for a missing path, no images, a class folder without images, or classes that only val has.
    """
    if not path.exists():
        raise UserError(f"there is nothing at source={path}")
    files, folders = [], set()
    for entry in _entries(path, unpack_into):
        if isinstance(entry, str):
            folders.add(entry)
        else:
            files.append(entry)
    if not files:
        raise UserError(f"there are no files in {path}")
    files, folders = _below_common_root(files, folders)
    _refuse_empty_classes(path, folders, files)
    found = _into_splits(files)
    found.temporary = files[0].path if files[0].path.name.endswith(UNPACKED) else None
    numbered = {file for file in found.files if (match := devkit.NUMBERED.fullmatch(file.name)) and match[2] == "test"}
    if numbered and devkit.truth(path, "test") is None:
        found.ignored.append(f"{len(numbered)} test images (there is no {devkit.TRUTH['test']})")
        found.files = [file for file in found.files if file not in numbered]

    labelled = [_class_of(file, path) for file in found.files]
    found.classes = sorted({name for file, name in labelled if file.split == "train"})
    if len(found.classes) < 2:
        raise UserError(
            f"{path} has only one class: {found.classes[0]}", "give the folder that holds the class folders"
        )
    if strangers := sorted({name for _, name in labelled} - set(found.classes)):
        raise UserError(f"{len(strangers)} classes of {path} have no training images: {', '.join(strangers[:3])}")
    index = {name: i for i, name in enumerate(found.classes)}
    found.files = [replace(file, label=index[name]) for file, name in labelled]
    if hold_out_every and not any(file.split == "val" for file in found.files):
        _hold_out(found, hold_out_every)
    return found


def _entries(path: Path, unpack_into: Path) -> Iterator[File | str]:
    """Every file below ``path``, with tars opened; and, as a string ending in /, every folder."""
    if path.is_file():
        try:
            is_tar = tarfile.is_tarfile(path)
        except (EOFError, zlib.error):
            is_tar = True  # a compressed one that is damaged: said below
        if not is_tar:
            raise UserError(f"source={path} is neither a folder nor a tar")
        yield from _members(_uncompressed(path, unpack_into), 0, "")
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and "devkit" not in name)
        here = Path(folder).relative_to(path)
        yield from (f"{(here / name).as_posix()}/" for name in subfolders)
        for name in sorted(names):
            file = Path(folder) / name
            if name.startswith(".") or "devkit" in name:
                continue
            if name.endswith(".tar"):
                prefix = f"{(here / name[:-4]).as_posix()}/"
                yield prefix
                yield from _members(file, 0, prefix)
            else:
                yield File((here / name).as_posix(), file, 0, file.stat().st_size)


def _members(path: Path, offset: int, prefix: str) -> Iterator[File | str]:
    """The members of the tar that begins at ``offset`` of ``path``, and those of tars inside of it."""
    with path.open("rb") as raw:
        raw.seek(offset)
        try:
            # ignore_zeros is off: a tar inside a tar ends with its own end mark
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    name = prefix + PurePosixPath(member.name).as_posix().removeprefix("./")
                    if PurePosixPath(name).name.startswith("."):
                        continue
                    if member.isdir():
                        yield name.rstrip("/") + "/"
                    elif member.isfile() and name.endswith(".tar"):
                        yield name[:-4] + "/"
                        yield from _members(path, member.offset_data, name[:-4] + "/")
                    elif member.isfile():
                        yield File(name, path, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"the tar {prefix.rstrip('/') or path} in {path} is damaged: {error}") from None


def _uncompressed(path: Path, unpack_into: Path) -> Path:
    """The tar itself, or, of a gzip-compressed one, a copy whose members can be read in any order."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    identity = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    copy = unpack_into / f"{path.name}.{hashlib.sha256(identity.encode()).hexdigest()[:8]}{UNPACKED}"
    if not copy.exists():
        unpack_into.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_suffix(".tmp")
        try:
            with gzip.open(path) as packed, unfinished.open("wb") as out:
                shutil.copyfileobj(packed, out, 2**20)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            unfinished.unlink()
            raise UserError(f"source={path} is damaged: {error}") from None
        unfinished.rename(copy)
    return copy


def _below_common_root(files: list[File], folders: set[str]) -> tuple[list[File], set[str]]:
    """Take off a folder that holds everything, such as imagenette2/, but not the folder of a single class."""
    while True:
        roots = {file.name.split("/", 1)[0] for file in files if "/" in file.name}
        root = roots.pop() if len(roots) == 1 else ""
        if not root or SPLIT_NAME.fullmatch(root) or all(file.name.count("/") < 2 for file in files):
            return files, folders
        files = [replace(file, name=file.name.removeprefix(root + "/")) for file in files]
        folders = {name.removeprefix(root + "/") for name in folders} - {""}


def _into_splits(files: list[File]) -> Found:
    """Read the split off the first folder, if there are train/ and val/ or test/; otherwise all is train.

    What lies beside those folders is ignored, and named: ImageNet's test archive, bounding boxes, lists.
    """
    tops = Counter(file.name.split("/", 1)[0] for file in files if "/" in file.name)
    split_of = {top: match[1].lower() for top in tops if (match := SPLIT_NAME.fullmatch(top))}
    if split_of and "train" not in split_of.values():
        raise UserError(f"there is no folder train/ beside {', '.join(sorted(split_of))}/")
    if len(set(split_of.values())) < 2 and set(split_of) != set(tops):
        split_of = {}  # a class may be called train
    twice = {  # ILSVRC2010_images_val.tar holds a folder val
        top: f"{top}/{split}/"
        for top, split in split_of.items()
        if all(file.name.startswith(f"{top}/{split}/") for file in files if file.name.startswith(f"{top}/"))
    }
    found = Found([], [])
    for file in files:
        top = file.name.split("/", 1)[0]
        if "/" not in file.name and tops:
            found.ignored.append(file.name)
        elif not split_of:
            found.files.append(replace(file, split="train"))
        elif top in split_of:
            found.files.append(
                replace(file, split=split_of[top], name=file.name.removeprefix(twice.get(top, f"{top}/")))
            )
    if split_of:
        found.ignored += [f"{top}/ ({count} files)" for top, count in tops.items() if top not in split_of]
    return found


def _refuse_empty_classes(path: Path, folders: set[str], files: list[File]) -> None:
    filled = {parent.as_posix() for file in files for parent in PurePosixPath(file.name).parents}
    if empty := sorted(folder for folder in (name.rstrip("/") for name in folders) if folder not in filled):
        raise UserError(
            f"{len(empty)} class folders of {path} hold no images: {', '.join(empty[:3])}",
            "fill them, or remove them so that they don't become classes",
        )


def _class_of(file: File, source: Path) -> tuple[File, str]:
    folder, _, name = file.name.partition("/")
    if name:
        return file, folder
    name = file.name
    if match := WNID.match(name):
        return file, match[0]
    if devkit.NUMBERED.fullmatch(name):
        return file, devkit.class_of(name, source)
    raise UserError(
        f"{file.name} of {source} is in no class folder",
        "put each class's images into a folder named after the class (train/CLASS/..., val/CLASS/...)",
    )


def _hold_out(found: Found, every: int) -> None:
    seen: Counter[int] = Counter()
    files = []
    for file in found.files:
        seen[file.label] += 1
        files.append(replace(file, split="val") if seen[file.label] % every == 0 else file)
    found.files = files
    held = sum(file.split == "val" for file in files)
    found.held_out = f"the source has no val split: every {every}th image of each class became it ({held} images)"
