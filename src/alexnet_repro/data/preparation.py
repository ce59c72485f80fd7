"""Prepare images as a store (Section 2): 256x256, uint8, with the mean image and RGB covariance."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from omegaconf import DictConfig

from alexnet_repro.data import source
from alexnet_repro.data.cifar10 import cifar10_batches, in_official_order, official_batches, unpacked_batches
from alexnet_repro.data.identity import checked_identity
from alexnet_repro.data.images import read_image
from alexnet_repro.data.listing import Account
from alexnet_repro.data.manifest import BY_NAME
from alexnet_repro.data.photos import prepare_photos
from alexnet_repro.data.shard_writer import Example
from alexnet_repro.data.store import Store
from alexnet_repro.data.store_folder import refuse_taken
from alexnet_repro.data.store_writer import write_store
from alexnet_repro.errors import UserError, printable
from alexnet_repro.files import one_process_at_a_time


def prepare(cfg: DictConfig) -> Store:
    """Prepare the store described by ``cfg.data`` from ``cfg.source`` and print a summary.

    With ``cfg.verify``, only compare the files of the existing store with their checksums. Raises InUse if another
    process prepares the same store, and UserError for what can't be prepared.
    """
    if cfg.verify:
        return _verify(Path(str(cfg.data.store)))
    store = Path(str(cfg.data.store))
    if store.is_symlink() or not store.name:  # the store that a link leads to is replaced, and the link stays
        store = store.resolve()
        cfg.data.store = str(store)
    if cfg.data.source == "embedded":
        with _named_folder(store):
            made = prepare_photos(cfg)
    else:
        refuse_taken(store, cfg.overwrite)
        in_use = f"another process is preparing {store}"
        with (
            _named_folder(store),
            one_process_at_a_time(store, in_use, "wait until it ends, or choose another data.store=PATH"),
        ):
            made = _prepared(cfg)
    _describe(made)
    return made


@contextmanager
def _named_folder(store: Path) -> Iterator[None]:
    """Name the option if the store cannot be written where it would be."""
    try:
        yield
    except OSError as error:
        path = Path(str(error.filename)).absolute()
        own = path in store.absolute().parents or str(path).startswith(str(store.absolute()))
        if own and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{store} can't be written: {error.filename}: {error.strerror}",
                "choose a folder that can be written with data.store=PATH",
            ) from None
        raise


def _prepared(cfg: DictConfig) -> Store:
    store = Path(str(cfg.data.store))
    if cfg.data.source == "cifar10" and (batches := official_batches(cfg.source)) is not None:
        return prepare_cifar10(cfg, batches)
    if cfg.source is None:
        raise UserError(
            f"data={cfg.data.name} requires your own copy of the images: say where it is with source=PATH",
            "PATH is a folder of class folders, with or without train/ and val/ above them, or a tar of such a folder",
        )
    path = Path(str(cfg.source))
    target, images = store.resolve(), path.resolve()
    if target.is_relative_to(images) or images.is_relative_to(target):
        raise UserError(
            f"the store {store} would be inside its source, or its source inside the store",
            "choose another data.store=PATH",
        )
    if (path / "manifest.json").is_file():
        return convert(cfg, Store(path))
    data = cfg.data
    found = source.scan(
        path, data.hold_out_every, store, data.get("hold_out_as", "val"), data.get("hold_out_seed"), data.get("year")
    )
    if data.source == "cifar10":
        found.files = in_official_order(found.files)
    subset = checked_identity(found, data, path)
    if not any(file.split in ("val", "test") for file in found.files):
        print(f"{path} has no val images, without which no net can be trained: add some, or set data.hold_out_every=N")
    examples = [
        Example(f.split, f.label, f"{f.split}/{f.name}", partial(read_image, f.read_bytes, data.image_size), f.size)
        for f in found.files
    ]
    made = write_store(
        examples,
        found.classes,
        store,
        image_size=data.image_size,
        provenance={
            "name": data.name,
            "source": path.resolve().name,
            **subset,
            "held_out": found.held_out,
            "order": BY_NAME,
            "accounting": found.account.settle(len(found.files)),
            "ignored": found.ignored,
            **({"class_numbers": found.class_numbers} if found.class_numbers else {}),
        },
        max_bad=cfg.max_bad,
        overwrite=cfg.overwrite,
        workers=cfg.workers,
        encoding=cfg.encoding,
    )
    if found.temporary:
        found.temporary.unlink(missing_ok=True)
    return made


def prepare_cifar10(cfg: DictConfig, batches: Path | Literal["download"]) -> Store:
    """Prepare the store of ``data=cifar10`` from the official batches.

    batches: the folder with cifar-10-batches-py, the archive of it, or "download".
    """
    store = Path(str(cfg.data.store))
    if batches == "download":
        found, classes = cifar10_batches(store.parent, download=True)
    else:
        with unpacked_batches(batches, store) as folder:
            found, classes = cifar10_batches(folder)
    return write_store(
        [Example(split, label, name, partial(np.asarray, image)) for split, label, name, image in found],
        classes,
        store,
        image_size=cfg.data.image_size,
        provenance={
            "name": cfg.data.name,
            "source": "official batches",
            "held_out": "",
            "order": "official",
            "accounting": Account(len(found)).settle(len(found)),
            "ignored": [],
        },
        overwrite=cfg.overwrite,
        workers=cfg.workers,
        encoding=cfg.encoding,
    )


def convert(cfg: DictConfig, store: Store) -> Store:
    """Copy another store with the encoding ``cfg.encoding``.

    Raises UserError if it has this encoding already, or if it was made for other data than ``cfg.data``.
    """
    if store.encoding == cfg.encoding:
        raise UserError(
            f"{store.path} has encoding={cfg.encoding} already", "copy its folder, or choose the other encoding"
        )
    if store.manifest.get("name") != cfg.data.name:
        raise UserError(
            f"{store.path} was made with data={store.manifest.get('name')}, not data={cfg.data.name}",
            "choose the same data",
        )
    if store.image_size != cfg.data.image_size:
        raise UserError(
            f"the images of {store.path} are {store.image_size}x{store.image_size}, not {cfg.data.image_size}x{cfg.data.image_size}",
            f"choose the data set that it was made for, or data.image_size={store.image_size}",
        )
    # the images of a store of version 0.1 can't be checked one by one
    if not any(name.endswith("crc32.npy") for name in store.manifest["sha256"]):
        _refuse_damage(store)
    examples = [
        Example(name, label, f"{store.images_sha256} {name}/{index}", partial(split.__getitem__, index))
        for name in store.manifest["splits"]
        if store.has(name)
        for split in [store.split(name)]
        for index, label in enumerate(split.labels.tolist())
    ]
    kept = {key: store.manifest.get(key) for key in ("name", "source", "held_out", "ignored")}
    kept |= {
        key: store.manifest[key] for key in ("class_numbers", "subset", "order", "accounting") if key in store.manifest
    }
    return write_store(
        examples,
        store.classes,
        Path(str(cfg.data.store)),
        image_size=store.image_size,
        provenance={
            **kept,
            "from_store": store.images_sha256,
            "left_out_before": [*store.manifest.get("left_out_before", []), *store.manifest.get("bad", [])],
        },
        max_bad=cfg.max_bad,
        overwrite=cfg.overwrite,
        workers=cfg.workers,
        encoding=cfg.encoding,
    )


def _describe(store: Store) -> None:
    counts = ", ".join(f"{split['count']} {name}" for name, split in store.manifest["splits"].items())
    encoding = "" if store.encoding == "raw" else f", as {store.encoding.upper()}"
    size = f"{store.image_size}x{store.image_size}"
    print(f"{store.path}: {counts} images of {len(store.classes)} classes, {size}{encoding}")
    notes = store.manifest
    lines = [f"held out: {notes['held_out']}"] if notes.get("held_out") else []
    if isinstance(notes.get("subset"), list):
        lines.append(f"a part of data={notes.get('name')}: {'; '.join(map(str, notes['subset']))}")
    if isinstance(notes.get("ignored"), list):
        lines += [f"left out: {line}" for line in notes["ignored"]]
    for line in lines:
        print(printable(f"  {line}"))  # the store may be a stranger's


def _refuse_damage(store: Store) -> None:
    if damaged := store.damaged_files():
        raise UserError(
            f"{len(damaged)} files of {store.path} are damaged: {', '.join(damaged[:3])}",
            "prepare the store again with overwrite=true",
        )


def _verify(path: Path) -> Store:
    store = Store(path)
    _refuse_damage(store)
    _describe(store)
    print(f"  images_sha256 {store.images_sha256}, images in the order of {store.manifest.get('order', 'the source')}")
    print("all files match their checksums")
    return store
