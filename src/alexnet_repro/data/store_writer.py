"""Write the files of a store and compute the mean image and RGB covariance in the same pass."""

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
from alexnet_repro.data.store_folder import put_in_place, refuse_full_disk, refuse_taken, start_or_resume
from alexnet_repro.errors import Interrupted, UserError
from alexnet_repro.files import written_whole
from alexnet_repro.processes import cores

SPLITS = ("train", "val", "test", "unlabelled")

LOG_EVERY = 60.0  # seconds between two lines about progress, where the output is not a terminal


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

    Raises UserError if the store exists (unless ``overwrite``), if the partial folder was created from other files, if
    more than ``max_bad`` images cannot be read, or if those are all training images of a class. Raises Interrupted on Ctrl-C.
    """
    refuse_taken(store, overwrite)
    partial_store = store.with_name(store.name + (f".{os.getpid()}" if alone else "") + ".partial")
    refuse_full_disk(partial_store, len(examples), image_size, encoding, alone)
    start_or_resume(partial_store, examples, image_size, encoding)

    splits: dict[str, dict[str, Any]] = {}
    mean_sum, outer_sum, train_count = np.zeros((image_size, image_size, 3), np.uint64), np.zeros((3, 3)), 0
    bad: list[str] = []
    checksums: dict[str, str] = {}
    with (
        _quiet_decoders() as screen,
        ThreadPoolExecutor(workers or cores()) as threads,
        tqdm(
            total=len(examples),
            unit=" images",
            desc=f"preparing {store}",
            file=screen,
            mininterval=0.1 if screen.isatty() else LOG_EVERY,
            maxinterval=LOG_EVERY,
        ) as bar,
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
    stored = sum(split["count"] for split in splits.values())
    if stored + len(bad) != len(examples):
        raise RuntimeError(
            f"of {len(examples)} images, {stored} are stored and {len(bad)} left out: a fault of the program"
        )
    if not train_count:
        raise UserError("no training image could be read", f"first unreadable files: {', '.join(bad[:3])}")
    _refuse_lost_classes(examples, classes, np.load(partial_store / "train" / "labels.npy"), bad)

    mean = mean_sum / train_count
    with written_whole(partial_store / "mean.npy") as file:
        np.save(file, mean.astype(np.float32))
    mean_rgb = mean.mean((0, 1))
    covariance = outer_sum / (train_count * image_size**2) - np.outer(mean_rgb, mean_rgb)
    checksums["mean.npy"] = sha256(partial_store / "mean.npy")
    manifest = {
        "format": FORMATS[encoding],
        **_accounted(provenance or {}, len(bad)),
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
    put_in_place(partial_store, store)
    if bad:
        print(f"left out {len(bad)} files that can't be read as images: {', '.join(bad)}")
    return Store(store)


def _accounted(provenance: dict[str, Any], bad: int) -> dict[str, Any]:
    """Return the provenance, in whose account ``bad`` images that can't be read are no longer used, but left out."""
    if not bad or not (account := provenance.get("accounting")):
        return provenance
    left_out = {**account["left_out"], "files that can't be read as images": bad}
    return {**provenance, "accounting": {**account, "used": account["used"] - bad, "left_out": left_out}}


def _refuse_lost_classes(
    examples: Sequence[Example], classes: Sequence[str], labels: NDArray[np.int64], bad: list[str]
) -> None:
    """Raise UserError if none of the training images of a class, whose labels would be in ``labels``, was readable."""
    train = [example for example in examples if example.split == "train"]
    if lost := sorted({example.label for example in train} - set(labels.tolist())):
        names = [example.name for example in train if example.label == lost[0]]
        told = next(told for told in bad if any(told.startswith(f"{name} (") for name in names))
        more = f", and none of {len(lost) - 1} other classes" if len(lost) > 1 else ""
        raise UserError(
            f"no training image of {classes[lost[0]]} can be read{more}: {told}",
            "repair the images, or remove the folder of the class",
        )


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
