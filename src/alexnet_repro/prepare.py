"""Images -> store (Section 2): shorter side to 256, central 256x256, uint8; mean image and RGB covariance in the same pass.

python -m alexnet_repro.prepare data=imagenette source=imagenette.tar
"""

import gzip
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image, ImageOps

from alexnet_repro import photos, source
from alexnet_repro.cli import UserError, command
from alexnet_repro.store import Store
from alexnet_repro.store_writer import RGB, Example, refuse_taken, write_store

FIRST_OF_BATCH_5 = 40_000  # of CIFAR-10's training images; the authors chose on that batch


def read_image(read_bytes: Callable[[], bytes], size: int) -> RGB:
    """Encoded image -> (size, size, 3): the central square, its side scaled to ``size`` with an antialiased bicubic filter.

    That is Section 2's "rescaled the image such that the shorter side was of length 256, and then cropped out the central
    256x256 patch" in one step. Greyscale and CMYK become RGB, an EXIF rotation is applied, transparency is dropped, and
    a gzip-compressed file is opened (ILSVRC-2010 has one). Raises OSError or ValueError for anything that isn't a whole image.
    """
    data = read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        with Image.open(io.BytesIO(data)) as image:
            # A JPEG that is larger than twice what is needed is decoded at a half, a quarter or an eighth.
            image.draft("RGB", (2 * size, 2 * size))
            ImageOps.exif_transpose(image, in_place=True)
            rgb = image.convert("RGB")
    except (Image.DecompressionBombError, SyntaxError, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from error
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def prepare(cfg: DictConfig) -> Store:
    """Make the store that ``cfg.data`` describes from ``cfg.source``, and say what it holds."""
    store = Path(str(cfg.data.store))
    if cfg.get("verify"):
        return _verify(store)
    if cfg.data.source == "embedded":
        made = prepare_photos(cfg)
        _describe(made)
        return made
    if cfg.data.source == "cifar10" and (
        cfg.source is None or (Path(str(cfg.source)) / "cifar-10-batches-py").is_dir()
    ):
        made = prepare_cifar10(cfg)
        _describe(made)
        return made
    if cfg.source is None:
        raise UserError(
            f"data={cfg.data.name} is made from your own copy: say where it is with source=PATH",
            "a folder of class folders, with train/ and val/ above them or not, or a tar of it",
        )
    refuse_taken(store, cfg.overwrite)
    place, images = store.resolve(), Path(str(cfg.source)).resolve()
    if place.is_relative_to(images) or images.is_relative_to(place):
        raise UserError(
            f"the store {store} would be inside its source, or the other way round", "choose another data.store=PATH"
        )
    found = source.scan(Path(str(cfg.source)), hold_out_every=cfg.data.hold_out_every, unpack_into=store.parent)
    if cfg.data.source == "cifar10":
        found.files = in_official_order(found.files)
    size = cfg.data.image_size
    examples = [
        Example(f.split, f.label, f"{f.split}/{f.name}", partial(read_image, f.read_bytes, size)) for f in found.files
    ]
    made = write_store(
        examples,
        found.classes,
        store,
        image_size=size,
        provenance={
            "name": cfg.data.name,
            "source": Path(str(cfg.source)).resolve().name,
            "held_out": found.held_out,
            "ignored": found.ignored,
        },
        max_bad=cfg.max_bad,
        overwrite=cfg.overwrite,
        workers=cfg.workers,
    )
    if found.temporary:
        found.temporary.unlink(missing_ok=True)
    _describe(made)
    return made


def in_official_order(files: list[source.File]) -> list[source.File]:
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


def prepare_photos(cfg: DictConfig) -> Store:
    """Make the embedded store of ``data=photos``."""
    return write_store(
        [
            Example(*patch)
            for patch in photos.patches(cfg.data.train_per_class, cfg.data.val_per_class, cfg.data.image_size)
        ],
        photos.PHOTOGRAPHS,
        Path(str(cfg.data.store)),
        image_size=cfg.data.image_size,
        provenance={"name": cfg.data.name, "source": photos.SOURCE, "held_out": "every 5th cell of each photograph"},
        overwrite=bool(cfg.get("overwrite")),
        alone=True,
    )


def prepare_cifar10(cfg: DictConfig) -> Store:
    """Make the store of ``data=cifar10`` from the official batches, downloaded beside it unless ``cfg.source`` has them."""
    store = Path(str(cfg.data.store))
    refuse_taken(store, cfg.overwrite)
    folder = Path(str(cfg.source)) if cfg.source is not None else store.parent
    found, classes = source.cifar10_batches(folder, download=cfg.source is None)
    return write_store(
        [Example(split, label, name, partial(np.asarray, image)) for split, label, name, image in found],
        classes,
        store,
        image_size=cfg.data.image_size,
        provenance={"name": cfg.data.name, "source": "official batches", "held_out": "", "ignored": []},
        overwrite=cfg.overwrite,
        workers=cfg.workers,
    )


def _describe(store: Store) -> None:
    counts = ", ".join(f"{split['count']} {name}" for name, split in store.manifest["splits"].items())
    print(f"{store.path}: {counts} images of {len(store.classes)} classes, {store.image_size}x{store.image_size}")
    for what in ("held_out", "ignored"):
        if store.manifest.get(what):
            print(f"  {what.replace('_', ' ')}: {store.manifest[what]}")


def _verify(path: Path) -> Store:
    store = Store(path)
    if damaged := store.damaged_files():
        raise UserError(
            f"{len(damaged)} files of {path} are damaged: {', '.join(damaged[:3])}",
            "prepare it again with overwrite=true",
        )
    _describe(store)
    print("every file has its checksum")
    return store


if __name__ == "__main__":
    command("prepare")
