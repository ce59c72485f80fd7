"""The options of each command, those of its config groups among them.

option_errors.py compares a composed config with this schema before a command does any work.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from alexnet_repro.options import (
    Activation,
    Augment,
    Checkpoint,
    Count,
    Data,
    Ensemble,
    Group,
    Logger,
    Name,
    Natural,
    OnlyIf,
    Optim,
    Placement,
    Positive,
    Pretrained,
    Processes,
    Schedule,
    Seed,
    Trainer,
    Watch,
    with_own_images,
)

not_verifying = OnlyIf(lambda cfg: not cfg.verify, "verify=true")


class Train(Group):
    """python -m alexnet_repro.train."""

    net: dict[str, Any]  # options.net_options has its schema
    schedule: Schedule
    recipe: Literal["paper", "as_run", "cuda_convnet"]
    scale: Literal["full", "proxy"]
    data: Data
    trainer: Trainer
    placement: Placement
    logger: Logger
    callbacks: dict[str, dict[str, Any]]
    batch_size: Count
    epochs: Count
    order: Literal["reshuffled", "fixed", "stored"]
    optim: Optim
    augment: Augment
    rates: dict[Activation, Positive] = Field(default_factory=dict)
    run: Name | None
    seed: Seed
    stop_at: Annotated[float, Field(ge=0, lt=100)] | None
    keep_epochs: list[Count]
    resume: bool
    dry_run: bool
    pretrained: Pretrained
    watch: Watch
    ablation: dict[str, str | None]
    claim: str | None


class Evaluate(Group):
    """python -m alexnet_repro.evaluate."""

    ensemble: Ensemble
    pretrained: Name = ""
    trainer: Trainer
    placement: Placement
    of: Name = ""
    run: Name | None
    runs: Name | list[Name] | None
    views: Literal["centre", "ten_crop", "nine_crop"]
    checkpoint: Checkpoint
    store: Name | None
    split: Literal["train", "val", "test", "unlabelled"] | None
    out: Name | None
    batch_size: Count


class Prepare(Group):
    """python -m alexnet_repro.prepare."""

    data: Data
    batch_size: Any = None  # of data=photos, like the next three
    epochs: Any = None
    optim: Any = None
    schedule: Any = None
    source: Annotated[Name | None, not_verifying, with_own_images]
    overwrite: Annotated[bool, not_verifying]
    verify: bool
    max_bad: Annotated[Natural, not_verifying, with_own_images]
    encoding: Annotated[Literal["raw", "jpeg"], not_verifying, with_own_images]
    workers: Annotated[Annotated[Processes, Field(ge=1)] | None, not_verifying, with_own_images]


class Report(Group):
    """python -m alexnet_repro.report."""

    trainer: Trainer
    placement: Placement
    logger: Logger
    runs: Name | list[Name] | None
    results: Name | None
    out: Name
    readme: bool
    images: Count | None
    similarity: Natural
    batch_size: Count


class Bench(Group):
    """python -m alexnet_repro.bench."""

    trainer: Trainer
    only: Literal["prepare", "loader", "step", "eval", "placement", "memory"] | None
    out: Name | None
    repeats: Count
    batch_size: Count


class Features(Group):
    """python -m alexnet_repro.features."""

    run: Name | None
    checkpoint: Checkpoint
    source: Name | None
    split: Literal["train", "val", "test"] | None
    layers: Annotated[list[str], Field(min_length=1)]
    per_tower: bool
    out: Name | None
    batch_size: Count
    device: str | None
    at_chance: bool


class Export(Group):
    """python -m alexnet_repro.export."""

    run: Name | None
    checkpoint: Checkpoint
    format: Literal["safetensors", "onnx", "torchscript", "hub"]
    out: Name | None
    at_chance: bool


class Convert(Group):
    """python -m alexnet_repro.convert."""

    source: Name | None
    mean: Any
    classes: Name | None
    store: Name
    run: Name | None


class Compare2012(Group):
    """python -m alexnet_repro.compare_2012."""

    source: Name | None
    layers: Name
    mistakes: Name | None
    out: Name | None


COMMANDS: dict[str, type[Group]] = {
    "train": Train,
    "evaluate": Evaluate,
    "prepare": Prepare,
    "report": Report,
    "bench": Bench,
    "features": Features,
    "export": Export,
    "convert": Convert,
    "compare_2012": Compare2012,
}
OTHERS = rf"(?!({'|'.join(Trainer.model_fields)})$).*"  # options of Lightning's Trainer
# Options that a command shares with others through a config group, but does not use.
UNUSED = {
    "train": r"data\.hold_out_(every|as|seed)",
    "evaluate": rf"trainer\.(checkpoint_minutes|compile|{OTHERS})",
    "prepare": r"batch_size|epochs|optim\..*|schedule\..*|data\.images_per_file",
    "report": rf"trainer\.(checkpoint_minutes|compile|{OTHERS})",
    "bench": r"trainer\.(?!accelerator).*",
    "features": "",
    "export": "",
    "convert": "",
    "compare_2012": "",
}
