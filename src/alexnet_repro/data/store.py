"""A prepared data set on disk.

A store is a folder:

    manifest.json        counts, classes, image size, RGB mean and covariance, source, checksums, skipped files
    mean.npy             (size, size, 3) float32, the mean image of the training split, 0-255
    <split>/00000.npy    (n, size, size, 3) uint8, RGB; n is at most 1024, and lower where files were skipped
    <split>/00000.jpegs  instead, with encoding=jpeg: n JPEGs, one after the other
    <split>/ends.npy     (count,) int64, with encoding=jpeg: where each of them ends in its file
    <split>/labels.npy   (count,) int64
    <split>/crc32.npy    (count,) uint32, the CRC-32 of each image as stored; stores of version 0.1 have none

A store is checked when it is opened: the manifest, the sizes of all files, labels and mean. An image is compared with its
checksum when it is first read.
"""

import hashlib
import math
import os
import resource
import threading
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_repro.data import jpeg
from alexnet_repro.data.manifest import AGAIN, checked_manifest
from alexnet_repro.errors import UserError

# At the same time, per split: more than a batch has images, where a process may open more than the 256 files of a Mac.
OPEN_FILES = 192 if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1024 else 48


class Store:
    """A prepared data set. Raises UserError if the folder is not a complete store of this format."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            raise UserError(
                f"there is no store at {self.path}",
                "prepare it with: python -m alexnet_repro.prepare data=NAME source=PATH",
            )
        content = manifest.read_bytes()
        self.checksum = hashlib.sha256(content).hexdigest()
        self.manifest: dict[str, Any] = checked_manifest(content, manifest)
        sizes = self._expected_sizes()
        self._state = {name: self._stat(name) for name in [*sizes, "manifest.json"]}
        self._splits: dict[str, Split] = {}
        if self.encoding == "jpeg" and self.manifest["jpeg_decoder"] != jpeg.decoder():
            warnings.warn(
                f"{self.path} was made with {self.manifest['jpeg_decoder']}, and {jpeg.decoder()} reads it: pixels may differ by a "
                "grey level, and a resumed run from an uninterrupted one",
                stacklevel=2,
            )
        for name, size in sizes.items():
            headers = (64, 128, 192) if name.endswith(".npy") else (0,)
            if (found := self._state[name]) is None or found[0] - size not in headers:
                problem = "is missing" if found is None else f"has {found[0]} bytes, which is not its whole length"
                raise UserError(f"{self.path / name} {problem}", AGAIN)

    def _expected_sizes(self) -> dict[str, int]:
        """Return {file: its size in bytes without header} for the shards, labels and mean."""
        side = self.image_size
        sizes = {"mean.npy": 4 * side * side * 3}
        for split, facts in self.manifest["splits"].items():
            sizes[f"{split}/labels.npy"] = 8 * facts["count"]
            if f"{split}/crc32.npy" in self.manifest["sha256"]:
                sizes[f"{split}/crc32.npy"] = 4 * facts["count"]
            if self.encoding == "jpeg":
                sizes[f"{split}/ends.npy"] = 8 * facts["count"]
            for number, count in enumerate(facts["shards"]):
                size = facts["bytes"][number] if self.encoding == "jpeg" else count * side * side * 3
                sizes[f"{split}/{shard_name(number, self.encoding)}"] = size
        return sizes

    def _stat(self, name: str) -> tuple[int, int, int] | None:
        try:
            stat = (self.path / name).stat()
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def refuse_changes(self) -> None:
        """Raise UserError if a file of the store was replaced or changed since the store was opened."""
        for name, before in self._state.items():
            if (now := self._stat(name)) == before:
                continue
            expected = self.checksum if name == "manifest.json" else self.manifest["sha256"].get(name)
            if now is None or sha256(self.path / name) != expected:
                raise UserError(
                    f"the store {self.path} was changed while in use: {name} is not what it was",
                    "put the same store back, then continue with resume=true",
                )
            self._state[name] = now  # only its time changed

    @property
    def encoding(self) -> str:
        """How images are stored: "raw" or "jpeg"."""
        return self.manifest.get("encoding", "raw")

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.manifest["image_size"]

    @property
    def classes(self) -> list[str]:
        """Class names, indexed by label."""
        return self.manifest["classes"]

    @cached_property
    def mean(self) -> NDArray[np.float32]:
        """Mean image of the training split, (size, size, 3), on the 0-255 scale (Section 2)."""
        self._refuse_damage("mean.npy")
        mean = _load(self.path / "mean.npy", (self.image_size, self.image_size, 3), np.float32)
        if not ((mean >= 0) & (mean <= 255)).all():
            raise UserError(f"{self.path / 'mean.npy'} holds a value outside 0 to 255", AGAIN)
        return mean

    def _refuse_damage(self, name: str) -> None:
        """Raise UserError if a file differs from its checksum in the manifest, which may have none."""
        expected = self.manifest["sha256"].get(name)
        if expected and sha256(self.path / name) != expected:
            raise UserError(f"{self.path / name} is damaged: its checksum is wrong", AGAIN)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """RGB covariance (3, 3) over all pixels of the training split, on the 0-255 scale (Section 4.1)."""
        return np.array(self.manifest["covariance"])

    @property
    def watched_split(self) -> str:
        """Split to evaluate after every epoch: val, or test if the store has no val."""
        return "val" if self.has("val") else "test"

    @property
    def measured_split(self) -> str:
        """Split to evaluate trained networks on: test, or val if the store has no test."""
        return "test" if self.has("test") else "val"

    def has(self, split: str) -> bool:
        """Return whether the store has images in this split."""
        return bool(self.manifest["splits"].get(split, {}).get("count"))

    def split(self, name: str) -> "Split":
        """Return the images of ``train``, ``val`` or ``test``, the same object at each call.

        Raises UserError if the store has no images in this split, or if its labels are damaged.
        """
        if name in self._splits:
            return self._splits[name]
        shards = self.manifest["splits"].get(name, {}).get("shards", [])
        if not sum(shards):
            available = ", ".join(name for name, split in self.manifest["splits"].items() if split["count"])
            raise UserError(f"the store at {self.path} has no images in its split '{name}' (it has: {available})")
        for file in ("labels.npy", "crc32.npy", "ends.npy"):
            self._refuse_damage(f"{name}/{file}")
        split = Split(self.path / name, shards, self.image_size, self.encoding)
        if not ((split.labels >= 0) & (split.labels < len(self.classes))).all():
            raise UserError(f"{split.path / 'labels.npy'} holds a label outside 0 to {len(self.classes) - 1}", AGAIN)
        self._splits[name] = split
        return split

    def damaged_files(self) -> list[str]:
        """Return the files whose checksum differs from the manifest. This reads the whole store."""
        return [
            name
            for name, checksum in self.manifest["sha256"].items()
            if not (self.path / name).is_file() or sha256(self.path / name) != checksum
        ]


class Split:
    """The images of one split.

    ``len(split)`` is the number of images. ``split[i]`` is its RGB values, (size, size, 3) uint8. Raises UserError if a
    file is missing or does not have the length given in the manifest, and, when an image is first read, if it differs
    from its checksum.

    Images are read with ``pread``, not through memory maps: a map that is private to the process counts as memory in
    use, and a file that is cut while it is mapped ends the process.

    shards: number of images in each file. encoding: "raw" or "jpeg".
    """

    def __init__(self, path: Path, shards: list[int], image_size: int, encoding: str = "raw") -> None:
        self.path, self.shards, self.image_size, self.encoding = path, shards, image_size, encoding
        self._ends = list(accumulate(shards))
        self._files: dict[int, int] = {}  # {shard: descriptor}
        self._starts: dict[int, int] = {}  # {shard: position of its first image}
        self._lock = threading.Lock()  # of _files
        self.labels: NDArray[np.int64] = _load(path / "labels.npy", (len(self),), np.int64)
        self._crc32: NDArray[np.uint32] | None = None
        if (path / "crc32.npy").exists():
            self._crc32 = _load(path / "crc32.npy", (len(self),), np.uint32)
        self._bytes: NDArray[np.int64] | None = None  # position of the end of each JPEG in its file
        if encoding == "jpeg":
            self._bytes = _load(path / "ends.npy", (len(self),), np.int64)
        self._verified = torch.zeros(len(self), dtype=torch.bool)
        self._is_verified = self._verified.numpy()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        shard, first, size = self._place(index)
        with self._lock:  # threads convert a store
            data = os.pread(self._file(shard), size, self._starts[shard] + first)
        if self._crc32 is not None and not self._is_verified[index]:
            if zlib.crc32(data) != self._crc32[index]:
                raise UserError(
                    f"image {index} of {self.path} is damaged: its checksum is wrong (in {self._name(shard)})",
                    "find all damaged files with prepare verify=true; " + AGAIN,
                )
            self._is_verified[index] = True
        if len(data) < size:
            raise UserError(f"{self.path / self._name(shard)} ends early", AGAIN)
        if self.encoding == "jpeg":
            return jpeg.decode(data)
        return np.frombuffer(data, np.uint8).reshape(self.image_size, self.image_size, 3)

    def read(self, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield these images one by one, after the system was asked to load them all."""
        for index in indices:
            self.read_ahead(index)
        for index in indices:
            yield self[index]

    def read_ahead(self, index: int) -> None:
        """Ask the system to load an image before it is read, where it can."""
        if hasattr(os, "posix_fadvise"):
            shard, first, size = self._place(index)
            os.posix_fadvise(self._file(shard), self._starts[shard] + first, size, os.POSIX_FADV_WILLNEED)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Return the shard of an image, its position after the header, and its size in bytes."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        within = index - self._ends[shard] + self.shards[shard]
        if self._bytes is None:
            size = self.image_size**2 * 3
            return shard, within * size, size
        first = int(self._bytes[index - 1]) if within else 0
        return shard, first, int(self._bytes[index]) - first

    def _name(self, shard: int) -> str:
        return shard_name(shard, self.encoding)

    def _file(self, shard: int) -> int:
        """Open a file, or return its descriptor if it is open. A store of ImageNet has more than 1200 files."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.path / self._name(shard)
            try:
                if shard not in self._starts:
                    shape = (self.shards[shard], self.image_size, self.image_size, 3)
                    self._starts[shard] = _header(path, shape) if self.encoding == "raw" else 0
                self._files[shard] = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, ValueError, TypeError, EOFError, SyntaxError, TokenError):  # numpy parses it
                raise UserError(f"{path} is missing or damaged", AGAIN) from None
        return self._files[shard]

    def share(self) -> None:
        """Let the worker processes of a loader know which images any of them has verified."""
        self._verified.share_memory_()
        self._is_verified = self._verified.numpy()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        # each worker process opens the files itself
        return {**self.__dict__, "_files": {}, "_is_verified": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._lock = threading.Lock()
        self._is_verified = self._verified.numpy()


class JoinedSplits(Split):
    """The concatenation of several splits, such as train and val."""

    def __init__(self, splits: list[Split]) -> None:
        self.splits, self.image_size = splits, splits[0].image_size
        self._ends = list(accumulate(len(split) for split in splits))
        self.labels = np.concatenate([split.labels for split in splits])

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        split, within = self._within(index)
        return split[within]

    def _within(self, index: int) -> tuple[Split, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self.splits[number], index - self._ends[number] + len(self.splits[number])

    def read_ahead(self, index: int) -> None:
        """Ask the system to load an image."""
        split, within = self._within(index)
        split.read_ahead(within)

    def share(self) -> None:
        """Let the worker processes of a loader know which images any of them has verified."""
        for split in self.splits:
            split.share()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state


def _load(path: Path, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Load an .npy file. Raise UserError if it is missing or has another shape or dtype."""
    try:
        array = np.load(path)
    except (FileNotFoundError, ValueError, TypeError, EOFError, SyntaxError, TokenError):  # numpy parses the header
        array = None
    if array is None or array.shape != shape or array.dtype != dtype:
        raise UserError(f"{path} is missing or damaged", AGAIN)
    return array


def _header(path: Path, shape: tuple[int, ...]) -> int:
    """Return the length of an .npy file's header. Raise ValueError if the file does not hold uint8 of this shape."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        found, _, dtype = np.lib.format.read_array_header_1_0(file)
        length = file.tell()
    if found != shape or dtype != np.uint8 or path.stat().st_size != length + math.prod(shape):
        raise ValueError(f"{path} does not match its header")
    return length


def shard_name(number: int, encoding: str = "raw") -> str:
    """Return the file name of shard ``number`` of a split."""
    return f"{number:05d}.{'npy' if encoding == 'raw' else 'jpegs'}"


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
