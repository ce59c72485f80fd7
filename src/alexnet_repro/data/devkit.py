"""Labels of ILSVRC's numbered validation and test images, from the development kit and the lists beside its archives."""

import re
import tarfile
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path

import scipy.io

from alexnet_repro.errors import UserError

NUMBERED = re.compile(r"ILSVRC(\d{4})_(val|test)_(\d{8})\.JPEG")
KITS = {"2010": "ILSVRC2010_devkit-1.0.tar.gz", "2012": "ILSVRC2012_devkit_t12.tar.gz"}
TRUTH = {"val": "validation_ground_truth.txt", "test": "test_ground_truth.txt"}


def class_of(name: str, source: Path) -> str:
    """Return the WordNet ID of an image whose name NUMBERED matches. Raise UserError if its label is not known."""
    year, split, number = NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]
    labels = _labels(source, split, year)
    if int(number) > len(labels):
        raise UserError(f"the labels of {source} end before {name}", f"get {TRUTH[split]} anew")
    return labels[int(number) - 1]


@cache
def _labels(source: Path, split: str, year: str) -> list[str]:
    """Return the WordNet IDs of ILSVRC's val or test images, in their order, from the development kit in ``source``."""
    kit, numbers = _kit(source), truth(source, split)
    if kit is None or numbers is None:
        raise UserError(
            f"the {split} images of {source} have no class folders",
            f"put the development kit beside them ({KITS.get(year, 'its archive')}): it says what they show",
        )
    meta = _from_kit(kit, "meta.mat")
    if meta is None:
        raise UserError(f"the development kit {kit} holds no meta.mat")
    synsets = scipy.io.loadmat(BytesIO(meta), squeeze_me=True, struct_as_record=False)["synsets"]
    wnid_of = {int(next(getattr(s, f) for f in s._fieldnames if f.endswith("_ID"))): str(s.WNID) for s in synsets}
    try:
        return [wnid_of[int(line)] for line in numbers.split()]
    except (ValueError, KeyError) as error:
        raise UserError(f"{TRUTH[split]} of {source} doesn't hold numbers of classes: {error}", "get it anew") from None


@cache
def truth(source: Path, split: str) -> bytes | None:
    """Return the list with a class number for each val or test image, or None if there is none."""
    beside = sorted(source.glob(f"*{TRUTH[split]}")) if source.is_dir() else []
    if beside:
        return beside[0].read_bytes()
    kit = _kit(source)
    return _from_kit(kit, TRUTH[split]) if kit else None


def _kit(source: Path) -> Path | None:
    return next(iter(sorted(source.glob("*devkit*"))), None) if source.is_dir() else None


def _from_kit(kit: Path, ending: str) -> bytes | None:
    if kit.is_dir():
        return next((path.read_bytes() for path in sorted(kit.rglob(f"*{ending}"))), None)
    try:
        with tarfile.open(kit) as tar:
            for member in tar:
                if member.name.endswith(ending) and (file := tar.extractfile(member)):
                    return file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"the development kit {kit} can't be read: {error}", "get it anew, or remove it") from None
    return None
