"""List the members of a tar, and of tars inside it, without unpacking them."""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from alexnet_repro.data.listing import Account, File, junk
from alexnet_repro.errors import UserError, printable
from alexnet_repro.files import written_whole

DEEPEST = 8  # tars inside each other
COMPRESSED: dict[bytes, tuple[str, Any]] = {
    b"\x1f\x8b": ("gzip", gzip), b"BZh": ("bzip2", bz2), b"\xfd7zXZ": ("xz", lzma),
}  # fmt: skip
OTHER_ARCHIVES = {
    b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "an empty zip archive", b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a rar archive", b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\x1f\x9d": "compressed with compress",
}  # fmt: skip


@dataclass
class _Contents:
    """What a tar holds, by the names of its members."""

    folders: list[str] = field(default_factory=list)
    files: dict[str, File] = field(default_factory=dict)
    links: list[tuple[str, str]] = field(default_factory=list)  # a name, and the name that it leads to


def members(
    path: Path, offset: int, end: int, prefix: str, account: Account, ours: bool = False, depth: int = 0
) -> Iterator[File | str]:
    """Yield the files and folders of the tar in bytes ``offset`` to ``end`` of ``path``, including those of nested tars.

    Tars that were joined are read one after the other. Of several members with one name, the last one counts. ours:
    whether the tar was written by this program, so that all of its members are images whatever their names.

    Raises UserError if the tar is cut or damaged, or if something else follows it.
    """
    named = f"the tar {prefix.rstrip('/')} in {path}" if prefix else f"the tar {path}"
    if depth > DEEPEST:
        raise UserError(f"{named} is one of more than {DEEPEST} tars inside each other", "unpack it")
    found = _Contents()
    with path.open("rb") as raw:
        start: int | None = offset
        while start is not None:
            start = _read(raw, path, start, end, named, found, account, ours, is_first=start == offset)
    lost: dict[str, str] = {}
    for name, target in found.links:
        if name in lost:
            account.leave_out(f"members of {named} replaced by later ones of the same name", name)
        lost[name] = target
    while resolved := [name for name, target in lost.items() if target in found.files]:  # also through another link
        for name in resolved:
            if name in found.files:  # a member that is no link has the same name
                account.leave_out(f"members of {named} replaced by later ones of the same name", name)
                lost.pop(name)
            else:
                found.files[name] = replace(found.files[lost.pop(name)], name=name)
    for name in lost:
        account.leave_out(f"links of {named} to files that are not in it", name)
    yield from (prefix + name for name in found.folders)
    for name, file in found.files.items():
        if name.lower().endswith(".tar") and not ours:
            refuse_compressed(path, file.offset, f"the tar {prefix}{name} in {path}")
            if file.parts is not None:
                raise UserError(f"the tar {prefix}{name} in {path} is stored as a sparse file", f"unpack {path}")
            account.seen -= 1  # its members count instead
            inner = f"{prefix}{name[:-4]}/"
            yield inner
            yield from members(path, file.offset, file.offset + file.size, inner, account, depth=depth + 1)
        else:
            yield replace(file, name=prefix + name)


def _read(
    raw: IO[bytes],
    path: Path,
    offset: int,
    end: int,
    named: str,
    found: _Contents,
    account: Account,
    ours: bool,
    is_first: bool,
) -> int | None:
    """Add the members of one tar to ``found``. Return where another tar begins, which was joined to it, or None."""
    count = 0
    raw.seek(offset)
    unknown = UserError(
        f"{named} is followed by something else, which is no tar", "download it again, or remove what follows it"
    )
    try:
        # ignore_zeros stays off, so that a nested tar ends at its own end-of-archive marker
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                count += 1
                _add(member, path, end, named, found, account, ours)
            position = tar.offset
    except (tarfile.TarError, RecursionError, OverflowError) as error:
        if not is_first:
            raise unknown from None
        raise UserError(f"{named} is damaged: {printable(str(error))}", "download it again") from None
    raw.seek(position)
    marker = raw.read(tarfile.BLOCKSIZE) if position + tarfile.BLOCKSIZE <= end else b""
    if marker != tarfile.NUL * tarfile.BLOCKSIZE:
        if not (is_first or count):
            raise unknown
        raise UserError(
            f"{named} is cut or damaged: after {count} files there is no end-of-archive marker", "download it again"
        )
    position += tarfile.BLOCKSIZE
    while position < end:
        block = raw.read(min(2**20, end - position))
        if not block:
            return None
        if rest := block.lstrip(tarfile.NUL):
            return position + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(block)
    return None


def _add(
    member: tarfile.TarInfo, path: Path, end: int, named: str, found: _Contents, account: Account, ours: bool
) -> None:
    name = PurePosixPath(member.name.lstrip("/")).as_posix()
    parts = PurePosixPath(name).parts
    reason = "" if ours or ".." in parts else next((why for part in parts if (why := junk(part))), "")
    if member.isdir():
        if parts and not reason and ".." not in parts:
            found.folders.append(name + "/")
        return
    account.seen += 1
    if ".." in parts:
        account.leave_out(f"members of {named} with names that lead out of it", member.name)
    elif reason:
        account.leave_out(reason, name)
    elif member.isfile():
        parts_of: Any = member.sparse  # a list of pairs, or None
        sparse = None if parts_of is None else tuple((start, length) for start, length in parts_of)
        stored = member.size if sparse is None else sum(length for _, length in sparse)
        if member.offset_data + stored > end or member.size < 0:
            raise UserError(f"{named} is cut: it ends inside {printable(name)}", "download it again")
        if name in found.files:
            account.leave_out(f"members of {named} replaced by later ones of the same name", name)
        found.files[name] = File(name, path, member.offset_data, member.size, parts=sparse)
    elif member.islnk():
        found.links.append((name, PurePosixPath(member.linkname.lstrip("/")).as_posix()))
    elif member.issym():
        found.links.append((name, os.path.normpath(PurePosixPath(name).parent / member.linkname)))
    else:
        account.leave_out(f"members of {named} that are neither files nor folders", name)


def is_tar(path: Path) -> bool:
    """Return whether a file is a tar, compressed or not."""
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, zlib.error, lzma.LZMAError):
        return True  # a damaged compressed tar; ``uncompressed`` reports it


def refuse_compressed(path: Path, offset: int, named: str) -> None:
    """Raise UserError if what is called a tar is another kind of archive."""
    with path.open("rb") as file:
        file.seek(offset)
        magic = file.read(6)
    kinds = {start: f"compressed with {name}" for start, (name, _) in COMPRESSED.items()} | OTHER_ARCHIVES
    if kind := next((kind for start, kind in kinds.items() if magic.startswith(start)), ""):
        raise UserError(f"{named} is {kind}, although its name ends in .tar", "unpack it first")


def other_archive(path: Path) -> str:
    """Return what kind of archive a file is that cannot be read, or ""."""
    with path.open("rb") as file:
        magic = file.read(6)
    return next((kind for start, kind in OTHER_ARCHIVES.items() if magic.startswith(start)), "")


def uncompressed(path: Path, copy: Path) -> Path:
    """Return the path of an uncompressed tar, whose members can be read in any order.

    Returns ``path`` itself, or ``copy``, which is written if it does not exist, if the tar is compressed.
    """
    with path.open("rb") as file:
        magic = file.read(6)
    opener = next((module for start, (_, module) in COMPRESSED.items() if magic.startswith(start)), None)
    if opener is None:
        return path
    refuse_foreign(copy)
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


def refuse_foreign(copy: Path) -> None:
    """Raise UserError if an unpacked copy, which an interrupted command left, may be somebody else's file."""
    if copy.is_symlink() or (copy.exists() and copy.stat().st_uid != os.getuid()):
        raise UserError(f"{copy} was not written by you", "remove it, or choose another data.store=PATH")
