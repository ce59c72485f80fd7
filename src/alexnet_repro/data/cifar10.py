"""Read CIFAR-10 in the official order of its images, with batch 5 as the val split."""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexnet_repro.data.archives import File
from alexnet_repro.errors import UserError


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
                f"CIFAR-10 {'could not be downloaded' if download else 'is damaged'}: {str(error).splitlines()[0]}",
                "set source=PATH to a folder with cifar-10-batches-py, or with class folders in train/ and test/",
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
