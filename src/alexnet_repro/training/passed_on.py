"""What a run passes on to Lightning: options of its Trainer by its own names, loggers and callbacks."""

from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig

from alexnet_repro.composition import instances
from alexnet_repro.configs import plain
from alexnet_repro.errors import UserError, needed
from alexnet_repro.options import Trainer

# Options of Lightning's Trainer that this package sets itself, and what to use instead.
OURS = {
    "max_epochs": "set epochs=N",
    "min_epochs": "set epochs=N",
    "logger": "choose logger=NAME",
    "callbacks": "choose callbacks=NAME",
    "num_nodes": "set trainer.nodes=N",
    "strategy": "choose placement=NAME and placement.replicas=N",
    "plugins": "choose placement=NAME and trainer.precision=NAME",
    "default_root_dir": "set run=FOLDER",
    "enable_checkpointing": "checkpoints are always written; trainer.checkpoint_minutes=N says how often",
    "use_distributed_sampler": "each process takes its part of a batch by itself",
    "reload_dataloaders_every_n_epochs": "the images change only with schedule.by_hand.val_joins_after",
    "fast_dev_run": "train on a part of the images: data.train_per_class=N epochs=1",
    "overfit_batches": "train on a part of the images: data.train_per_class=N",
    "limit_predict_batches": "all images are measured",
    "limit_test_batches": "all images are measured",
    "barebones": "leave it out",
}


def refuse_unknown_options(cfg: DictConfig) -> None:
    """Raise UserError for trainer.X=... that Lightning's Trainer does not have, or that this package sets itself."""
    names = list(signature(L.Trainer).parameters)
    for name in trainer_options(cfg):
        if name in OURS:
            raise UserError(f"trainer.{name} can't be set", OURS[name])
        if name not in names:
            near = get_close_matches(name, [*Trainer.model_fields, *names], 1)
            raise UserError(
                f"there is no option 'trainer.{name}', here or in Lightning {L.__version__}",
                f"did you mean trainer.{near[0]}?" if near else "see the arguments of lightning.Trainer",
            )


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """Return the options that a run passes on to Lightning's Trainer, by Lightning's names."""
    return {name: value for name, value in plain(cfg.trainer).items() if name not in Trainer.model_fields}


def own_callbacks(cfg: DictConfig) -> list[Callback]:
    """Return the callbacks of callbacks=NAME. Raise UserError if one cannot be made."""
    return _of_kind(instances(cfg.callbacks, "callbacks"), Callback, "callbacks")


def other_loggers(cfg: DictConfig, run: Path) -> list[Logger]:
    """Return the loggers of logger=NAME besides metrics.csv and W&B. Raise UserError if one cannot be made."""
    loggers: list[Logger] = []
    if cfg.logger.get("tensorboard"):
        needed("tensorboard", "logger=tensorboard", "tensorboard")
        loggers.append(TensorBoardLogger(run, name="", version="tensorboard"))
    return [*loggers, *_of_kind(instances(cfg.logger, "logger"), Logger, "logger")]


def _of_kind(made: list[Any], kind: type, name: str) -> list[Any]:
    for one in made:
        if not isinstance(one, kind):
            raise UserError(
                f"{name}: {type(one).__name__} is not a {kind.__name__} of Lightning", "name another _target_"
            )
    return made
