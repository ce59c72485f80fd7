"""The images of one split of a store, read from its files. See store.py for the files."""

import math
import os
import resource
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_repro.data import jpeg
from alexnet_repro.data.manifest import AGAIN
from alexnet_repro.data.sampler import PART, stream
from alexnet_repro.errors import UserError

# At the same time, per split: more than a batch has images, where a process may open more than the 256 files of a Mac.
OPEN_FILES = 192 if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1024 else 48


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
        self.labels: NDArray[np.int64] = load_array(path / "labels.npy", (len(self),), np.int64)
        self._crc32: NDArray[np.uint32] | None = None
        if (path / "crc32.npy").exists():
            self._crc32 = load_array(path / "crc32.npy", (len(self),), np.uint32)
        self._bytes: NDArray[np.int64] | None = None  # position of the end of each JPEG in its file
        if encoding == "jpeg":
            self._bytes = load_array(path / "ends.npy", (len(self),), np.int64)
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


class PartOfSplit(Split):
    """The images of a split at the given indices, in ascending order."""

    def __init__(self, split: Split, indices: NDArray[np.int64]) -> None:
        self.split, self.indices, self.image_size = split, np.sort(indices), split.image_size
        self._ends = [len(indices)]
        self.labels = split.labels[self.indices]

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.split[int(self.indices[index])]

    def read_ahead(self, index: int) -> None:
        """Ask the system to load an image."""
        self.split.read_ahead(int(self.indices[index]))

    def share(self) -> None:
        """Let the worker processes of a loader know which images any of them has verified."""
        self.split.share()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state


def part_of(split: Split, per_class: int, seed: int) -> Split:
    """Return at most ``per_class`` images of each class, drawn with ``seed``."""
    order = stream(seed, 0, PART).permutation(len(split))
    chosen = [order[split.labels[order] == label][:per_class] for label in np.unique(split.labels)]
    return PartOfSplit(split, np.concatenate(chosen))


def load_array(path: Path, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
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
