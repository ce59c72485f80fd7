"""Read the labels of ILSVRC's numbered validation and test images from the development kit, or from Kaggle's list."""

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
KAGGLE = "LOC_val_solution.csv"
TRUTH = {"val": "validation_ground_truth.txt", "test": "test_ground_truth.txt"}


def class_of(name: str, source: Path) -> str:
    """Return the WordNet ID of an image whose name matches NUMBERED.

    Raises UserError if its label is unknown.
    """
    year, split, number = NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]
    if split == "val" and (solution := _kaggle(source)):
        if name.removesuffix(".JPEG") not in solution:
            raise UserError(f"{KAGGLE} has no label of {name}", "download it again")
        return solution[name.removesuffix(".JPEG")]
    labels = _labels(source, split, year)
    if int(number) > len(labels):
        raise UserError(f"the labels of {source} end before {name}", f"download {TRUTH[split]} again")
    return labels[int(number) - 1]


@cache
def _kaggle(source: Path) -> dict[str, str]:
    """Return {image: its WordNet ID} of Kaggle's list, in or above ILSVRC/Data/CLS-LOC; empty if there is none.

    A line is an image and, for each box, a WordNet ID and four coordinates: ILSVRC2012_val_00000001,n01751748 111 108 411 344
    """
    folders = (source, *source.absolute().parents[:3])
    path = next((folder / KAGGLE for folder in folders if (folder / KAGGLE).is_file()), None)
    if path is None:
        return {}
    lines = (line.split(",") for line in path.read_text().splitlines()[1:])
    labels = {parts[0]: parts[1].split()[0] for parts in lines if len(parts) > 1 and parts[1].strip()}
    if not labels:
        raise UserError(f"{path} holds no labels", "download it again")
    return labels


@cache
def _labels(source: Path, split: str, year: str) -> list[str]:
    """Return the WordNet IDs of ILSVRC's val or test images in numbered order.

    The development kit in ``source`` maps class numbers to WordNet IDs. Raises UserError if the kit or the list of
    labels is missing or damaged.
    """
    kit, class_numbers = _kit(source, year), truth(source, split, year)
    if kit is None or class_numbers is None:
        raise UserError(
            f"the {split} images of {source} have no class folders",
            f"put the development kit with their labels into the same folder ({KITS.get(year, 'its archive')})",
        )
    wnid_of = _wnid_of(kit, year)
    try:
        return [wnid_of[int(line)] for line in class_numbers.split()]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{TRUTH[split]} of {source} doesn't hold numbers of classes: {error}", "download it again"
        ) from None


def class_numbers(source: Path, classes: list[str], year: str) -> list[int] | None:
    """Return the numbers that the development kit of this year in ``source`` gives to these classes (WordNet IDs).

    Returns None if there is no kit, or if it lacks one of them.
    """
    kit = _kit(source, year)
    numbers = {wnid: number for number, wnid in _wnid_of(kit, year).items()} if kit else {}
    return [numbers[name] for name in classes] if set(classes) <= set(numbers) else None


def _wnid_of(kit: Path, year: str) -> dict[int, str]:
    """Return {number of a class: its WordNet ID}.

    Raise UserError if the kit has no list of the classes, or the list of another year.
    """
    meta = _from_kit(kit, "meta.mat")
    if meta is None:
        raise UserError(f"the development kit {kit} contains no meta.mat")
    try:
        synsets = scipy.io.loadmat(BytesIO(meta), squeeze_me=True, struct_as_record=False)["synsets"]
        number = next(field for field in synsets[0]._fieldnames if field.endswith("_ID"))
        found = {int(getattr(synset, number)): str(synset.WNID) for synset in synsets}
    except Exception as error:  # scipy raises all kinds for damaged files
        raise UserError(f"meta.mat of {kit} can't be read: {error}", "download the development kit again") from None
    if (match := re.fullmatch(r"ILSVRC(\d{4})_ID", number)) and match[1] != year:
        raise UserError(
            f"the development kit {kit} is that of ILSVRC {match[1]}, and the images are those of {year}",
            f"put {KITS.get(year, 'the kit of that year')} into the same folder",
        )
    return found


@cache
def truth(source: Path, split: str, year: str) -> bytes | None:
    """Return the text file with a class number per val or test image of this year, or None if it is missing."""
    lists = sorted(source.glob(f"*{TRUTH[split]}")) if source.is_dir() else []
    lists = [path for path in lists if year_of(path.name) in (year, None)]
    if lists:
        return lists[0].read_bytes()
    kit = _kit(source, year)
    return _from_kit(kit, TRUTH[split]) if kit else None


def year_of(name: str) -> str | None:
    """Return the year in the name of a development kit or list, or None if it has none."""
    if match := re.match(r"ILSVRC(\d{4})", name):
        return match[1]
    return next((year for year, kit in KITS.items() if name == kit.split("_", 1)[1].removesuffix(".tar.gz")), None)


def _kit(source: Path, year: str) -> Path | None:
    """Return the development kit of this year in ``source``, else one whose name has no year, else None."""
    kits = sorted(source.glob("*devkit*")) if source.is_dir() else []
    return next((kit for wanted in (year, None) for kit in kits if year_of(kit.name) == wanted), None)


def _from_kit(kit: Path, ending: str) -> bytes | None:
    if kit.is_dir():
        return next((path.read_bytes() for path in sorted(kit.rglob(f"*{ending}"))), None)
    try:
        with tarfile.open(kit) as tar:
            for member in tar:
                if member.name.endswith(ending) and (file := tar.extractfile(member)):
                    return file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"the development kit {kit} can't be read: {error}", "download it again, or remove it"
        ) from None
    return None
