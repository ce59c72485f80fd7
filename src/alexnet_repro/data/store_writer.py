"""Write the files of a store (see store.py), with the mean image and the RGB covariance in the same pass."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from alexnet_repro.data.store import FORMAT, SHARD, Store, sha256, shard_name
from alexnet_repro.errors import Interrupted, UserError
from alexnet_repro.provenance import written_whole

RGB = NDArray[np.uint8]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """One image to write. ``read()`` returns its RGB values (size, size, 3); it raises OSError or ValueError if it cannot."""

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

    Files of 1024 images are written to ``<store>.partial``. An interrupted call continues there. The finished folder is
    renamed.
    alone: for small stores that several processes may make at once. Each makes its own, and the first that ends is
    kept.

    Raises UserError if the store exists (unless ``overwrite``), if the partial folder was begun from other files, or if
    more than ``max_bad`` images cannot be read. Raises Interrupted on Ctrl-C.
    """
    refuse_taken(store, overwrite)
    partial_store = store.with_name(store.name + (f".{os.getpid()}" if alone else "") + ".partial")
    _begin(partial_store, examples, image_size)

    splits: dict[str, dict[str, Any]] = {}
    mean_sum, outer_sum, train_count = np.zeros((image_size, image_size, 3), np.uint64), np.zeros((3, 3)), 0
    bad: list[str] = []
    checksums: dict[str, str] = {}
    bar = tqdm(total=len(examples), unit=" images", desc=f"preparing {store}")
    with ThreadPoolExecutor(workers or os.cpu_count()) as threads, bar:
        try:
            for split in SPLITS:
                members = [example for example in examples if example.split == split]
                if not members:
                    continue
                labels, shards = [], []
                path = partial_store / split
                for number, start in enumerate(range(0, len(members), SHARD)):
                    shard = members[start : start + SHARD]
                    facts = _shard_facts(shard, path / shard_name(number), image_size, threads, bar)
                    checksums[f"{split}/{shard_name(number)}"] = str(facts["sha256"])
                    labels.append(facts["labels"])
                    shards.append(len(facts["labels"]))
                    bad += facts["bad"].tolist()
                    if len(bad) > max_bad:
                        raise UserError(
                            f"{len(bad)} files can't be read as images: {', '.join(bad[:3])}, ...",
                            f"remove them, or allow more with max_bad={2 * len(bad)}; what is done so far is kept",
                        )
                    if split == "train":
                        mean_sum += facts["sum"]
                        outer_sum += facts["outer"]
                        train_count += len(facts["labels"])
                np.save(path / "labels.npy", np.concatenate(labels))
                checksums[f"{split}/labels.npy"] = sha256(path / "labels.npy")
                splits[split] = {"count": sum(shards), "shards": shards}
        except KeyboardInterrupt:
            threads.shutdown(cancel_futures=True)
            if alone:
                shutil.rmtree(partial_store)
                raise
            raise Interrupted(f"{bar.n} of {len(examples)} images are done; the same command continues there") from None
    if not train_count:
        raise UserError("not one training image could be read", f"first of them: {', '.join(bad[:3])}")

    mean = mean_sum / train_count
    np.save(partial_store / "mean.npy", mean.astype(np.float32))
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
    (partial_store / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for needed_no_more in [*partial_store.glob("*/*.npz"), partial_store / "examples.sha256"]:
        needed_no_more.unlink()
    if alone and store.exists() and not overwrite:  # another process was faster
        shutil.rmtree(partial_store)
        return Store(store)
    if store.exists():
        shutil.rmtree(store)
    partial_store.rename(store)
    if bad:
        print(f"left out {len(bad)} files that can't be read as images: {', '.join(bad)}")
    return Store(store)


def refuse_taken(store: Path, overwrite: bool) -> None:
    """Raise UserError if ``store`` exists, unless it is a store and may be replaced."""
    if (store / "manifest.json").is_file():
        if not overwrite:
            raise UserError(
                f"{store} exists already",
                "to replace it, add overwrite=true; to keep it, choose another data.store=PATH",
            )
    elif store.exists():
        raise UserError(f"{store} is taken by something that isn't a store", "choose another data.store=PATH")


def _begin(folder: Path, examples: Sequence[Example], image_size: int) -> None:
    """Make the partial folder, or check that the existing one was begun from the same examples."""
    listing = hashlib.sha256(str(image_size).encode())
    for example in examples:
        listing.update(f"{example.split}\0{example.label}\0{example.name}\n".encode())
    begun = folder / "examples.sha256"
    if begun.exists() and begun.read_text() != listing.hexdigest():
        raise UserError(f"{folder} holds an unfinished store made from other files", "delete that folder to begin anew")
    for split in {example.split for example in examples}:
        (folder / split).mkdir(parents=True, exist_ok=True)
    begun.write_text(listing.hexdigest())


def _shard_facts(
    shard: Sequence[Example], path: Path, size: int, threads: ThreadPoolExecutor, bar: "tqdm[Any]"
) -> dict[str, NDArray[Any]]:
    """Write one file of images and, beside it, the sums over them; or load the sums of a file that is already there."""
    facts_path = path.with_suffix(".npz")
    if facts_path.exists():
        bar.update(len(shard))
        with np.load(facts_path) as facts:
            return dict(facts)

    def read(example: Example) -> tuple[RGB, NDArray[np.float64]] | str:
        try:
            image = example.read()
        except (OSError, ValueError) as error:
            return f"{example.name} ({error})"
        pixels = image.reshape(-1, 3).astype(np.float64)
        return image, pixels.T @ pixels  # integers below 2^53, so the sum is exact in any order

    images, outer = np.empty((len(shard), size, size, 3), np.uint8), np.zeros((3, 3))
    labels: list[int] = []
    bad: list[str] = []
    for example, result in zip(shard, threads.map(read, shard), strict=True):
        if isinstance(result, str):
            bad.append(result)
        else:
            images[len(labels)] = result[0]
            outer += result[1]
            labels.append(example.label)
        bar.update()
    images = images[: len(labels)]
    facts = {
        "labels": np.array(labels, np.int64),
        "bad": np.array(bad, str),
        "sum": images.sum(0, dtype=np.uint64),
        "outer": outer,
    }
    with written_whole(path) as file:
        np.save(file, images)
    facts["sha256"] = np.array(sha256(path))
    with written_whole(facts_path) as file:
        np.savez(file, **facts)
    return facts
