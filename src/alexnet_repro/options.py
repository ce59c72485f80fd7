"""The options of each config group: their types, their ranges, and the conditions under which they have an effect.

The defaults are in conf/. command_options.py has the commands that these groups belong to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model


@dataclass(frozen=True)
class OnlyIf:
    """An option has no effect unless ``holds(cfg)``; ``otherwise`` names the option that prevents it."""

    holds: Callable[[Any], bool]
    otherwise: str
    remedy: str = "remove one of the two"


class Group(BaseModel):
    """Options without conversions between types, and without unknown names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


MOST, LARGEST = 2**31 - 1, 1e30  # what an int32 and, with room for products, a float32 can hold
Count = Annotated[int, Field(ge=1, le=MOST)]
OneOrTwo = Annotated[int, Field(ge=1, le=2)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Processes = Annotated[int, Field(ge=0, le=256)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]
# A name may look like a number on the command line.
Name = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
Activation = Literal["relu", "tanh", "abs_tanh", "sigmoid"]
Checkpoint = Annotated[str, Field(pattern=r"^(last|previous|best|epoch-\d+)$")]

with_lrn = OnlyIf(lambda cfg: cfg.net.get("lrn", True), "net.lrn=false")
with_colour_noise = OnlyIf(lambda cfg: cfg.augment.colour_noise > 0, "augment.colour_noise=0")
when_stalled = OnlyIf(lambda cfg: cfg.schedule.rule == "when_error_stalls", "schedule.rule={schedule.rule}")
by_hand = OnlyIf(lambda cfg: cfg.schedule.rule == "by_hand", "schedule.rule={schedule.rule}")
with_known_counts = OnlyIf(lambda cfg: cfg.data.get("classes") is not None, "data={data.name}")
with_own_images = OnlyIf(lambda cfg: cfg.data.source != "embedded", "data={data.name}")


class AlexNetOptions(Group):
    """conf/net/alexnet.yaml and the net of the recipes."""

    name: Literal["alexnet"]
    image_size: Count
    width: Positive
    towers: OneOrTwo
    communication: bool
    conv3: bool
    conv4: bool
    conv5: bool
    conv6: bool
    bottleneck: Annotated[int, Field(ge=0, multiple_of=2)]
    bias_init: Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
    activation: Activation
    lrn: bool
    lrn_n: Annotated[int, Field(ge=1), with_lrn]
    lrn_k: Annotated[Positive, with_lrn]
    lrn_alpha: Annotated[NotNegative, with_lrn]
    lrn_beta: Annotated[NotNegative, with_lrn]
    layer1_order: Annotated[Literal["relu_norm_pool", "norm_pool_relu"], with_lrn]
    lrn_across_towers: Annotated[bool, with_lrn]
    pool_first: Annotated[bool, with_lrn]
    same_map_norm: bool
    pooling: Literal["overlapping", "non_overlapping"]
    floor_pools: list[Literal["pool1", "pool2", "pool5"]]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    init: Literal["paper", "as_run"]


class FourLayerOptions(Group):
    """conf/net/four_layer.yaml."""

    name: Literal["four_layer"]
    image_size: Count
    activation: Activation
    same_map_norm: bool


class LocallyConnectedOptions(Group):
    """conf/net/locally_connected.yaml."""

    name: Literal["locally_connected"]
    image_size: Count
    activation: Activation
    lrn: bool
    norm: Annotated[Literal["n9", "n5_before_pools"], with_lrn]
    local3_maps: Count


NETS: dict[str, type[Group]] = {
    "alexnet": AlexNetOptions,
    "four_layer": FourLayerOptions,
    "locally_connected": LocallyConnectedOptions,
}


def net_options(name: str) -> type[Group]:
    """Return the schema of a net: one of NETS, or that of its keyword arguments for a net of one's own."""
    if name in NETS:
        return NETS[name]
    from alexnet_repro.net.build import parameters  # imports torch

    fields: Any = {
        key: (Any if parameter.annotation is parameter.empty else parameter.annotation, ...)
        for key, parameter in parameters(name).items()
        if key != "classes"
    }
    fields["name"] = (str, ...)
    return create_model(name, __base__=Group, **fields)


class Optim(Group):
    """The update rule (Section 5)."""

    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative
    bias_rate: NotNegative
    bias_decay: Annotated[bool, OnlyIf(lambda cfg: cfg.optim.weight_decay > 0, "optim.weight_decay=0")]
    decay_multiples: Annotated[
        dict[str, NotNegative] | None, OnlyIf(lambda cfg: cfg.optim.weight_decay > 0, "optim.weight_decay=0")
    ] = None


class WhenErrorStalls(Group):
    """The rule of the paper, with our numbers."""

    factor: Annotated[float, Field(gt=1, le=1000), when_stalled]
    times: Annotated[int, Field(ge=0, le=100), when_stalled]  # 1000 to the power of 100 is a float
    patience: Annotated[Count, when_stalled]
    threshold: Annotated[NotNegative, when_stalled]


GroupName = Literal["weights", "biases", "copied_weights", "copied_biases", "conv1_weights", "conv1_biases"]


class ByHand(Group):
    """A schedule in conf/schedule."""

    of_epochs: Annotated[Count, by_hand]
    colour_noise_epochs: Annotated[Natural | None, with_colour_noise]
    val_joins_after: Annotated[
        Natural | None, OnlyIf(lambda cfg: cfg.schedule.rule != "when_error_stalls", "schedule.rule={schedule.rule}")
    ]
    changes: Annotated[dict[GroupName, dict[int, NotNegative]], by_hand]


class Schedule(Group):
    """How the learning rate falls."""

    rule: Literal["when_error_stalls", "by_hand", "constant"]
    when_error_stalls: WhenErrorStalls | None = None
    by_hand: ByHand


class Augment(Group):
    """Data augmentation (Section 4.1)."""

    crop: Count
    random_crops: bool
    mirror: bool
    share: Annotated[
        Count,
        OnlyIf(
            lambda cfg: cfg.augment.random_crops or cfg.augment.mirror,
            "augment.random_crops=false and augment.mirror=false",
        ),
    ]
    mean: Literal["patch", "centre"]
    colour_noise: NotNegative
    colour_unit: Annotated[Literal["eigenvalue", "deviation"], with_colour_noise]
    colour_divisor: Annotated[Positive, with_colour_noise]
    colour_noise_epochs: Annotated[Natural | None, with_colour_noise]
    jitter: Annotated[float, Field(ge=0, le=1)]


class Data(Group):
    """A data set of conf/data."""

    name: Name
    claim: str | None = None
    source: Literal["embedded", "yours", "cifar10"]
    store: Name
    image_size: Count
    year: Count | None = None  # of ILSVRC
    classes: Count | None = None
    images: dict[Literal["train", "val", "test"], Count] | None = None
    subset: Annotated[bool, with_known_counts] = False
    hold_out_every: Annotated[Annotated[int, Field(ge=2)] | None, with_own_images] = None
    hold_out_as: Annotated[Literal["val", "test"], with_own_images] = "val"
    hold_out_seed: Annotated[Seed | None, with_own_images] = None
    images_per_file: Annotated[Count | None, OnlyIf(lambda cfg: cfg.get("order") == "stored", "order={order}")] = None
    train_per_class: Count | None = None
    val_per_class: Count | None = None


class Trainer(Group):
    """Device and precision (conf/trainer); others are options of Lightning's Trainer, which training.trainer checks."""

    model_config = ConfigDict(extra="allow", strict=True)

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    devices: Count | None
    nodes: Count
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]
    tf32: bool
    deterministic: bool
    compile: Annotated[
        Literal["off", "default", "graphs"], OnlyIf(lambda cfg: cfg.placement.devices == 1, "placement=two_devices")
    ]
    workers: Processes | None
    checkpoint_minutes: Positive
    keep_memory: bool


class Placement(Group):
    """Where the towers are (conf/placement)."""

    name: Literal["one_device", "two_devices"]
    devices: OneOrTwo
    replicas: Count


class Logger(Group):
    """conf/logger; other entries name a class of loggers with ``_target_``."""

    model_config = ConfigDict(extra="allow", strict=True)

    wandb: bool = False
    tensorboard: bool = False
    project: Name = ""
    entity: Name | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"


class Watch(Group):
    """What training.watch reports."""

    plateau_steps: Count
    every: Natural


with_pretrained = OnlyIf(lambda cfg: cfg.pretrained.run is not None, "pretrained.run=null")


class Pretrained(Group):
    """Layers that come from another run."""

    run: Name | None
    checkpoint: Annotated[Checkpoint, with_pretrained]
    layers: Annotated[list[str] | None, with_pretrained]
    rate: Annotated[NotNegative, with_pretrained]
    conv1_rate: Annotated[NotNegative, with_pretrained]


class Ensemble(Group):
    """The mean of several nets."""

    weights: Literal["equal", "search"]
