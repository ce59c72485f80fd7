"""A prepared data set on disk.

A store is a folder:

    manifest.json        counts, classes, image size, RGB mean and covariance, source, checksums, skipped files
    mean.npy             (size, size, 3) float32, the mean image of the training split, 0-255
    <split>/00000.npy    (n, size, size, 3) uint8, RGB; n is at most 1024, and lower where files were skipped
    <split>/00000.jpegs  instead, with encoding=jpeg: n JPEGs, one after the other
    <split>/ends.npy     (count,) int64, with encoding=jpeg: where each of them ends in its file
    <split>/labels.npy   (count,) int64; -1 in the split unlabelled, which holds test images whose labels are not public
    <split>/crc32.npy    (count,) uint32, the CRC-32 of each image as stored; stores of version 0.1 have none

A store is checked when it is opened: the manifest, the sizes of all files, labels and mean. An image is compared with its
checksum when it is first read.
"""

import hashlib
import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_repro.data import jpeg
from alexnet_repro.data.manifest import AGAIN, checked_manifest
from alexnet_repro.data.split import Split, load_array, shard_name
from alexnet_repro.errors import UserError


class Store:
    """A prepared data set. Raises UserError if the folder is not a complete store of this format."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            raise UserError(
                f"there is no store at {self.path}",
                "prepare it with: python -m alexnet_repro.prepare data=NAME source=PATH; if it lies elsewhere, name it: data.store=PATH "
                "to train, store=PATH to evaluate",
            )
        content = manifest.read_bytes()
        self.manifest: dict[str, Any] = checked_manifest(content, manifest)
        self.manifest_sha256 = hashlib.sha256(content).hexdigest()
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
        if unknown := next((name for name in sizes if name not in self.manifest["sha256"]), None):
            raise UserError(f"{manifest} is damaged: it has no checksum of {unknown}", AGAIN)

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
            expected = self.manifest_sha256 if name == "manifest.json" else self.manifest["sha256"].get(name)
            if now is None or sha256(self.path / name) != expected:
                raise UserError(
                    f"the store {self.path} was changed while in use: {name} is not what it was",
                    "put the same store back, then continue with resume=true",
                )
            self._state[name] = now  # only its time changed

    @cached_property
    def images_sha256(self) -> str:
        """SHA-256 of all that training and measuring read: classes, images, labels, their order, and the mean image.

        Stores of the same images have the same, whoever prepared them, from whichever files and with whichever decoder.
        """
        known = self.manifest["sha256"]
        files = {name: known[name] for name in self._expected_sizes() if not name.endswith("crc32.npy")}
        return hashlib.sha256(json.dumps([self.classes, files], sort_keys=True).encode()).hexdigest()

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
        mean = load_array(self.path / "mean.npy", (self.image_size, self.image_size, 3), np.float32)
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
        """Return the images of ``train``, ``val``, ``test`` or ``unlabelled``, the same object at each call.

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
        least, most = (-1, -1) if name == "unlabelled" else (0, len(self.classes) - 1)
        if not ((split.labels >= least) & (split.labels <= most)).all():
            raise UserError(f"{split.path / 'labels.npy'} holds a label outside {least} to {most}", AGAIN)
        self._splits[name] = split
        return split

    def damaged_files(self) -> list[str]:
        """Return the files whose checksum differs from the manifest. This reads the whole store."""
        return [
            name
            for name, checksum in self.manifest["sha256"].items()
            if not (self.path / name).is_file() or sha256(self.path / name) != checksum
        ]


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
