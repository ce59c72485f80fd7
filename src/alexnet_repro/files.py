"""Write files whole or not at all, and let one process at a time make a file or folder."""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

from alexnet_repro.errors import InUse, UserError

MOST_YAML = 1_000_000  # bytes of a config.yaml; a run's has a few thousand


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at ``path`` only when the block ends without an error.

    The content is on the disk before the file appears, so that a power failure leaves either the old file or the new.
    """
    _remove_abandoned(path.parent)
    unfinished, descriptor = _temporary(path)
    try:
        with open(unfinished, "wb", opener=lambda *_: descriptor) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)  # while the file is locked, so that no other process takes it for abandoned
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno is None and re.search(r"requested and \d+ written|Not enough free space", str(error)):  # numpy's
            raise OSError(errno.ENOSPC, str(error), str(path)) from None
        error.filename = error.filename or str(path)
        raise
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


TEMPORARY = re.compile(r".+\.tmp\.[0-9a-f]{16}\.alexnet_repro")
_searched: set[Path] = set()  # folders in which this process has looked for abandoned temporary files


def _temporary(path: Path) -> tuple[Path, int]:
    """Create a file with an unguessable name beside ``path``, and lock it. Return its path and its descriptor.

    The file is new, so that neither a link nor a file of the user is written to.
    """
    stem = path.name.encode()[:200].decode("utf-8", "ignore")  # file systems allow names of 255 bytes
    while True:
        unfinished = path.with_name(f"{stem}.tmp.{secrets.token_hex(8)}.alexnet_repro")
        try:
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            error.filename = str(path)
            raise
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        if unfinished.exists():
            return unfinished, descriptor
        os.close(descriptor)  # another process removed it between its creation and its lock


def _remove_abandoned(folder: Path) -> None:
    """Remove, once per process, temporary files that killed processes of this user left: nobody holds their lock."""
    if folder in _searched or not folder.is_dir():
        return
    _searched.add(folder)
    for path in [Path(entry.path) for entry in os.scandir(folder) if TEMPORARY.fullmatch(entry.name)]:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                facts = os.fstat(descriptor)
                if stat.S_ISREG(facts.st_mode) and facts.st_uid == os.getuid() and facts.st_nlink == 1:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def one_process_at_a_time(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Hold the lock PATH.lock, in a folder that is created if needed, while ``path`` is made.

    Raises InUse, with what is wrong and what to do, if another process holds it, and UserError if the file is another's.
    """
    file = path.with_name(path.name + ".lock")
    if file.is_symlink() or (file.exists() and (not file.is_file() or file.stat().st_size)):
        raise UserError(f"{file} is not a lock of this program", f"move it, or choose another name than {path.name}")
    lock = FileLock(file, timeout=0)
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
                if is_new and not any(path.parent.iterdir()):  # nothing was made
                    path.parent.rmdir()
    except Timeout:
        raise InUse(problem, remedy) from None


def refuse_other_content(path: Path, mark: bytes, writer: str, remedy: str) -> None:
    """Raise UserError if ``path`` exists and isn't a file whose first 1000 bytes contain ``mark``.

    writer: what writes such files, for the message.
    """
    if path.exists():
        if path.is_file():
            with path.open("rb") as file:
                if mark in file.read(1000):
                    return
        raise UserError(f"{path} is not a file of an earlier {writer}", remedy)


LARGEST_JSON = 2**28  # bytes; the manifest of ImageNet's largest release has a few million


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raise ValueError if it is not JSON, too large or too deeply nested."""
    with path.open("rb") as file:
        return parse_json(file.read(LARGEST_JSON + 1))


def parse_json(content: bytes) -> Any:
    """Return what JSON holds. Raise ValueError if it is not JSON, too large or too deeply nested."""
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result as JSON, complete or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def plain_yaml(path: Path) -> Any:
    """Read a YAML file as plain values.

    Raises ValueError for what only a program needs, and a stranger's file may misuse: interpolations (${...}), aliases,
    which can stand for gigabytes, and files of more than MOST_YAML bytes. Raises OSError and YAMLError as usual.
    """
    if path.stat().st_size > MOST_YAML:
        raise ValueError(f"it has more than {MOST_YAML:,} bytes")
    text = path.read_text()
    if "${" in text:
        raise ValueError("it holds an interpolation, ${...}")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
        raise ValueError("it holds an alias")
    return yaml.safe_load(text)
