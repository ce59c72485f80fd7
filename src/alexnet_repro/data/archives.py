"""List the files of a folder, a tar, tars in a folder, or Parquet shards."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alexnet_repro.data import parquet, tars
from alexnet_repro.data.listing import Account, File, junk
from alexnet_repro.errors import UserError, printable
from alexnet_repro.files import parse_json

UNPACKED = ".unpacked.tar"
OTHER_ARCHIVE = re.compile(r"\.(zip|zst|zstd|7z|rar|lz4|tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
SPLIT_OR_SYNSET = re.compile(r"(ILSVRC\d{4}_)?(im(g|ages)_)?(train|val|test)|n\d{8}", re.IGNORECASE)
DANGLING = "names that lead to no file"


def entries(path: Path, beside: Path, account: Account) -> Iterator[File | str]:
    """Yield every file below ``path``, including the members of tars, and every folder.

    A folder is a string that ends in /. A folder with Parquet shards stands for the images in them. A compressed tar is
    unpacked ``beside`` a store, into a file whose name begins with the store's. Links stand for the files that they lead
    to; in a tar, links to folders are left out. Of several members with the same name, the last one counts, as when a tar
    is unpacked. ``account`` gets every file that is found, and the reason for each that is left out.

    Raises UserError if ``path`` is neither a folder nor a tar, or if a tar is damaged or cut.
    """
    if path.is_file():
        if not tars.is_tar(path):
            if kind := tars.other_archive(path):
                raise UserError(f"source={path} is {kind}", "unpack it, and set source to the folder")
            raise UserError(f"source={path} is neither a folder nor a tar")
        plain = tars.uncompressed(path, _copy_of([path], beside))
        yield from _without_archives(tars.members(plain, 0, plain.stat().st_size, "", account), account)
        return
    if shards := sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        yield from _rows(shards, path, beside, account)
        return
    for folder, subfolders, names in walk(path):
        here = folder.relative_to(path)
        kits = {name for name in (*subfolders, *names) if folder == path and "devkit" in name}  # beside the images
        for name in (*subfolders, *names):
            reason = "development kits, whose labels are used where needed" if name in kits else junk(name)
            if reason:
                account.seen += 1
                account.leave_out(reason, (here / name).as_posix())
                kits.add(name)
        subfolders[:] = sorted(name for name in subfolders if name not in kits)
        yield from (f"{(here / name).as_posix()}/" for name in subfolders)
        for name in sorted(name for name in names if name not in kits):
            file, relative = folder / name, (here / name).as_posix()
            if not file.is_file():
                account.seen += 1
                account.leave_out(DANGLING, relative)
            elif name.lower().endswith(".tar"):
                tars.refuse_compressed(file, 0, str(file))
                yield f"{relative[:-4]}/"
                inside = tars.members(file, 0, file.stat().st_size, f"{relative[:-4]}/", account)
                yield from _without_archives(inside, account)
            else:
                account.seen += 1
                yield from _without_archives(iter([File(relative, file, 0, file.stat().st_size)]), account)


def _rows(shards: list[Path], path: Path, beside: Path, account: Account) -> Iterator[File]:
    """Yield the images of Parquet shards."""
    folders = {shard.parent for shard in shards}
    for other in sorted({other for folder in {path, *folders} for other in folder.iterdir()} - {*shards, *folders}):
        account.seen += 1
        account.leave_out("files and folders beside the Parquet shards", other.name)
    plain = parquet.as_tar(shards, _copy_of(shards, beside))
    account.seen += parquet.number_of_rows(shards)
    for entry in tars.members(plain, 0, plain.stat().st_size, "", Account(), ours=True):
        if isinstance(entry, File) and entry.name != parquet.LEFT_OUT:
            yield entry
        elif isinstance(entry, File):
            for reason, (number, first) in parse_json(entry.read_bytes()).items():
                account.leave_out(reason, first, number)


def _without_archives(found: Iterator[File | str], account: Account) -> Iterator[File | str]:
    """Leave out archives that are not read. Raise UserError for one that seems to hold a split or a class."""
    for entry in found:
        if isinstance(entry, str) or not (match := OTHER_ARCHIVE.search(entry.name)):
            yield entry
            continue
        if SPLIT_OR_SYNSET.match(entry.name.rpartition("/")[2]):
            raise UserError(
                f"{entry.name} of {entry.path} is an archive that is not read ({match[0]})", "unpack it, or remove it"
            )
        account.leave_out("archives, which are not unpacked", entry.name)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder below ``root``, its subfolders and its files, following links, but not to a folder above.

    As with os.walk, the caller may change the list of subfolders. Raises OSError for a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        error.filename = printable(os.fspath(error.filename))
        raise error

    for name, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        folder = Path(name)
        above = {parent.resolve() for parent in (folder, *folder.parents)}
        subfolders[:] = [name for name in subfolders if (folder / name).resolve() not in above]
        yield folder, subfolders, names


def _copy_of(sources: Sequence[Path], beside: Path) -> Path:
    """Return the path of an unpacked copy of these files ``beside`` a store; each store has its own."""
    identity = " ".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sources)
    return beside.with_name(f"{beside.name}.{hashlib.sha256(identity.encode()).hexdigest()[:8]}{UNPACKED}")
