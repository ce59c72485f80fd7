"""Write the files of a split, each of up to 1024 images, and sum what the mean image and the covariance need."""

import errno
import hashlib
import io
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alexnet_repro.data import jpeg
from alexnet_repro.data.jpeg import RGB
from alexnet_repro.data.manifest import SHARD
from alexnet_repro.data.split import shard_name
from alexnet_repro.errors import printable
from alexnet_repro.files import written_whole


@dataclass(frozen=True)
class Example:
    """One image to write.

    ``read()`` returns its RGB values, (size, size, 3). It raises OSError or ValueError if the image cannot be read.
    ``size`` is the length of the encoded image in bytes, by which a resumed preparation notices that it was replaced.
    """

    split: str
    label: int
    name: str
    read: Callable[[], RGB]
    size: int = 0


DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile)  # what numpy raises for a .npz file that is none
Read = tuple[RGB, bytes | RGB, NDArray[np.float64], int]  # pixels, what is stored, sum of outer products, CRC-32


def write_shards(
    members: Sequence[Example],
    path: Path,
    size: int,
    encoding: str,
    threads: ThreadPoolExecutor,
    bar: "tqdm[Any]",
) -> Iterator[dict[str, Any]]:
    """Write the shards of a split, and yield the statistics of each in order.

    Shards that exist are kept. The threads read images of the next shard while they sum, hash and write those before,
    so that all cores are busy. Few of them wait to be written, so that the memory is bounded.
    """
    waiting = 2 + threads._max_workers // 8  # a thread writes more than 1000 images per second
    writing: deque[Future[dict[str, Any]]] = deque()
    for number, start in enumerate(range(0, len(members), SHARD)):
        shard = members[start : start + SHARD]
        file = path / shard_name(number, encoding)
        done: Future[dict[str, Any]] = Future()
        if (found := _finished(file, shard)) is not None:
            bar.update(len(shard))
            done.set_result(found)
        else:
            results = []
            for result in threads.map(partial(_read, encoding=encoding), shard):
                results.append(result)
                bar.update()
            done = threads.submit(_write_shard, shard, results, file, size, encoding)
            del results
        writing.append(done)
        while len(writing) > waiting or (writing and writing[0].done()):
            yield writing.popleft().result()
    while writing:
        yield writing.popleft().result()


def _finished(file: Path, shard: Sequence[Example]) -> dict[str, Any] | None:
    """Return the statistics of a shard that an earlier call wrote, or None if it must be written.

    A shard with unreadable images is written again, because they may have been repaired, and so is one with an image
    that has another length now.
    """
    statistics_path = file.with_suffix(".npz")
    if not (statistics_path.exists() and file.exists()):
        return None
    try:
        with np.load(statistics_path) as found:
            statistics = dict(found)
    except DAMAGED:
        return None
    # earlier versions wrote no "sizes"
    same = np.array_equal(statistics.get("sizes", ()), [example.size for example in shard])
    return statistics if same and not statistics["bad"].size else None


def _read(example: Example, encoding: str) -> Read | str:
    """Read an image, and encode it if so wanted; return a description of the problem if it cannot be read."""
    try:
        image = np.ascontiguousarray(example.read())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (
            errno.EIO,
            errno.EMFILE,
            errno.ENFILE,
            errno.EBADF,
            errno.ESTALE,
        ):
            raise  # not about this image
        # without addresses, which differ between two preparations
        return printable(f"{example.name} ({re.sub(' at 0x[0-9a-f]+', '', str(error))})")
    stored: bytes | RGB = image
    if encoding == "jpeg":
        stored = jpeg.encode(image)
        image = jpeg.decode(stored)  # the mean is that of the images that a net sees
    pixels = image.reshape(-1, 3).astype(np.float64)
    # sums of integers below 2^53 are exact in float64, in any order
    return image, stored, pixels.T @ pixels, zlib.crc32(stored)  # type: ignore[arg-type]


def _write_shard(
    shard: Sequence[Example], results: list[Read | str], path: Path, size: int, encoding: str
) -> dict[str, Any]:
    """Write one shard of images and its statistics, and return the statistics. No file is read again."""
    good = [(example.label, *result) for example, result in zip(shard, results, strict=True) if type(result) is not str]
    labels, images, stored, outer, crc32 = ([row[i] for row in good] for i in range(5))
    parts: list[Any] = list(stored)
    if encoding == "raw":
        header = io.BytesIO()
        facts = {"descr": "|u1", "fortran_order": False, "shape": (len(images), size, size, 3)}
        np.lib.format.write_array_header_1_0(header, facts)
        parts.insert(0, header.getvalue())
    digest, total = hashlib.sha256(), np.zeros((size, size, 3), np.uint64)
    with written_whole(path) as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    for image in images:
        total += image
    statistics: dict[str, Any] = {
        "labels": np.array(labels, np.int64),
        "crc32": np.array(crc32, np.uint32),
        "sizes": np.array([example.size for example in shard], np.int64),
        "bad": np.array([result for result in results if isinstance(result, str)], str),
        "sum": total,
        "outer": np.sum(outer, 0) if outer else np.zeros((3, 3)),
        "sha256": np.array(digest.hexdigest()),
    }
    if encoding == "jpeg":
        statistics["ends"] = np.cumsum([len(data) for data in stored], dtype=np.int64)
    with written_whole(path.with_suffix(".npz")) as file:
        np.savez(file, **statistics)
    return statistics
