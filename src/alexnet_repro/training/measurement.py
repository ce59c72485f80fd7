"""Measure a trained net: predictions of a split, and their scores."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from alexnet_repro.claims.scores import VIEWS, errors, gathered, score
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.provenance import machine
from alexnet_repro.training.checkpoints import load_checkpoint
from alexnet_repro.training.classifier import Classifier

# Of each choice of views=, what is measured in one pass over the images.
MEASURED_WITH: dict[str, tuple[str, ...]] = {"centre": VIEWS[:1], "ten_crop": VIEWS[:2], "nine_crop": VIEWS}


SAMPLE = 10_000  # training images at most, evenly spaced, that a trained net is measured on as it is on test images


def predict(
    trainer: L.Trainer, model: Classifier, data: StoreData, views: tuple[str, ...] = VIEWS[:2]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict the images of ``data.predict_split``: labels (N,) and, by view, softmax (N, classes).

    One pass gives the centre patch and the ten crops, since the centre patch is the fifth of the ten.
    """
    model.predicted_views = views
    batches: Any = trainer.predict(model, datamodule=data)
    labels, *softmax = (torch.cat(column) for column in zip(*batches, strict=True))
    return labels, dict(zip(views, softmax, strict=True))


def measure(
    trainer: L.Trainer, model: Classifier, data: StoreData, views: tuple[str, ...] = VIEWS[:2]
) -> dict[str, Tensor]:
    """Score every image of ``data.predict_split``, over all processes: by view, (N, 3) as scores.score gives them."""
    labels, softmax = predict(trainer, model, data, views)
    return {view: gathered(score(p, labels), trainer) for view, p in softmax.items()}


def run_config(run: Path) -> DictConfig:
    """What a run was trained with. Raises UserError if that folder isn't a run's."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not the folder of a run", "give the folder that train made, such as run=runs/paper/seed-0"
        )
    return DictConfig(OmegaConf.load(run / "config.yaml"))


def load_run(run: Path, checkpoint: str = "last") -> tuple[Classifier, DictConfig]:
    """The trained net of a run's folder and its config. Raises UserError if the folder holds none."""
    trained = run_config(run)
    path = run / "checkpoints" / f"{checkpoint}.ckpt"
    if not path.is_file():
        raise UserError(
            f"{run} has no checkpoint '{checkpoint}'",
            "choose checkpoint=last or checkpoint=best, once an epoch is done",
        )
    load_checkpoint(path)  # says it if the file is damaged
    model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    return model, trained


def fitting_store(path: str, model: Classifier, run: Path) -> Store:
    """The store at that path. Raises UserError if it isn't of the kind that the run's net was trained on."""
    store = Store(path)
    if store.classes != model.class_names:
        raise UserError(
            f"the store {store.path} has other classes than the net of {run} was trained on", "choose store=PATH"
        )
    if store.image_size != model.image_size:
        raise UserError(f"the store {store.path} has images of another size than the net of {run} was trained on")
    return store


def measure_training_sample(trainer: L.Trainer, model: Classifier, data: StoreData) -> dict[str, Any]:
    """Measure the centre patch of at most SAMPLE training images without dropout: errors (%), log-loss and their number."""
    sample = StoreData(
        data.store, data.batch_size, data.seed, {"crop": model.crop}, data.workers, "train", sample=SAMPLE
    )
    (scores,) = measure(trainer, model, sample, ("centre",)).values()
    return {**errors(scores), "images": len(scores)}


def circumstances(trainer: L.Trainer) -> dict[str, Any]:
    """What a number depends on besides the config."""
    facts = machine(trainer.strategy.root_device, trainer.world_size)
    return {
        "hardware": facts.pop("machine"),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        **facts,
    }
