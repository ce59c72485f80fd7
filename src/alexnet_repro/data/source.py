"""Find the images of a user's data set, with their classes and splits, without unpacking archives."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from alexnet_repro.data import devkit
from alexnet_repro.data.archives import UNPACKED, entries
from alexnet_repro.data.listing import Account, File
from alexnet_repro.data.years import YEAR, of_year
from alexnet_repro.errors import UserError, printable

# train, val and test, and the corresponding names of ImageNet archives and of folders in other data sets
SPLIT_NAME = re.compile(r"(?:ILSVRC\d{4}_(?:img|images)_)?(train|val|test)(?:ing|id|idation)?(?:_v\d+)?", re.IGNORECASE)
ANNOTATIONS = ("val_annotations.txt",)  # of Tiny ImageNet
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # where Kaggle's copy of ILSVRC-2012 holds the images
LABELS = "lists of labels and classes, which are used where needed"
LABEL_FILE = re.compile(r".*(_ground_truth|wnids|words|synsets?|synset_words|_annotations)\.txt|LOC_.*\.(csv|txt)")
HUGGING_FACE = re.compile(r"_n\d{8}(?=\.JPEG$)")  # what its names have in addition to ImageNet's
WNID = re.compile(r"n\d{8}(?=_)")


@dataclass
class Found:
    """Result of ``scan``: files with split and label, class names, and an account of everything else."""

    files: list[File]
    classes: list[str]
    held_out: str = ""
    class_numbers: list[int] | None = None  # in the development kit, if there are images to submit
    temporary: Path | None = None  # unpacked copy of the source; the caller removes it after reading the images
    account: Account = field(default_factory=Account)

    @property
    def ignored(self) -> list[str]:
        """What is left out, a line for each reason."""
        return self.account.lines()


def scan(
    path: Path,
    hold_out_every: int | None,
    beside: Path,
    hold_out_as: str = "val",
    hold_out_seed: int | None = None,
    year: int | None = None,
) -> Found:
    """Find the images of ``path``, with the class and the split of each, in an order that depends on their names only.

    The class of an image is the name of its folder or nested tar. For an image without a folder, the class is the
    WordNet ID at the beginning of the file name. The classes of ILSVRC's flat validation and test images come from the
    development kit in the same folder (ILSVRC2010 also requires ILSVRC2010_test_ground_truth.txt). ILSVRC's test images
    become the split ``unlabelled``, in the order of their names, if their labels are missing.

    Splits are folders or tars named train, val and test above the class folders. If the source has no split
    ``hold_out_as``, every ``hold_out_every``-th image of each class becomes that split (None: no image does), or, with
    ``hold_out_seed``, as many images drawn at random. A compressed tar is unpacked once, into a file
    ``beside`` a store, whose name begins with the store's. year: of ILSVRC; archives and numbered images of another year
    are left out.

    Raises UserError if the path is missing, if there are no images, if a class folder is empty, if a class has no
    training images, or if the source has another year or, without ``year``, several.
    """
    if not path.exists():
        raise UserError(f"there is nothing at source={path}")
    path = next((path / below for below in KAGGLE if (path / below).is_dir()), path)
    found = Found([], [])
    files, folders = _listed(path, beside, found.account)
    if not files:
        raise UserError(f"there are no files in {path}", "; ".join(found.ignored))
    files, folders = of_year(path, files, folders, year, found.account)
    files, folders = _below_common_root(files, folders)
    annotations = [file for file in files if PurePosixPath(file.name).name in ANNOTATIONS]
    files = _without_lists(files, found.account)
    _into_splits(files, found)
    _refuse_empty_classes(path, folders, files, found)
    if annotations:
        _read_tiny_imagenet(found, annotations[0])
    if not found.files:
        raise UserError(f"there are no images in {path}", "; ".join(found.ignored))
    found.temporary = files[0].path if files[0].path.name.endswith(UNPACKED) else None
    numbered = {file for file in found.files if (match := devkit.NUMBERED.fullmatch(file.name)) and match[2] == "test"}
    unlabelled: list[File] = []
    if numbered and devkit.truth(path, "test", YEAR.findall(min(numbered, key=_name).name)[0]) is None:
        unlabelled = [replace(file, split="unlabelled") for file in sorted(numbered, key=_name)]
        found.files = [file for file in found.files if file not in numbered]

    _refuse_same_names(path, found.files)
    labelled = [_class_of(file, path) for file in found.files]
    found.classes = sorted({name for file, name in labelled if file.split == "train"})
    if not found.classes:
        raise UserError(f"{path} has no training images", "set source to the folder that contains them")
    if len(found.classes) < 2:
        raise UserError(
            f"{path} has only one class: {found.classes[0]}", "set source to the folder that contains the class folders"
        )
    if unknown := sorted({name for _, name in labelled} - set(found.classes)):
        raise UserError(f"{len(unknown)} classes of {path} have no training images: {', '.join(unknown[:3])}")
    index = {name: i for i, name in enumerate(found.classes)}
    found.files = sorted((replace(file, label=index[name]) for file, name in labelled), key=_place)
    if hold_out_every and not any(file.split == hold_out_as for file in found.files):
        _hold_out(found, hold_out_every, hold_out_as, hold_out_seed)
    if unlabelled:
        found.files += unlabelled
        found.class_numbers = devkit.class_numbers(path, found.classes, YEAR.findall(unlabelled[0].name)[0])
    found.account.settle(len(found.files))
    return found


def _name(file: File) -> str:
    return file.name


def _place(file: File) -> tuple[Any, ...]:
    """Return what images are sorted by: ILSVRC's number, or else class and name, as when class folders are walked."""
    *above, name = file.name.split("/")
    name = HUGGING_FACE.sub("", name)
    if devkit.NUMBERED.fullmatch(name):
        return 0, name
    return 1, file.label, [(1, folder) for folder in above[1:]] + [(0, name)]


def _listed(path: Path, beside: Path, account: Account) -> tuple[list[File], set[str]]:
    """Return all files and folders of the source, with printable names in one Unicode form.

    Raises UserError if a folder exists twice, in two Unicode forms.
    """
    files, folders = [], set()
    forms: dict[str, str] = {}
    # ImageNet has 1.3 million files; a short listing shows no bar
    for entry in tqdm(entries(path, beside, account), f"listing {path}", unit=" files", delay=2, leave=False):
        name = entry if isinstance(entry, str) else entry.name
        if not (name.isascii() and name.isprintable()):
            raw, name = name, unicodedata.normalize("NFC", printable(name))
            if (form := forms.setdefault(name.rpartition("/")[0], raw.rpartition("/")[0])) != raw.rpartition("/")[0]:
                raise UserError(
                    f"the folder {name.rpartition('/')[0]} of {path} exists twice, in two Unicode forms "
                    f"({form!a} and {raw.rpartition('/')[0]!a})",
                    "move the images of one into the other",
                )
        if isinstance(entry, str):
            folders.add(name)
        else:
            files.append(entry if entry.name == name else replace(entry, name=name))
    return files, folders


def _refuse_same_names(path: Path, files: list[File]) -> None:
    """Raise UserError if a split has two images of one name, as when an archive lies beside its unpacked folder."""
    first: dict[tuple[str, str], File] = {}
    for file in files:
        if (other := first.setdefault((file.split, file.name), file)) is not file:
            raise UserError(
                f"{path} has {file.split}/{file.name} twice: in {other.path} and in {file.path}",
                "remove the archive or the folder that was unpacked from it",
            )


def _without_lists(files: list[File], account: Account) -> list[File]:
    """Leave out lists of labels and of bounding boxes."""
    kept = []
    for file in files:
        if file.name.endswith("_boxes.txt"):
            account.leave_out("lists of bounding boxes", file.name)
        elif LABEL_FILE.fullmatch(file.name.rpartition("/")[2]):
            account.leave_out(LABELS, file.name)
        else:
            kept.append(file)
    return kept


def _below_common_root(files: list[File], folders: set[str]) -> tuple[list[File], set[str]]:
    """Strip a root folder that contains all files, such as imagenette2/, from the names.

    A folder that is a split or the only class is kept.
    """
    while True:
        roots = {file.name.split("/", 1)[0] for file in files if "/" in file.name}
        root = roots.pop() if len(roots) == 1 else ""
        if not root or SPLIT_NAME.fullmatch(root) or all(file.name.count("/") < 2 for file in files):
            return files, folders
        files = [replace(file, name=file.name.removeprefix(root + "/")) for file in files]
        folders = {name.removeprefix(root + "/") for name in folders} - {""}


def _into_splits(files: list[File], found: Found) -> None:
    """Assign each file to the split that its top-level folder names.

    If no folders name splits, all images are train. If there are split folders, files outside them (ImageNet's test
    archive, bounding boxes, lists) are ignored and listed in the result. A class may be named train. Raises UserError
    for val/ or test/ without train/.
    """
    tops = Counter(file.name.split("/", 1)[0] for file in files if "/" in file.name)
    split_of = {top: match[1].lower() for top in tops if (match := SPLIT_NAME.fullmatch(top))}
    if split_of and "train" not in split_of.values():
        raise UserError(f"there is no folder train/ beside {', '.join(sorted(split_of))}/")
    if (
        len(set(split_of.values())) < 2
        and set(split_of) != set(tops)
        and any(_is_class(top, files) for top in split_of)
    ):
        split_of = {}
    twice = {  # ILSVRC2010_images_val.tar contains a folder val
        top: f"{top}/{split}/"
        for top, split in split_of.items()
        if all(file.name.startswith(f"{top}/{split}/") for file in files if file.name.startswith(f"{top}/"))
    }
    for file in files:
        top = file.name.split("/", 1)[0]
        if "/" not in file.name and tops:
            found.account.leave_out("files beside the folders", file.name)
        elif not split_of:
            found.files.append(replace(file, split="train"))
        elif top in split_of:
            found.files.append(
                replace(file, split=split_of[top], name=file.name.removeprefix(twice.get(top, f"{top}/")))
            )
        else:
            found.account.leave_out(f"files in {top}/, beside the splits", "")


def _is_class(folder: str, files: list[File]) -> bool:
    """Return whether a folder named like a split is a class: it holds images, and neither folders nor WordNet IDs."""
    inside = [file.name.removeprefix(f"{folder}/") for file in files if file.name.startswith(f"{folder}/")]
    return any("/" not in name and not WNID.match(name) for name in inside)


def _refuse_empty_classes(path: Path, folders: set[str], files: list[File], found: Found) -> None:
    """Raise UserError for an empty folder that is in the place of a class of training images, or has the name of one.

    Other empty folders hold no images either way.
    """
    filled = {parent.as_posix() for file in files for parent in PurePosixPath(file.name).parents}
    classes = {file.name.split("/", 1)[0] for file in found.files if file.split == "train" and "/" in file.name}
    has_splits = any(file.split != "train" for file in found.files) or any(
        SPLIT_NAME.fullmatch(name.split("/")[0]) for name in filled if "/" in name
    )
    empty = []
    for folder in sorted(name.rstrip("/") for name in folders):
        *above, name = folder.split("/")
        split = SPLIT_NAME.fullmatch(above[0]) if len(above) == 1 else None
        expected = (split[1].lower() == "train" or name in classes) if split else not (above or has_splits)
        if folder not in filled and expected:
            empty.append(folder)
    if empty:
        raise UserError(
            f"{len(empty)} class folders of {path} hold no images: {', '.join(empty[:3])}",
            "add images to these folders, or remove them",
        )


def _class_of(file: File, source: Path) -> tuple[File, str]:
    folder, _, name = file.name.partition("/")
    if name:
        return file, folder
    name = file.name
    if match := WNID.match(name):
        return file, match[0]
    if devkit.NUMBERED.fullmatch(name):
        return file, devkit.class_of(name, source)
    raise UserError(
        f"{file.name} of {source} is in no class folder",
        "put each class's images into a folder named after the class (train/CLASS/..., val/CLASS/...)",
    )


def _read_tiny_imagenet(found: Found, annotations: File) -> None:
    """Give the val images of Tiny ImageNet the classes of val_annotations.txt, and leave out its unlabelled test images.

    The class of its training images is the folder above images/, as everywhere.
    """
    lines = (line.split("\t") for line in annotations.read_bytes().decode().splitlines())
    class_of = {parts[0]: parts[1] for parts in lines if len(parts) > 1}
    files, test = [], 0
    for file in found.files:
        name = PurePosixPath(file.name).name
        if file.split == "val" and name in class_of:
            files.append(replace(file, name=f"{class_of[name]}/{name}"))
        elif file.split == "test" and file.name.startswith("images/"):
            test += 1
        else:
            files.append(file)
    found.files = files
    if test:
        found.account.leave_out("test images without labels", "", test)


def _hold_out(found: Found, every: int, split: str, seed: int | None) -> None:
    of_class: dict[int, list[int]] = {}
    for number, file in enumerate(found.files):
        if file.split == "train":
            of_class.setdefault(file.label, []).append(number)
    for label, numbers in of_class.items():
        order = range(len(numbers))
        if seed is not None:
            order = np.random.Generator(np.random.Philox(key=(seed, label))).permutation(len(numbers)).tolist()
        for place in order[every - 1 :: every]:
            found.files[numbers[place]] = replace(found.files[numbers[place]], split=split)
    count = sum(file.split == split for file in found.files)
    if not count:
        found.held_out = f"no image: no class has the {every} images of which one would be held out for {split}"
        return
    drawn = "" if seed is None else f", drawn with seed {seed},"
    found.held_out = (
        f"the source has no {split} split: one of {every} images of each class{drawn} became it ({count} images)"
    )
