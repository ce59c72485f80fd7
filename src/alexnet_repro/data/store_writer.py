"""Write the files of a store and compute the mean image and RGB covariance in the same pass."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from alexnet_repro.data.manifest import FORMAT, SHARD, manifest_checksum
from alexnet_repro.data.store import Store, sha256, shard_name
from alexnet_repro.errors import Interrupted, UserError
from alexnet_repro.provenance import written_whole

RGB = NDArray[np.uint8]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """One image to write.

    ``read()`` returns its RGB values, (size, size, 3). It raises OSError or ValueError if the image cannot be read.
    """

    split: str
    label: int
    name: str
    read: Callable[[], RGB]


def write_store(
    examples: Sequence[Example],
    classes: Sequence[str],
    store: Path,
    *,
    image_size: int = 256,
    provenance: dict[str, Any] | None = None,
    max_bad: int = 10,
    overwrite: bool = False,
    workers: int | None = None,
    alone: bool = False,
) -> Store:
    """Read all examples with ``workers`` threads (default: one per core) and write them as a store.

    Files of 1024 images are written to ``<store>.partial``, which is renamed to ``<store>`` at the end. A call after an
    interruption resumes from the files in this folder.

    alone: give each process its own partial folder, for small stores that several processes may prepare concurrently.
        The first finished store is kept.

    Raises UserError if the store exists (unless ``overwrite``), if the partial folder was created from other files, or
    if more than ``max_bad`` images cannot be read. Raises Interrupted on Ctrl-C.
    """
    refuse_taken(store, overwrite)
    partial_store = store.with_name(store.name + (f".{os.getpid()}" if alone else "") + ".partial")
    _start_or_resume(partial_store, examples, image_size)

    splits: dict[str, dict[str, Any]] = {}
    mean_sum, outer_sum, train_count = np.zeros((image_size, image_size, 3), np.uint64), np.zeros((3, 3)), 0
    bad: list[str] = []
    checksums: dict[str, str] = {}
    with (
        _quiet_decoders() as screen,
        ThreadPoolExecutor(workers or os.cpu_count()) as threads,
        tqdm(total=len(examples), unit=" images", desc=f"preparing {store}", file=screen) as bar,
    ):
        try:
            for split in SPLITS:
                members = [example for example in examples if example.split == split]
                if not members:
                    continue
                labels, crc32s, shards = [], [], []
                path = partial_store / split
                for number, start in enumerate(range(0, len(members), SHARD)):
                    shard = members[start : start + SHARD]
                    statistics = _write_shard(shard, path / shard_name(number), image_size, threads, bar)
                    checksums[f"{split}/{shard_name(number)}"] = str(statistics["sha256"])
                    labels.append(statistics["labels"])
                    crc32s.append(statistics["crc32"])
                    shards.append(len(statistics["labels"]))
                    bad += statistics["bad"].tolist()
                    if len(bad) > max_bad:
                        raise UserError(
                            f"{len(bad)} files can't be read as images: {', '.join(bad[:3])}, ...",
                            f"remove them, or raise the limit with max_bad={2 * len(bad)}; finished files are kept",
                        )
                    if split == "train":
                        mean_sum += statistics["sum"]
                        outer_sum += statistics["outer"]
                        train_count += len(statistics["labels"])
                for name, columns in (("labels", labels), ("crc32", crc32s)):
                    with written_whole(path / f"{name}.npy") as file:
                        np.save(file, np.concatenate(columns))
                    checksums[f"{split}/{name}.npy"] = sha256(path / f"{name}.npy")
                splits[split] = {"count": sum(shards), "shards": shards}
        except OSError:
            if alone:
                shutil.rmtree(partial_store)
            raise
        except KeyboardInterrupt:
            threads.shutdown(cancel_futures=True)
            if alone:
                shutil.rmtree(partial_store)
                raise
            raise Interrupted(
                f"{bar.n} of {len(examples)} images are done; the same command continues from there"
            ) from None
    if not train_count:
        raise UserError("no training image could be read", f"first unreadable files: {', '.join(bad[:3])}")

    mean = mean_sum / train_count
    with written_whole(partial_store / "mean.npy") as file:
        np.save(file, mean.astype(np.float32))
    mean_rgb = mean.mean((0, 1))
    covariance = outer_sum / (train_count * image_size**2) - np.outer(mean_rgb, mean_rgb)
    checksums["mean.npy"] = sha256(partial_store / "mean.npy")
    manifest = {
        "format": FORMAT,
        **(provenance or {}),
        "image_size": image_size,
        "classes": list(classes),
        "splits": splits,
        "mean_rgb": mean_rgb.tolist(),
        "covariance": covariance.tolist(),
        "bad": bad,
        "decoder": f"Pillow {PIL.__version__}",
        "sha256": checksums,
    }
    manifest["checksum"] = manifest_checksum(manifest)
    with written_whole(partial_store / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())
    for temporary in [*partial_store.glob("*/*.npz"), partial_store / "examples.sha256"]:
        temporary.unlink()
    if alone and store.exists() and not overwrite:  # another process finished first
        shutil.rmtree(partial_store)
        return Store(store)
    if store.exists():
        shutil.rmtree(store)
    partial_store.rename(store)
    if bad:
        print(f"left out {len(bad)} files that can't be read as images: {', '.join(bad)}")
    return Store(store)


@contextmanager
def _quiet_decoders() -> Iterator[IO[str]]:
    """Send what C libraries write to standard error to nowhere; yield a file that still reaches the screen."""
    try:
        on_screen = sys.stderr.fileno() == 2
    except (OSError, ValueError):
        on_screen = False
    if not on_screen:  # a notebook, where C libraries don't write into its output
        yield sys.stderr
        return
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with os.fdopen(os.dup(saved), "w") as screen:
            yield screen
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def refuse_taken(store: Path, overwrite: bool) -> None:
    """Raise UserError if ``store`` exists, unless it is a store and ``overwrite`` is true."""
    if (store / "manifest.json").is_file():
        if not overwrite:
            raise UserError(
                f"{store} already exists",
                "to replace it, add overwrite=true; to keep it, choose another data.store=PATH",
            )
    elif store.exists():
        raise UserError(f"{store} exists but isn't a store", "choose another data.store=PATH")


def _start_or_resume(folder: Path, examples: Sequence[Example], image_size: int) -> None:
    """Create the partial folder, or check that the existing folder was created from the same examples.

    Raises UserError if it was created from other examples.
    """
    listing = hashlib.sha256(str(image_size).encode())
    for example in examples:
        listing.update(f"{example.split}\0{example.label}\0{example.name}\n".encode())
    listing_file = folder / "examples.sha256"
    if listing_file.exists() and listing_file.read_text() != listing.hexdigest():
        raise UserError(
            f"{folder} holds an unfinished store made from other files", "delete this folder to start again"
        )
    for split in {example.split for example in examples}:
        (folder / split).mkdir(parents=True, exist_ok=True)
    listing_file.write_text(listing.hexdigest())


def _write_shard(
    shard: Sequence[Example], path: Path, size: int, threads: ThreadPoolExecutor, bar: "tqdm[Any]"
) -> dict[str, NDArray[Any]]:
    """Write one shard of images and its statistics, or load the statistics of an existing shard."""
    statistics_path = path.with_suffix(".npz")
    if statistics_path.exists() and path.exists():
        with np.load(statistics_path) as found:
            statistics = dict(found)
        if "crc32" in statistics:  # otherwise version 0.1 wrote it
            bar.update(len(shard))
            return statistics

    def read(example: Example) -> tuple[RGB, NDArray[np.float64], int] | str:
        try:
            image = example.read()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE):
                raise  # not about this image
            # without addresses, which differ between two preparations
            return f"{example.name} ({re.sub(' at 0x[0-9a-f]+', '', str(error))})"
        pixels = image.reshape(-1, 3).astype(np.float64)
        # sums of integers below 2^53 are exact in float64, in any order
        return image, pixels.T @ pixels, zlib.crc32(image.tobytes())

    images, outer = np.empty((len(shard), size, size, 3), np.uint8), np.zeros((3, 3))
    labels: list[int] = []
    crc32: list[int] = []
    bad: list[str] = []
    for example, result in zip(shard, threads.map(read, shard), strict=True):
        if isinstance(result, str):
            bad.append(result)
        else:
            images[len(labels)] = result[0]
            outer += result[1]
            crc32.append(result[2])
            labels.append(example.label)
        bar.update()
    images = images[: len(labels)]
    statistics = {
        "labels": np.array(labels, np.int64),
        "crc32": np.array(crc32, np.uint32),
        "bad": np.array(bad, str),
        "sum": images.sum(0, dtype=np.uint64),
        "outer": outer,
    }
    with written_whole(path) as file:
        np.save(file, images)
    statistics["sha256"] = np.array(sha256(path))
    with written_whole(statistics_path) as file:
        np.savez(file, **statistics)
    return statistics
