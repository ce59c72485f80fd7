"""Write files whole or not at all, and let one process at a time make a file or folder."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno is None and re.search(r"requested and \d+ written|Not enough free space", str(error)):  # numpy's
            raise OSError(errno.ENOSPC, str(error), str(path)) from None
        error.filename = error.filename or str(path)
        raise
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def one_process_at_a_time(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Hold the lock PATH.lock, in a folder that is created if needed, while ``path`` is made.

    Raises InUse, with what is wrong and what to do, if another process holds it, and UserError if the file is another's.
    """
    file = path.with_name(path.name + ".lock")
    if file.is_file() and file.stat().st_size:
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
