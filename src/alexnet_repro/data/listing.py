"""The files of a source: where each lies, which of them are junk, and an account of all of them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alexnet_repro.errors import printable

LARGEST_FILE = 2**28  # bytes of an encoded image

# What file servers, backups and systems leave in folders of images
JUNK_FOLDERS = frozenset(
    name.lower()
    for name in (
        "__MACOSX", "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "@__thumb", "#recycle", "#snapshot", "lost+found",
        "$RECYCLE.BIN", "System Volume Information", "RECYCLER", "Network Trash Folder", "Temporary Items", "TheVolumeSettingsFolder",
        "__pycache__",
    )
)  # fmt: skip
JUNK_FILES = re.compile(
    r"thumbs\.db|ehthumbs\w*\.db|desktop\.ini|icon\r|SYNO(PHOTO|FILE|INDEX)_.*|.*@Syno(EAStream|Resource)|.*:Zone\.Identifier",
    re.IGNORECASE,
)
HIDDEN = "files and folders whose names begin with a dot"
THUMBNAILS = "thumbnails and other files of a file server or a system"


def junk(name: str) -> str:
    """Return why a file or folder of this name, without those above it, holds no image of the data set; "" if it may."""
    if name.startswith("."):
        return HIDDEN
    return THUMBNAILS if name.lower() in JUNK_FOLDERS or JUNK_FILES.fullmatch(name) else ""


@dataclass(frozen=True, slots=True)
class File:
    """An encoded image: bytes ``offset`` to ``offset + size`` of the file ``path``.

    source.scan sets ``split`` and ``label``. parts: of a sparse file in a tar, (position in the image, number of bytes)
    of each part that the tar holds, one after the other from ``offset`` on; all other bytes are zero.
    """

    name: str
    path: Path
    offset: int
    size: int
    split: str = ""
    label: int = -1
    parts: tuple[tuple[int, int], ...] | None = None

    def read_bytes(self) -> bytes:
        """Return the encoded image.

        Raise OSError if the file ends before the end of the image, or if the image is larger than LARGEST_FILE.
        """
        if self.size > LARGEST_FILE:
            raise OSError(f"it has {self.size} bytes, more than {LARGEST_FILE}")
        stored = self.size if self.parts is None else sum(length for _, length in self.parts)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(stored)
        if len(data) < stored:
            raise OSError(f"{self.path} ends after {len(data)} of {stored} bytes")
        if self.parts is None:
            return data
        whole, start = bytearray(self.size), 0
        for position, length in self.parts:
            whole[position : position + length] = data[start : start + length]
            start += length
        return bytes(whole)


@dataclass
class Account:
    """How many items a source holds, and how many of them are left out, by reason.

    An item is a file, a member of an archive, a row of a table, or a folder that is not entered. A reader counts an item
    when it comes upon it, and not when it decides what to do with it, so that ``settle`` finds items that were lost.
    """

    seen: int = 0
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)  # {reason: (number, the first name)}

    def leave_out(self, reason: str, name: str, number: int = 1) -> None:
        """Count items that are left out."""
        before, first = self.left_out.get(reason, (0, name))
        self.left_out[reason] = (before + number, first)

    def lines(self) -> list[str]:
        """Return a line for each reason."""
        return [
            f"{number:,} {reason}" + (f", such as {printable(first)}" if first else "")
            for reason, (number, first) in self.left_out.items()
        ]

    def settle(self, used: int) -> dict[str, Any]:
        """Return the account for the manifest. Raise RuntimeError if items are neither used nor left out."""
        numbers = {reason: number for reason, (number, _) in self.left_out.items()}
        if self.seen != used + sum(numbers.values()):
            raise RuntimeError(
                f"of {self.seen} items of the source, {used} are used and {sum(numbers.values())} left out: "
                "this is a fault of the program, which would lose images"
            )
        return {"seen": self.seen, "used": used, "left_out": numbers}
