"""The folder in which a store is made: room, what an interruption left, and the store that it replaces."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from alexnet_repro.data.shard_writer import Example
from alexnet_repro.errors import UserError

JPEG_SHARE = 0.135  # of the bytes of RGB values, as measured on Imagenette


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
    """Raise UserError if ``store`` exists, unless it is a store and ``overwrite`` is true.

    The same if the program's own names beside it, STORE.partial and STORE.replaced, are taken by something else.
    """
    if (store / "manifest.json").is_file():
        if not overwrite:
            raise UserError(
                f"{store} already exists",
                "to replace it, add overwrite=true; to keep it, choose another data.store=PATH",
            )
    elif store.exists():
        raise UserError(f"{store} exists but isn't a store", "choose another data.store=PATH")
    partial_store, replaced = store.with_name(store.name + ".partial"), _replaced(store)
    for path, made_here in ((partial_store, "examples.sha256"), (replaced, "manifest.json")):
        known = (path / made_here).is_file() or (path.is_dir() and not any(path.iterdir()))
        if path.is_symlink() or (path.exists() and not known):
            raise UserError(
                f"{path}, which would be used on the way to {store}, exists and holds something else",
                "rename it, or choose another data.store=PATH",
            )


def start_or_resume(folder: Path, examples: Sequence[Example], image_size: int, encoding: str) -> None:
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
    folder.mkdir(parents=True, exist_ok=True)
    listing_file.write_text(listing.hexdigest())
    for split in {example.split for example in examples}:
        (folder / split).mkdir(exist_ok=True)


def put_in_place(partial_store: Path, store: Path) -> None:
    """Rename a complete store to its final name, and remove the one that it replaces."""
    replaced = _replaced(store)
    if store.exists():  # a large store takes long to remove: the new one is in place before
        _remove_store(replaced)  # of an interrupted call
        store.rename(replaced)
    partial_store.rename(store)
    for temporary in [*store.glob("*/*.npz"), store / "examples.sha256"]:
        temporary.unlink()
    _remove_store(replaced)


def _replaced(store: Path) -> Path:
    """Return the path of the store that ``store`` replaces while that one is being removed."""
    return store.with_name(store.name + ".replaced")


def _remove_store(store: Path) -> None:
    """Remove a store if it exists. The manifest goes last, so that the rest after an interruption is still known as a store."""
    if not store.exists():
        return
    for path in store.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "manifest.json":
            path.unlink()
    shutil.rmtree(store)
