"""Read CIFAR-10 in the official order of its images, with batch 5 as the val split."""

import pickle
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alexnet_repro.data.listing import File
from alexnet_repro.errors import UserError

BATCHES, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
LARGEST_BATCH = 2**26  # bytes; an official one has 31 million
REMEDY = f"set source=PATH to {ARCHIVE}, to a folder with {BATCHES}, or with class folders in train/ and test/"


def official_batches(source: Any) -> Path | Literal["download"] | None:
    """Return where the official batches are: the folder above ``BATCHES``, their archive, or "download" without a source.

    Returns None if the source is something else. Raises UserError for CIFAR-10 in the formats of C and Matlab programs.
    """
    if source is None:
        return "download"
    path = Path(str(source))
    for other in ("cifar-10-batches-bin", "cifar-10-batches-mat", "cifar-10-binary.tar.gz", "cifar-10-matlab.tar.gz"):
        if path.name == other or (path / other).exists():
            raise UserError(f"{path}: {other} is not the version of CIFAR-10 that is read here", REMEDY)
    if path.name == BATCHES and path.is_dir():
        return path.absolute().parent
    if (path / BATCHES).is_dir():
        return path
    return next((archive for archive in (path, path / ARCHIVE) if archive.name == ARCHIVE and archive.is_file()), None)


@contextmanager
def unpacked_batches(path: Path, beside: Path) -> Iterator[Path]:
    """Yield the folder that contains ``BATCHES``: ``path``, or, of an archive, a temporary folder ``beside`` the store.

    Raises UserError if the archive is damaged.
    """
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}.", dir=beside.absolute().parent) as folder:
        (Path(folder) / BATCHES).mkdir()
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    parts = PurePosixPath(member.name).parts
                    if len(parts) != 2 or parts[0] != BATCHES or not member.isreg() or member.size > LARGEST_BATCH:
                        continue
                    if (content := tar.extractfile(member)) is not None:
                        with (Path(folder) / BATCHES / parts[1]).open("wb") as file:
                            shutil.copyfileobj(content, file)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(f"{path} is damaged: {error}", "download it again") from None
        yield Path(folder)


def cifar10_batches(
    folder: Path, download: bool = False
) -> tuple[list[tuple[str, int, str, NDArray[np.uint8]]], list[str]]:
    """Read CIFAR-10's official batches.

    Returns a list of (split, label, name, (32, 32, 3) image) in official order, and the class names. The last training
    batch, data_batch_5, is the val split, since the authors used it for model selection.

    folder: folder that contains cifar-10-batches-py or, with ``download``, will contain it.

    Raises UserError if the batches are missing or damaged.
    """
    from torchvision.datasets import CIFAR10  # imported here because it takes 3 s, and other data sets don't need it

    examples = []
    for split in ("train", "test"):
        try:
            batches = CIFAR10(str(folder), train=split == "train", download=download)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"CIFAR-10 {'could not be downloaded' if download else 'is damaged'}: {str(error).splitlines()[0].partition(' You can use')[0]}",
                REMEDY,
            ) from None
        first_of_val = len(batches.data) - len(batches.data) // len(CIFAR10.train_list) if split == "train" else None
        for i, (image, label) in enumerate(zip(batches.data, batches.targets, strict=True)):
            part = "val" if first_of_val is not None and i >= first_of_val else split
            examples.append((part, label, f"{part}/{i:05d}", image))
    return examples, batches.classes


FIRST_OF_BATCH_5 = 40_000  # of CIFAR-10's training images


def in_official_order(files: list[File]) -> list[File]:
    """Sort images by the number in their name and move training batch 5 to the val split.

    Batch 5 is the last 10,000 training images. It stays in train if there already is a val split. Returns the files
    unchanged unless every file name is a number.
    """
    numbers = [re.fullmatch(r"\d+", Path(file.name).stem) for file in files]
    if not all(numbers):
        return files
    files = sorted(files, key=lambda file: (file.split, int(Path(file.name).stem)))
    if any(file.split == "val" for file in files):
        return files
    return [
        replace(file, split="val") if file.split == "train" and int(Path(file.name).stem) >= FIRST_OF_BATCH_5 else file
        for file in files
    ]
