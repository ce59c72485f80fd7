"""Compare what a source holds with the data set that ``data=`` names, before the first image is read."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from alexnet_repro.data.source import Found
from alexnet_repro.errors import UserError


def differences(found: Found, data: DictConfig) -> list[str]:
    """Return in what respects a source differs from the data set: its classes, or the images of a split.

    conf/data/NAME.yaml has the numbers, where they are known. Images that are held out count as train. A split that is
    missing counts only if nothing is held out in its place.
    """
    if not data.get("classes"):
        return []
    counts: dict[str, int] = {}
    for file in found.files:
        counts[file.split] = counts.get(file.split, 0) + 1
    expected = dict(data.get("images") or {})
    if found.held_out and data.hold_out_as in expected:
        del expected[data.hold_out_as]
        counts["train"] = counts.get("train", 0) + counts.pop(data.hold_out_as, 0)
    if data.source == "cifar10":  # batch 5 may be val, or among the training images
        expected["train"] += expected.pop("val")
        counts["train"] = counts.get("train", 0) + counts.pop("val", 0)
    told = [f"{len(found.classes):,} classes, not {data.classes:,}"] if len(found.classes) != data.classes else []
    told += [
        f"{counts.get(split, 0):,} {split} images, not {number:,}"
        for split, number in expected.items()
        if counts.get(split, 0) != number
    ]
    return told


def checked_identity(found: Found, data: DictConfig, source: Path) -> dict[str, Any]:
    """Return what the manifest says about a part of a data set: nothing if the source holds all of it.

    Raises UserError if it holds something else, unless data.subset=true asks for a part.
    """
    told = differences(found, data)
    if not told:
        return {}
    if not data.subset:
        left_out = "".join(f"\n  left out: {line}" for line in found.ignored[:5])
        raise UserError(
            f"{source} is not all of data={data.name}: it holds {'; '.join(told)}{left_out}",
            "set source to the whole data set, or name other data; for a part of it on purpose, add data.subset=true",
        )
    return {"subset": told}
