"""List and read the files of a folder, a tar, or tars inside a tar, without unpacking them."""

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alexnet_repro.errors import UserError

UNPACKED = ".unpacked.tar"


@dataclass(frozen=True)
class File:
    """An encoded image: bytes ``offset`` to ``offset + size`` of the file ``path``.

    source.scan sets ``split`` and ``label``.
    """

    name: str
    path: Path
    offset: int
    size: int
    split: str = ""
    label: int = -1

    def read_bytes(self) -> bytes:
        """Return the encoded image. Raise OSError if the file ends before the end of the image."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends after {len(data)} of {self.size} bytes")
        return data


def entries(path: Path, unpack_into: Path) -> Iterator[File | str]:
    """Yield every file below ``path``, including the members of tars, and every folder.

    A folder is a string that ends in /. A gzip-compressed tar is unpacked into the folder ``unpack_into``. Raises
    UserError if ``path`` is neither a folder nor a tar, or if a tar is damaged.
    """
    if path.is_file():
        try:
            is_tar = tarfile.is_tarfile(path)
        except (EOFError, zlib.error):
            is_tar = True  # a damaged compressed tar; _uncompressed reports it
        if not is_tar:
            raise UserError(f"source={path} is neither a folder nor a tar")
        yield from _members(_uncompressed(path, unpack_into), 0, "")
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and "devkit" not in name)
        here = Path(folder).relative_to(path)
        yield from (f"{(here / name).as_posix()}/" for name in subfolders)
        for name in sorted(names):
            file = Path(folder) / name
            if name.startswith(".") or "devkit" in name:
                continue
            if name.endswith(".tar"):
                prefix = f"{(here / name[:-4]).as_posix()}/"
                yield prefix
                yield from _members(file, 0, prefix)
            else:
                yield File((here / name).as_posix(), file, 0, file.stat().st_size)


def _members(path: Path, offset: int, prefix: str) -> Iterator[File | str]:
    """Yield the members of the tar at ``offset`` of ``path``, including those of nested tars."""
    with path.open("rb") as raw:
        raw.seek(offset)
        try:
            # ignore_zeros stays off, so that a nested tar ends at its own end-of-archive marker
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    name = prefix + PurePosixPath(member.name).as_posix().removeprefix("./")
                    if PurePosixPath(name).name.startswith("."):
                        continue
                    if member.isdir():
                        yield name.rstrip("/") + "/"
                    elif member.isfile() and name.endswith(".tar"):
                        yield name[:-4] + "/"
                        yield from _members(path, member.offset_data, name[:-4] + "/")
                    elif member.isfile():
                        yield File(name, path, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"the tar {prefix.rstrip('/') or path} in {path} is damaged: {error}") from None


def _uncompressed(path: Path, unpack_into: Path) -> Path:
    """Return the path of an uncompressed tar, whose members can be read in any order.

    Returns ``path`` itself, or an unpacked copy in ``unpack_into`` if the tar is gzip-compressed.
    """
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    identity = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    copy = unpack_into / f"{path.name}.{hashlib.sha256(identity.encode()).hexdigest()[:8]}{UNPACKED}"
    if not copy.exists():
        unpack_into.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_suffix(".tmp")
        try:
            with gzip.open(path) as packed, unfinished.open("wb") as out:
                shutil.copyfileobj(packed, out, 2**20)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            unfinished.unlink()
            raise UserError(f"source={path} is damaged: {error}") from None
        unfinished.rename(copy)
    return copy
