"""Check manifest.json of a store: its types, its ranges and its own checksum."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alexnet_repro.errors import UserError
from alexnet_repro.files import parse_json

FORMATS = {"raw": 1, "jpeg": 2}  # of the manifest, for each encoding
SHARD = 1024  # images per file, as in the data batches of the 2012 code
BY_NAME = "class and name"  # order of the images; earlier stores have the order of their source, and do not name it
AGAIN = "prepare the store again with overwrite=true"


class SplitFacts(BaseModel):
    """What the manifest says about one split."""

    model_config = ConfigDict(strict=True)

    count: Annotated[int, Field(ge=0)]
    shards: list[Annotated[int, Field(ge=0, le=SHARD)]]
    bytes: list[Annotated[int, Field(ge=0)]] | None = None  # of each file, with encoding=jpeg


Row = Annotated[list[float], Field(min_length=3, max_length=3)]


class Manifest(BaseModel):
    """Types and ranges of manifest.json."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    image_size: Annotated[int, Field(ge=1)]
    encoding: Literal["raw", "jpeg"] = "raw"
    jpeg_decoder: str = ""
    classes: Annotated[list[str], Field(min_length=1)]
    splits: dict[Literal["train", "val", "test", "unlabelled"], SplitFacts]
    class_numbers: list[int] | None = None  # ILSVRC's own numbers of the classes, for submissions
    covariance: Annotated[list[Row], Field(min_length=3, max_length=3)]
    sha256: dict[str, str]


def checked_manifest(content: bytes, path: Path) -> dict[str, Any]:
    """Return the content of manifest.json. Raise UserError if it is damaged or has another format."""
    try:
        manifest = parse_json(content)
    except ValueError as error:
        about = "nested too deeply" if "nested" in str(error) else "not JSON"
        raise UserError(f"{path} is damaged: it is {about}", AGAIN) from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is damaged: it holds no mapping", AGAIN)
    if manifest.get("format") != FORMATS.get(manifest.get("encoding", "raw")):
        raise UserError(
            f"the store at {path.parent} has format {manifest.get('format')}, this program reads {' and '.join(map(str, FORMATS.values()))}",
            AGAIN,
        )
    if "checksum" in manifest and manifest_checksum(manifest) != manifest["checksum"]:
        raise UserError(f"{path} is damaged: its own checksum is wrong", AGAIN)
    try:
        facts = Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {where}: {first['msg'].lower()}", AGAIN) from None
    for name, split in facts.splits.items():
        if sum(split.shards) != split.count:
            raise UserError(f"{path} is damaged: the files of {name} do not hold {split.count} images in all", AGAIN)
        if facts.encoding == "jpeg" and len(split.bytes or []) != len(split.shards):
            raise UserError(f"{path} is damaged: it does not give the length of each file of {name}", AGAIN)
    if facts.class_numbers is not None and len(facts.class_numbers) != len(facts.classes):
        raise UserError(f"{path} is damaged: it does not give a number to each class", AGAIN)
    if len(set(facts.classes)) < len(facts.classes):
        raise UserError(f"{path} is damaged: it names a class twice", AGAIN)
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own checksum."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
