"""A prepared data set on disk, read through memory maps.

A store is a folder:

    manifest.json        counts, classes, image size, RGB mean and covariance, source, checksums, skipped files
    mean.npy             (size, size, 3) float32, the mean image of the training split, 0-255
    <split>/00000.npy    (n, size, size, 3) uint8, RGB; n is at most 1024, and lower where files were skipped
    <split>/labels.npy   (count,) int64
"""

import hashlib
import json
import math
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_repro.errors import UserError

FORMAT = 1
SHARD = 1024  # images per file, as in the data batches of the 2012 code


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
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        except ValueError:
            raise UserError(f"{manifest} is damaged", "prepare the store again with overwrite=true") from None
        if self.manifest.get("format") != FORMAT:
            raise UserError(
                f"the store at {self.path} has format {self.manifest.get('format')}, this program reads {FORMAT}",
                "prepare the store again with overwrite=true",
            )

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
        return _load(self.path / "mean.npy", (self.image_size, self.image_size, 3), np.float32)

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

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest.

        It identifies the content of the store, since the manifest holds the checksums of all other files.
        """
        return sha256(self.path / "manifest.json")

    def split(self, name: str) -> "Split":
        """Return the images of ``train``, ``val`` or ``test``.

        Raises UserError if the store has no images in this split.
        """
        shards = self.manifest["splits"].get(name, {}).get("shards", [])
        if not sum(shards):
            available = ", ".join(name for name, split in self.manifest["splits"].items() if split["count"])
            raise UserError(f"the store at {self.path} has no images in its split '{name}' (it has: {available})")
        return Split(self.path / name, shards, self.image_size)

    def damaged_files(self) -> list[str]:
        """Return the files whose checksum differs from the manifest. This reads the whole store."""
        return [
            name
            for name, checksum in self.manifest["sha256"].items()
            if not (self.path / name).is_file() or sha256(self.path / name) != checksum
        ]


class Split:
    """The images of one split, read through memory maps.

    ``len(split)`` is the number of images. ``split[i]`` is a (size, size, 3) uint8 view of a memory map. Raises
    UserError if a file is missing or does not have the shape given in the manifest.
    """

    def __init__(self, path: Path, shards: list[int], image_size: int) -> None:
        self.path, self.shards, self.image_size = path, shards, image_size
        self._ends = list(accumulate(shards))
        self._maps: dict[int, NDArray[np.uint8]] = {}
        self.labels: NDArray[np.int64] = _load(path / "labels.npy", (len(self),), np.int64)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        if shard not in self._maps:
            shape = (self.shards[shard], self.image_size, self.image_size, 3)
            self._maps[shard] = _load(self.path / shard_name(shard), shape, np.uint8, as_map=True)
        return self._maps[shard][index - self._ends[shard]]  # negative index: counted from the end of the shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each worker process opens its own memory maps


class JoinedSplits(Split):
    """The concatenation of several splits, such as train and val."""

    def __init__(self, splits: list[Split]) -> None:
        self.splits, self.image_size = splits, splits[0].image_size
        self._ends = list(accumulate(len(split) for split in splits))
        self.labels = np.concatenate([split.labels for split in splits])

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self.splits[number][index - self._ends[number] + len(self.splits[number])]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


def _load(path: Path, shape: tuple[int, ...], dtype: type, as_map: bool = False) -> NDArray[Any]:
    """Load an .npy file. Raise UserError if it is missing or has another shape or dtype."""
    try:
        array = _memory_map(path) if as_map else np.load(path)
    except (FileNotFoundError, ValueError, EOFError):
        array = None
    if array is None or array.shape != shape or array.dtype != dtype:
        raise UserError(f"{path} is missing or damaged", "prepare the store again with overwrite=true")
    return array


def _memory_map(path: Path) -> NDArray[np.uint8]:
    """Map the data of an .npy file into memory without keeping the file open.

    A store of ImageNet has more than 1200 files. Raises ValueError if the file does not match its header.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        first, count = file.tell(), math.prod(shape)
    if dtype != np.uint8 or path.stat().st_size != first + count:
        raise ValueError(f"{path} does not match its header")
    return (
        torch.from_file(str(path), shared=False, size=first + count, dtype=torch.uint8).numpy()[first:].reshape(shape)
    )


def shard_name(number: int) -> str:
    """Return the file name of shard ``number`` of a split."""
    return f"{number:05d}.npy"


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
