"""CIFAR-10 in the official order of its images, whose batch 5 is the val split."""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10

from alexnet_repro.data.archives import File
from alexnet_repro.errors import UserError


def cifar10_batches(
    folder: Path, download: bool = False
) -> tuple[list[tuple[str, int, str, NDArray[np.uint8]]], list[str]]:
    """CIFAR-10's official batches: (split, label, name, (32, 32, 3) image) of each image in their order, and the class names.

    The last of the training batches, data_batch_5, is the val split: the authors chose on it.

    folder holds, or with ``download`` will hold, cifar-10-batches-py. Raises UserError if it can't be had or is damaged.
    """
    examples = []
    for split in ("train", "test"):
        try:
            batches = CIFAR10(str(folder), train=split == "train", download=download)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"CIFAR-10 {'could not be downloaded' if download else 'is damaged'}: {str(error).splitlines()[0]}",
                "give your copy with source=PATH: the folder that holds cifar-10-batches-py, or train/ and test/ of class folders",
            ) from None
        first_of_val = len(batches.data) - len(batches.data) // len(CIFAR10.train_list) if split == "train" else None
        for i, (image, label) in enumerate(zip(batches.data, batches.targets, strict=True)):
            part = "val" if first_of_val is not None and i >= first_of_val else split
            examples.append((part, label, f"{part}/{i:05d}", image))
    return examples, batches.classes


FIRST_OF_BATCH_5 = 40_000  # of CIFAR-10's training images; the authors chose on that batch


def in_official_order(files: list[File]) -> list[File]:
    """Sort CIFAR-10's images by their number if all are named by it, and make the last 10,000 of 50,000 val: batch 5."""
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
