"""Check the options of a run, open its store, and build its classifier."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexnet_repro.claims.paper import read_claims
from alexnet_repro.composition import task_overrides
from alexnet_repro.configs import config_file, leaves, plain
from alexnet_repro.data.photos import prepare_photos
from alexnet_repro.data.split import part_of
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.launcher import refuse_placement
from alexnet_repro.training.passed_on import refuse_unknown_options
from alexnet_repro.training.schedule import scaled_epoch


def check(cfg: DictConfig) -> None:
    """Raise UserError for invalid or contradictory options."""
    refuse_unknown_options(cfg)
    for name in cfg.ablation:
        for key, value in _not_in_effect(cfg, config_file("ablation", name)):
            raise UserError(
                f"+ablation={name} is not in effect: it sets {key}={value}, but {key}={OmegaConf.select(cfg, key)} overrides it",
                "remove one of the two",
            )
    overridden = {override.partition("=")[0] for override in task_overrides()}
    given = dict(override.lstrip("+").split("=", 1) for override in task_overrides() if "=" in override)
    for key, value in given.items():
        if key == "ablation" and len(set(names := value.strip("[]").split(","))) < len(names):
            raise UserError(f"+ablation={value} names an ablation twice", "name each of them once")
        if key == "schedule" and value != "log":
            for option, usual in _not_in_effect(cfg, config_file("schedule", value), "schedule.by_hand."):
                if option not in overridden:
                    raise UserError(
                        f"schedule={value} is not in effect: data={cfg.data.name} has a schedule of its own",
                        f"choose other data, or set single options such as {option}={usual}",
                    )
    if "claim" in given and cfg.claim is not None and cfg.claim not in read_claims():
        raise UserError(f"there is no claim={cfg.claim}", "claims are named as in claims/paper.yaml; remove the option")
    if str(given.get("experiment")).startswith("one_cnn_pretrained") and "pretraining" not in given:
        raise UserError(
            f"+experiment={given['experiment']} has several steps",
            "add -m to run them all, or choose +pretraining=NAME",
        )
    if cfg.schedule.rule == "when_error_stalls" and "when_error_stalls" not in cfg.schedule:
        raise UserError(
            f"recipe={cfg.recipe} has no schedule.when_error_stalls", "choose schedule.rule=by_hand, or another recipe"
        )
    if late := [number for number in cfg.keep_epochs if number > cfg.epochs]:
        raise UserError(
            f"keep_epochs={list(cfg.keep_epochs)}: this run has {cfg.epochs} epochs", f"leave out {late[0]}"
        )
    refuse_placement(cfg, cfg.net)


def _not_in_effect(cfg: DictConfig, file: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (option, value) for each value of a config file, below ``prefix``, that is another in ``cfg``."""
    composed = dict(leaves(cfg))  # OmegaConf.select does not find keys that are numbers, as those of a schedule are
    for key, value in leaves(DictConfig(OmegaConf.load(file)), prefix):
        if composed.get(key) != value:
            yield key, value


def _to_prepare(cfg: DictConfig) -> str:
    """Return the command that prepares the store of ``cfg``."""
    usual = OmegaConf.load(config_file("data", cfg.data.name)).data
    own = [
        f"data.{key}={cfg.data[key]}"
        for key in ("image_size", "store", "train_per_class", "val_per_class")
        if cfg.data.get(key) != usual.get(key)
    ]
    source = ["source=PATH"] if cfg.data.source == "yours" else []
    return " ".join(["python -m alexnet_repro.prepare", f"data={cfg.data.name}", *source, *own])


def open_store(cfg: DictConfig) -> Store:
    """Open the store of the data set; prepare that of the embedded data set if it does not exist.

    Raises UserError if the store is missing, or if it does not fit the net or the schedule.
    """
    path = Path(str(cfg.data.store))
    if cfg.data.source == "embedded" and not path.exists():
        prepare_photos(cfg)
    try:
        store = Store(path)
    except UserError as error:
        if path.exists():
            raise
        raise UserError(error.problem, f"make it with: {_to_prepare(cfg)}") from None
    if store.image_size != cfg.data.image_size:
        raise UserError(
            f"the images of {path} are {store.image_size}x{store.image_size}, this net's data is {cfg.data.image_size}x{cfg.data.image_size}",
            "choose another store with data.store=PATH",
        )
    for split in ("train", store.watched_split):
        store.split(split)
    if joining_epoch(cfg) and not store.has("val"):
        raise UserError(
            f"{path} has no validation images, which this protocol trains on after {joining_epoch(cfg)} epochs",
            "prepare the store again with overwrite=true (CIFAR-10's batch 5 is its val split), or set schedule.by_hand.val_joins_after=null",
        )
    if store.watched_split != "val" and cfg.schedule.rule == "when_error_stalls":
        raise UserError(
            f"{path} has no validation images, and schedule.rule=when_error_stalls must not follow the error of test images",
            "choose schedule.rule=by_hand or constant, or recipe=cuda_convnet",
        )
    for split in ("train", "val") if cfg.data.source == "embedded" else ():
        wanted = cfg.data.get(f"{split}_per_class")
        if wanted and (found := len(store.split(split))) != wanted * len(store.classes):
            raise UserError(
                f"{path} has {found} {split} images, not {wanted} for each of the {len(store.classes)} classes",
                f"make it again with: {_to_prepare(cfg)} overwrite=true; or keep it, and add data.store=PATH for another",
            )
    train = store.split("train")
    per_class = part_per_class(cfg)
    count = len(train) if per_class is None else len(part_of(train, per_class, cfg.seed))
    if cfg.batch_size > count:
        raise UserError(
            f"batch_size={cfg.batch_size}, but {path} has only {count} training images"
            + (f" with data.train_per_class={per_class}" if per_class else ""),
            f"use at most batch_size={count}",
        )
    return store


def part_per_class(cfg: DictConfig) -> int | None:
    """Return how many training images of each class are used, or None for all. The embedded data is made with its number."""
    return None if cfg.data.source == "embedded" else cfg.data.get("train_per_class")


def joining_epoch(cfg: DictConfig) -> int | None:
    """Return the epoch after which validation images join the training images, or None for never.

    The epoch is scaled to the length of the run, as those of the schedule are.
    """
    by_hand = cfg.schedule.by_hand
    joins = by_hand.val_joins_after
    if cfg.schedule.rule == "when_error_stalls" or joins is None:
        return None
    return scaled_epoch(joins, cfg.epochs, by_hand.of_epochs)


def new_classifier(cfg: DictConfig, store: Store) -> Classifier:
    """Build the classifier with its initial weights; its checkpoints hold the options as plain values.

    Raises UserError for values that the net, the optimizer or the schedule cannot use.
    """
    options = plain(cfg)
    if cfg.net.get("image_size", cfg.augment.crop) != cfg.augment.crop:
        raise UserError(
            f"augment.crop={cfg.augment.crop}: net.image_size={cfg.net.image_size} takes patches of another size",
            "set only augment.crop, and net.image_size follows",
        )
    try:
        model = Classifier(
            net={**options["net"], "classes": len(store.classes)},
            optim=options["optim"],
            schedule=options["schedule"],
            augment=options["augment"],
            epochs=cfg.epochs,
            image_size=store.image_size,
            class_names=store.classes,
            seed=cfg.seed,
            mean=store.mean,
            covariance=store.covariance,
        )
        model.configure_optimizers()  # raises ValueError for invalid options
    except ValueError as error:
        raise UserError(str(error)) from None
    return model
