"""Embedded demonstration data: classify patches by the photograph that they come from.

The ten classes are ten photographs that ship with scikit-image. Each photograph is divided into a grid of cells. One in
five cells, a knight's move apart, is held out for validation, so that train and val show the same subjects but share no
pixels. This data demonstrates that the pipeline works; it does not produce results.
"""

from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import version
from math import ceil, floor
from pathlib import Path

import numpy as np
import skimage.data
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image

from alexnet_repro.data.shard_writer import Example
from alexnet_repro.data.store import Store
from alexnet_repro.data.store_writer import write_store

PHOTOGRAPHS = (
    "brick", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon", "retina",
)  # fmt: skip
SOURCE = f"photographs of scikit-image {version('scikit-image')}"
CELLS = 5  # cells per row and per column of a photograph
SMALLEST = 0.75  # patch sides are uniform between SMALLEST and 1 times the shorter side of a cell


def prepare_photos(cfg: DictConfig) -> Store:
    """Prepare the store of ``data=photos``."""
    return write_store(
        [Example(*patch) for patch in patches(cfg.data.train_per_class, cfg.data.val_per_class, cfg.data.image_size)],
        PHOTOGRAPHS,
        Path(str(cfg.data.store)),
        image_size=cfg.data.image_size,
        provenance={"name": cfg.data.name, "source": SOURCE, "held_out": "every 5th cell of each photograph"},
        overwrite=bool(cfg.get("overwrite")),
        alone=True,
    )


def patches(
    train_per_class: int, val_per_class: int, size: int
) -> Iterator[tuple[str, int, str, partial[NDArray[np.uint8]]]]:
    """Yield (split, label, name, read) for each patch, where ``read()`` returns (size, size, 3) uint8.

    Every call yields the same patches.
    """
    for split, per_class in (("train", train_per_class), ("val", val_per_class)):
        for label, name in enumerate(PHOTOGRAPHS):
            rng = np.random.default_rng((label, split == "val"))
            for number in range(per_class):
                box = _box(_photograph(name), split, number, rng)
                yield split, label, f"{name} at {box}", partial(_cut, name, box, size)


@cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def _box(photograph: Image.Image, split: str, number: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom), in pixels, of a random square inside a cell of the split."""
    cells = [(x, y) for y in range(CELLS) for x in range(CELLS) if ((x + 2 * y) % 5 == 0) == (split == "val")]
    x, y = cells[number % len(cells)]
    width, height = photograph.width / CELLS, photograph.height / CELLS
    side = min(width, height) * rng.uniform(SMALLEST, 1)
    left = x * width + rng.uniform(0, width - side)
    top = y * height + rng.uniform(0, height - side)
    return ceil(left), ceil(top), floor(left + side), floor(top + side)


def _cut(name: str, box: tuple[int, int, int, int], size: int) -> NDArray[np.uint8]:
    patch = _photograph(name).crop(box)  # crop before resizing, so that the filter reads no pixels outside the cell
    return np.asarray(patch.resize((size, size), Image.Resampling.BICUBIC))
