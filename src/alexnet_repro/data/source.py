"""Find the images of a user's data set, with their classes and splits, without unpacking archives."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from alexnet_repro.data import devkit
from alexnet_repro.data.archives import UNPACKED, File, entries, printable
from alexnet_repro.errors import UserError

# train, val and test, and the corresponding names of ImageNet archives and of folders in other data sets
SPLIT_NAME = re.compile(r"(?:ILSVRC\d{4}_(?:img|images)_)?(train|val|test)(?:ing|id|idation)?(?:_v\d+)?", re.IGNORECASE)
ANNOTATIONS = ("val_annotations.txt",)  # of Tiny ImageNet
WNID = re.compile(r"n\d{8}(?=_)")


@dataclass
class Found:
    """Result of ``scan``: files with split and label, class names, and notes on skipped files."""

    files: list[File]
    classes: list[str]
    held_out: str = ""
    class_numbers: list[int] | None = None  # in the development kit, if there are images to submit
    temporary: Path | None = None  # unpacked copy of the source; the caller removes it after reading the images
    ignored: list[str] = field(default_factory=list)


def scan(
    path: Path,
    hold_out_every: int | None,
    beside: Path,
    hold_out_as: str = "val",
    hold_out_seed: int | None = None,
) -> Found:
    """Find the images of ``path``, with the class and the split of each.

    The class of an image is the name of its folder or nested tar. For an image without a folder, the class is the
    WordNet ID at the beginning of the file name. The classes of ILSVRC's flat validation and test images come from the
    development kit in the same folder (ILSVRC2010 also requires ILSVRC2010_test_ground_truth.txt). ILSVRC's test images
    become the split ``unlabelled``, in the order of their names, if their labels are missing.

    Splits are folders or tars named train, val and test above the class folders. If the source has no split
    ``hold_out_as``, every ``hold_out_every``-th image of each class becomes that split (None: no image does), or, with
    ``hold_out_seed``, as many images drawn at random. A compressed tar is unpacked once, into a file
    ``beside`` a store, whose name begins with the store's.

    Raises UserError if the path is missing, if there are no images, if a class folder is empty, or if a class has no
    training images.
    """
    if not path.exists():
        raise UserError(f"there is nothing at source={path}")
    files, folders = [], set()
    skipped: list[str] = []
    # ImageNet has 1.3 million files; a short listing shows no bar
    for entry in tqdm(entries(path, beside, skipped), f"listing {path}", unit=" files", delay=2, leave=False):
        if isinstance(entry, str):
            folders.add(printable(entry))
        else:
            files.append(entry if entry.name.isascii() else replace(entry, name=printable(entry.name)))
    if not files:
        raise UserError(f"there are no files in {path}")
    files, folders = _below_common_root(files, folders)
    _refuse_empty_classes(path, folders, files)
    annotations = [file for file in files if PurePosixPath(file.name).name in ANNOTATIONS]
    boxes = [file for file in files if file.name.endswith("_boxes.txt")]
    left_out = {file.name for file in (*annotations, *boxes)}
    files = [file for file in files if file.name not in left_out]
    found = _into_splits(files)
    found.ignored += skipped
    if boxes:
        found.ignored.append(f"{len(boxes)} lists of bounding boxes")
    if annotations:
        _read_tiny_imagenet(found, annotations[0])
    found.temporary = files[0].path if files[0].path.name.endswith(UNPACKED) else None
    numbered = {file for file in found.files if (match := devkit.NUMBERED.fullmatch(file.name)) and match[2] == "test"}
    unlabelled: list[File] = []
    if numbered and devkit.truth(path, "test") is None:
        unlabelled = [replace(file, split="unlabelled") for file in sorted(numbered, key=lambda file: file.name)]
        found.files = [file for file in found.files if file not in numbered]

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
    found.files = [replace(file, label=index[name]) for file, name in labelled]
    if hold_out_every and not any(file.split == hold_out_as for file in found.files):
        _hold_out(found, hold_out_every, hold_out_as, hold_out_seed)
    if unlabelled:
        found.files += unlabelled
        found.class_numbers = devkit.class_numbers(path, found.classes)
    return found


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


def _into_splits(files: list[File]) -> Found:
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
    found = Found([], [])
    for file in files:
        top = file.name.split("/", 1)[0]
        if "/" not in file.name and tops:
            found.ignored.append(file.name)
        elif not split_of:
            found.files.append(replace(file, split="train"))
        elif top in split_of:
            found.files.append(
                replace(file, split=split_of[top], name=file.name.removeprefix(twice.get(top, f"{top}/")))
            )
    if split_of:
        found.ignored += [f"{top}/ ({count} files)" for top, count in tops.items() if top not in split_of]
    return found


def _is_class(folder: str, files: list[File]) -> bool:
    """Return whether a folder named like a split is a class: it holds images, and neither folders nor WordNet IDs."""
    inside = [file.name.removeprefix(f"{folder}/") for file in files if file.name.startswith(f"{folder}/")]
    return any("/" not in name and not WNID.match(name) for name in inside)


def _refuse_empty_classes(path: Path, folders: set[str], files: list[File]) -> None:
    filled = {parent.as_posix() for file in files for parent in PurePosixPath(file.name).parents}
    if empty := sorted(folder for folder in (name.rstrip("/") for name in folders) if folder not in filled):
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
        found.ignored.append(f"{test} test images without labels")


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
