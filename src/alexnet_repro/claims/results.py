"""Read results, and the scores of each test image that are kept beside them."""

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from alexnet_repro.claims.scores import Errors, read_kernels, read_scores
from alexnet_repro.errors import UserError

Read = TypeVar("Read")


class Result(TypedDict, total=False):
    """Result of a run, an ensemble or a benchmark, as returned by read_results.

    Errors are in percent, losses in nats.
    """

    file: str
    recipe: str
    ablation: str
    experiment: str | None
    pretraining: str | None  # step of a chain in conf/pretraining
    scale: str  # of the experiment, as in conf/scale
    options: list[str]
    data: str
    source: str | None
    images_sha256: str  # of the store
    split: str
    images: int
    held_out: str | None
    net: str
    activation: str
    lrn: bool
    seed: int
    seeds: list[int]  # ensembles only
    members: int
    lr: float | None  # None for an ensemble of nets that differ in it
    batch_size: int | None
    epochs: int
    of_epochs: int | None
    steps: int
    precision: str
    tf32: bool
    placement: str
    centre: Errors
    ten_crop: Errors
    nine_crop: Errors
    train_sample: dict[str, float]
    left_plateau: int | None
    classes: int
    train_images: int
    colour_content: list[float]
    history: list[dict[str, Any]]
    retrieval: dict[str, Any]
    seconds: float
    hardware: str
    machine: str
    commit: str | None
    command: str
    ratios: dict[str, float | None]  # benchmarks only
    images_per_s: dict[str, float]


# What results must have to be read; they have more.


class _Errors(TypedDict):
    top1_error: float
    top5_error: float
    log_loss: NotRequired[float]


class _Epoch(TypedDict):
    epoch: int
    steps: int
    lr: float
    train_error: float
    train_loss: float


class _Mean(TypedDict):
    value: float
    low: float
    high: float


class _Gain(TypedDict):
    view: Literal["centre", "ten_crop", "nine_crop"]
    top1_error: _Mean


class _Run(TypedDict):
    recipe: str
    ablation: str
    data: str
    net: str
    seed: int
    epochs: int
    centre: _Errors
    ten_crop: NotRequired[_Errors]
    nine_crop: NotRequired[_Errors]
    train_sample: NotRequired[_Errors]
    history: NotRequired[list[_Epoch]]
    gain: NotRequired[_Gain]


class _Benchmark(TypedDict):
    machine: str
    command: str
    ratios: dict[str, float | None]
    images_per_s: dict[str, float]


class _Retrieval(TypedDict):
    queries: int
    images: int
    same_class: dict[str, float]


_SHAPES: dict[str, tuple[TypeAdapter[Any], ...]] = {  # by a field that only results of this kind have
    "run": (),  # another measurement of a run, whose own result has the facts
    "centre": (TypeAdapter(Result), TypeAdapter(_Run)),
    "ratios": (TypeAdapter(_Benchmark),),
    "same_class": (TypeAdapter(_Retrieval),),
}


# Fields that must be equal for results to be compared seed by seed, except those that the claim itself varies.
SHARED_KEYS = (
    "data",
    "split",
    "images",
    "held_out",
    "images_sha256",
    "net",
    "experiment",
    "scale",
    "recipe",
    "epochs",
    "batch_size",
    "lr",
    "precision",
    "tf32",
    "options",
)


def shared_key(result: Result) -> tuple[Any, ...]:
    """Return the fields SHARED_KEYS of a result, which comparable results have in common."""
    facts = {**result, "options": options_of(result)}
    return tuple(facts.get(key) for key in SHARED_KEYS)


RELEASES = {"ilsvrc2012": (1000, 1_281_167), "ilsvrc2010": (1000, 1_261_406)}  # classes and training images


def options_of(result: Result) -> str:
    """Return the options of a result, and in how many classes and training images its data is a part of a release."""
    told = list(result.get("options", ()))
    facts: Any = result
    for key, of_all in zip(("classes", "train_images"), RELEASES.get(str(result.get("data")), ()), strict=False):
        if facts.get(key, of_all) != of_all:
            told.append(f"{key}={facts[key]}")
    return " ".join(told)


def read_results(*folders: Path) -> list[Result]:
    """Read all results in these files and folders, recursively.

    Each result gets a "file" field with its path, and a "retrieval" field if a retrieval.json lies beside result.json, or
    NAME-retrieval.json beside NAME.json. If several folders contain the same run, only the first copy is kept. Raises
    UserError for a damaged result.
    """
    results: dict[Any, Result] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]:
            if path.name.endswith("retrieval.json") or path.name.startswith(("evaluation-", "job-")):
                continue
            of_run = path.name == "result.json" and (path.parent / "config.yaml").is_file()
            content = read_result(path, "centre" if of_run else None)
            if not isinstance(content, dict) or "run" in content or not ("centre" in content or "ratios" in content):
                continue
            if "experiment" not in content and (named := re.search(r"\+experiment=(\w+)", content.get("command", ""))):
                content["experiment"] = named[1]  # for results written before this field existed
            if "centre" in content:
                # for results written before these fields existed
                content = {"scale": "full", "tf32": False, "images_sha256": content.get("store_sha256"), **content}
                content["options"] = [
                    # runs that start from the nets of their own seeds have equal options
                    re.sub(rf"(?<=seed-){content['seed']}\b", "N", option) if "pretrained.run=" in option else option
                    for option in content.get("options", ())
                ]
                if "hardware" in content:
                    content["hardware"] = re.sub(r"\b1 threads", "1 thread", content["hardware"])
            of = "" if path.name == "result.json" else f"{path.stem}-"
            if (retrieval := path.with_name(f"{of}retrieval.json")).is_file():
                content["retrieval"] = read_result(retrieval, "same_class")
            own = ("ablation", "seed", "seeds", "checkpoint", "commit", "seconds", "machine", "command")
            key = (*(str(content.get(k)) for k in (*SHARED_KEYS, *own)), "ten_crop" in content)
            results.setdefault(key, {**content, "file": str(path)})
    return list(results.values())


def read_result(path: Path, kind: str | None = None) -> Any:
    """Read one result: of the given kind, a key of _SHAPES, or by default of the kind that its fields show.

    Raises UserError if it is damaged, lacks a field that results of its kind have, or has a field of the wrong type.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        remedy = "repair or remove this file"
        if path.name == "result.json":
            remedy += "; train with resume=true then measures the run again, if its checkpoints are there"
        raise UserError(f"{path} is damaged: {error}", remedy) from None
    kind = kind or next((key for key in _SHAPES if isinstance(content, dict) and key in content), None)
    for shape in _SHAPES[kind] if kind else ():
        try:
            shape.validate_python(content, strict=True)
        except ValidationError as error:
            wrong = [(".".join(map(str, one["loc"])), one["type"], one["msg"]) for one in error.errors()]
            if missing := [where for where, problem, _ in wrong if problem == "missing"]:
                raise UserError(f"{path} lacks {', '.join(missing)}", "repair or remove it") from None
            where, _, problem = wrong[0]
            problem = f"{where}: {problem.replace('Input', 'it')}".removeprefix(": ")
            raise UserError(f"{path} is not a result: {problem}", "repair or remove it") from None
    return content


def scores_of(result: Result, view: str) -> NDArray[np.float64] | None:
    """Return the score of each test image for one view, (N, 3), or None if the scores were not saved.

    The columns are those of scores.read_scores. Raises UserError if the file is damaged.
    """
    return (_beside(result, read_scores) or {}).get(view)


def differences_by_image(
    pairs: Sequence[tuple[Result, Result]], view: str, other_view: str | None = None
) -> NDArray[np.float64] | None:
    """Return the first result's scores of each test image minus the second's, for each pair: (pairs, N, 3).

    view: of the first result. other_view: of the second; None: the same.

    Returns None if the scores of any result were not saved, or if results have different numbers of images.
    """
    saved = [(scores_of(one, view), scores_of(other, other_view or view)) for one, other in pairs]
    scores = [own for pair in saved for own in pair if own is not None]
    if len(scores) < 2 * len(pairs) or len({own.shape for own in scores}) > 1:
        return None
    return np.stack([one - other for one, other in zip(scores[::2], scores[1::2], strict=True)])


def kernels_of(result: Result) -> NDArray[np.float32] | None:
    """Return the first layer's kernels, (maps, 3, h, w), or None if they were not saved.

    Raises UserError if the file is damaged.
    """
    return _beside(result, read_kernels)


def _beside(result: Result, read: Callable[[Path], Read]) -> Read | None:
    """Read the file beside a result: predictions.npz for result.json, and NAME.npz for NAME.json."""
    if not result.get("file"):
        return None
    file = Path(result["file"])
    path = file.with_name("predictions.npz") if file.name == "result.json" else file.with_suffix(".npz")
    if not path.is_file():
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}", "repair or remove it") from None


def label(result: Result) -> str:
    """Describe a run in a few words."""
    parts = [result["recipe"], result["net"], result["ablation"], result["data"], *result.get("options", ())]
    if result["net"] != "alexnet":
        parts.append(f"rate {result.get('lr')}")
    parts.append(f"mean of {result['members']} nets" if "members" in result else f"seed {result['seed']}")
    return ", ".join(part for part in parts if part not in ("none", "alexnet"))
