"""Write the files of a store and compute the mean image and RGB covariance in the same pass."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from alexnet_repro.data import jpeg
from alexnet_repro.data.manifest import FORMATS, manifest_checksum
from alexnet_repro.data.shard_writer import Example, write_shards
from alexnet_repro.data.split import shard_name
from alexnet_repro.data.store import Store, sha256
from alexnet_repro.errors import Interrupted, UserError
from alexnet_repro.provenance import written_whole

SPLITS = ("train", "val", "test", "unlabelled")
JPEG_SHARE = 0.135  # of the bytes of RGB values, as measured on Imagenette


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
    encoding: str = "raw",
    alone: bool = False,
) -> Store:
    """Read all examples with ``workers`` threads (default: one per core) and write them as a store.

    Files of 1024 images are written to ``<store>.partial``, which is renamed to ``<store>`` at the end. A call after an
    interruption resumes from the files in this folder.

    encoding: "raw" or "jpeg", which takes a seventh of the space and is slower to read.
    alone: give each process its own partial folder, for small stores that several processes may prepare concurrently.
        The first finished store is kept.

    Raises UserError if the store exists (unless ``overwrite``), if the partial folder was created from other files, or
    if more than ``max_bad`` images cannot be read. Raises Interrupted on Ctrl-C.
    """
    refuse_taken(store, overwrite)
    partial_store = store.with_name(store.name + (f".{os.getpid()}" if alone else "") + ".partial")
    refuse_full_disk(partial_store, len(examples), image_size, encoding, alone)
    _start_or_resume(partial_store, examples, image_size, encoding)

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
                names = ["labels", "crc32", *(["ends"] if encoding == "jpeg" else [])]
                columns: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
                path = partial_store / split
                for number, statistics in enumerate(write_shards(members, path, image_size, encoding, threads, bar)):
                    checksums[f"{split}/{shard_name(number, encoding)}"] = str(statistics["sha256"])
                    for name, values in columns.items():
                        values.append(statistics[name])
                    bad += statistics["bad"].tolist()
                    if len(bad) > max_bad:
                        raise UserError(
                            f"{len(bad)} files can't be read as images: {', '.join(bad[:3])}, ...",
                            f"repair them, or leave them out with max_bad={2 * len(bad)}; either continues from here",
                        )
                    if split == "train":
                        mean_sum += statistics["sum"]
                        outer_sum += statistics["outer"]
                        train_count += len(statistics["labels"])
                for name, values in columns.items():
                    with written_whole(path / f"{name}.npy") as file:
                        np.save(file, np.concatenate(values))
                    checksums[f"{split}/{name}.npy"] = sha256(path / f"{name}.npy")
                shards = [len(values) for values in columns["labels"]]
                splits[split] = {"count": sum(shards), "shards": shards}
                if encoding == "jpeg":
                    splits[split]["bytes"] = [int(ends[-1]) if len(ends) else 0 for ends in columns["ends"]]
        except (OSError, UserError):
            threads.shutdown(cancel_futures=True)
            if alone:
                shutil.rmtree(partial_store)
            raise
        except KeyboardInterrupt:
            threads.shutdown(cancel_futures=True)
            if alone:
                shutil.rmtree(partial_store)
                raise
            raise Interrupted(
                f"{bar.n} of {len(examples)} images were read; the same command continues after the last whole file"
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
        "format": FORMATS[encoding],
        **(provenance or {}),
        "image_size": image_size,
        **({"encoding": encoding, "jpeg_decoder": jpeg.decoder()} if encoding == "jpeg" else {}),
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
    if alone and store.exists() and not overwrite:  # another process finished first
        shutil.rmtree(partial_store)
        return Store(store)
    replaced = store.with_name(store.name + ".replaced")
    if store.exists():  # a large store takes long to remove: the new one is in place before
        shutil.rmtree(replaced, ignore_errors=True)  # of an interrupted call
        store.rename(replaced)
    partial_store.rename(store)
    for temporary in [*store.glob("*/*.npz"), store / "examples.sha256"]:
        temporary.unlink()
    if replaced.exists():
        shutil.rmtree(replaced)
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


def refuse_full_disk(folder: Path, images: int, size: int, encoding: str, alone: bool) -> None:
    """Raise UserError if the disk has too little room for the store, counting the files already in ``folder``.

    Print the need if it is above 10 GB. alone: as in ``write_store``.
    """
    of_image: float = size**2 * 3
    if encoding == "jpeg":
        of_image = 600 + JPEG_SHARE * of_image  # a header has 600 bytes
    needed = images * of_image
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    disk = shutil.disk_usage(existing)
    free = disk.free + written
    if free < needed and disk.total:  # /proc and the like have none; writing fails there
        raise UserError(
            f"the store needs about {needed / 1e9:,.1f} GB, and {existing} has {free / 1e9:,.1f} GB free",
            "choose another disk with data.store=PATH" + ("" if alone or encoding == "jpeg" else ", or encoding=jpeg"),
        )
    if needed > 10e9:
        print(f"the store will take about {needed / 1e9:,.0f} GB; {free / 1e9:,.0f} GB are free")


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


def _start_or_resume(folder: Path, examples: Sequence[Example], image_size: int, encoding: str) -> None:
    """Create the partial folder, or check that the existing folder was created from the same examples.

    Raises UserError if it was created from other examples.
    """
    listing = hashlib.sha256((str(image_size) + encoding.removeprefix("raw")).encode())
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
