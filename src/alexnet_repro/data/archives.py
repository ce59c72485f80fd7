"""List and read the files of a folder, a tar, or tars inside a tar, without unpacking them."""

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from alexnet_repro.data import parquet
from alexnet_repro.errors import UserError
from alexnet_repro.files import written_whole

UNPACKED = ".unpacked.tar"
LARGEST_FILE = 2**28  # bytes of an encoded image


@dataclass(frozen=True, slots=True)
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
        """Return the encoded image.

        Raise OSError if the file ends before the end of the image, or if the image is larger than LARGEST_FILE.
        """
        if self.size > LARGEST_FILE:
            raise OSError(f"it has {self.size} bytes, more than {LARGEST_FILE}")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends after {len(data)} of {self.size} bytes")
        return data


def entries(path: Path, beside: Path, skipped: list[str]) -> Iterator[File | str]:
    """Yield every file below ``path``, including the members of tars, and every folder.

    A folder is a string that ends in /. A folder with Parquet shards stands for the images in them. A compressed tar is
    unpacked ``beside`` a store, into a file whose name begins with the store's. Links stand for the files that they lead
    to; in a tar, links to folders are left out. Of several members with the same name, the last one counts, as when a tar
    is unpacked.
    What is left out for another reason than a leading dot is added to ``skipped``, with its number and an example.

    Raises UserError if ``path`` is neither a folder nor a tar, or if a tar is damaged or cut.
    """
    if path.is_file():
        try:
            is_tar = tarfile.is_tarfile(path)
        except (EOFError, zlib.error, lzma.LZMAError):
            is_tar = True  # a damaged compressed tar; _uncompressed reports it
        if not is_tar:
            raise UserError(f"source={path} is neither a folder nor a tar")
        plain = _uncompressed(path, beside)
        yield from _members(plain, 0, plain.stat().st_size, "", skipped)
        return
    if shards := sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        plain = parquet.as_tar(shards, _copy_of(shards, beside), skipped)
        images = (file for file in _members(plain, 0, plain.stat().st_size, "", skipped) if isinstance(file, File))
        yield from sorted(images, key=lambda file: file.name)  # as in class folders, which give the same store
        return
    dangling: list[str] = []
    for folder, subfolders, names in walk(path):
        here = folder.relative_to(path)
        kits = {name for name in (*subfolders, *names) if folder == path and "devkit" in name}  # beside the images
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in kits)
        yield from (f"{(here / name).as_posix()}/" for name in subfolders)
        for name in sorted(names):
            file = folder / name
            if name.startswith(".") or name in kits:
                continue
            if not file.is_file():
                dangling.append((here / name).as_posix())
            elif name.endswith(".tar"):
                prefix = f"{(here / name[:-4]).as_posix()}/"
                yield prefix
                yield from _members(file, 0, file.stat().st_size, prefix, skipped)
            else:
                yield File((here / name).as_posix(), file, 0, file.stat().st_size)
    _note(skipped, dangling, "names that lead to no file")


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder below ``root``, its subfolders and its files, following links, but not to a folder above.

    As with os.walk, the caller may change the list of subfolders. Raises OSError for a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise error

    for name, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        folder = Path(name)
        above = {parent.resolve() for parent in (folder, *folder.parents)}
        subfolders[:] = [name for name in subfolders if (folder / name).resolve() not in above]
        yield folder, subfolders, names


def _note(skipped: list[str], names: list[str], what: str) -> None:
    if names:
        skipped.append(f"{len(names)} {what}, such as {printable(names[0])}")


def printable(name: str) -> str:
    """Return the name of a file, in which bytes that are not UTF-8 are written as \\xff."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _members(path: Path, offset: int, end: int, prefix: str, skipped: list[str]) -> Iterator[File | str]:
    """Yield the members of the tar in bytes ``offset`` to ``end`` of ``path``, including those of nested tars."""
    folders: list[str] = []
    files: dict[str, File] = {}
    links: list[tuple[str, str]] = []  # name, and the name that it leads to
    twice: list[str] = []
    outside: list[str] = []
    special: list[str] = []
    with path.open("rb") as raw:
        raw.seek(offset)
        try:
            # ignore_zeros stays off, so that a nested tar ends at its own end-of-archive marker
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    name = PurePosixPath(member.name.lstrip("/")).as_posix()
                    if PurePosixPath(name).name.startswith(".") and name != ".." and not name.endswith("/.."):
                        continue
                    if ".." in PurePosixPath(name).parts:
                        outside.append(member.name)
                    elif member.isdir():
                        folders.append(name.rstrip("/") + "/")
                    elif member.isfile():
                        if name in files:
                            twice.append(name)
                        files[name] = File(name, path, member.offset_data, member.size)
                        if member.offset_data + member.size > end:
                            raise UserError(
                                f"{_named(path, prefix)} is cut: it ends inside {name}", "download it again"
                            )
                    elif member.islnk():
                        links.append((name, PurePosixPath(member.linkname.lstrip("/")).as_posix()))
                    elif member.issym():
                        target = os.path.normpath(PurePosixPath(name).parent / member.linkname)
                        links.append((name, target))
                    else:
                        special.append(name)
                raw.seek(tar.offset)
                marker = raw.read(tarfile.BLOCKSIZE) if tar.offset + tarfile.BLOCKSIZE <= end else b""
        except tarfile.TarError as error:
            raise UserError(f"{_named(path, prefix)} is damaged: {error}", "download it again") from None
    if marker != tarfile.NUL * tarfile.BLOCKSIZE:
        raise UserError(
            f"{_named(path, prefix)} is cut or damaged: after {len(files)} files there is no end-of-archive marker",
            "download it again",
        )
    lost = dict(links)
    while found := [name for name, target in lost.items() if target in files]:  # a link may lead to another link
        for name in found:
            files.setdefault(name, replace(files[lost.pop(name)], name=name))
    _note(skipped, list(lost), f"links of {_named(path, prefix)} to files that are not in it")
    _note(skipped, outside, f"members of {_named(path, prefix)} with names that lead out of it")
    _note(skipped, special, f"members of {_named(path, prefix)} that are neither files nor folders")
    _note(skipped, twice, f"members of {_named(path, prefix)} replaced by later ones of the same name")
    yield from (prefix + name for name in folders)
    for name, file in files.items():
        if name.endswith(".tar"):
            inner = f"{prefix}{name[:-4]}/"
            yield inner
            yield from _members(path, file.offset, file.offset + file.size, inner, skipped)
        else:
            yield replace(file, name=prefix + name)


def _named(path: Path, prefix: str) -> str:
    return f"the tar {prefix.rstrip('/')} in {path}" if prefix else f"the tar {path}"


COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}


def _copy_of(sources: Sequence[Path], beside: Path) -> Path:
    """Return the path of an unpacked copy of these files ``beside`` a store; each store has its own."""
    identity = " ".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sources)
    return beside.with_name(f"{beside.name}.{hashlib.sha256(identity.encode()).hexdigest()[:8]}{UNPACKED}")


def _uncompressed(path: Path, beside: Path) -> Path:
    """Return the path of an uncompressed tar, whose members can be read in any order.

    Returns ``path`` itself, or an unpacked copy ``beside`` the store if the tar is compressed.
    """
    with path.open("rb") as file:
        magic = file.read(6)
    opener = next((module for start, module in COMPRESSED.items() if magic.startswith(start)), None)
    if opener is None:
        return path
    copy = _copy_of([path], beside)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_whole(copy) as out, opener.open(path) as packed:
                shutil.copyfileobj(packed, out, 2**20)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # not about the archive
                raise
            raise UserError(f"source={path} is damaged: {error}", "download it again") from None
    return copy
