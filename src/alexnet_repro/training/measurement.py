"""Measure a trained net: predict the images of a split, and score the predictions."""

import json
import zipfile
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from alexnet_repro.claims.scores import VIEWS, errors, gathered
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store, sha256
from alexnet_repro.errors import UserError
from alexnet_repro.files import written_whole
from alexnet_repro.provenance import machine
from alexnet_repro.training.checkpoints import kept, load_checkpoint
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.run_folder import saved_config

# The views that each choice of views= measures in one pass over the images.
MEASURED_WITH: dict[str, tuple[str, ...]] = {"centre": VIEWS[:1], "ten_crop": VIEWS[:2], "nine_crop": VIEWS}

SAMPLE = 10_000  # maximum number of training images, evenly spaced, that measure_training_sample measures


def _predict(
    trainer: L.Trainer, model: Classifier, data: StoreData, views: tuple[str, ...], scores: bool
) -> dict[str, Tensor]:
    """Predict ``data.predict_split``: return the softmax (N, classes) of each view, or its scores (N, 3).

    One pass gives both the centre patch and the ten crops, because the centre patch is the fifth of the ten.
    """
    model.predicted_views, model.predicts_scores = views, scores
    batches: Any = trainer.predict(model, datamodule=data)
    return {view: torch.cat(column) for view, column in zip(views, zip(*batches, strict=True), strict=True)}


def predict_whole(
    trainer: L.Trainer, model: Classifier, data: StoreData, views: tuple[str, ...], checkpoint: Path | None
) -> dict[str, Tensor]:
    """Predict all images of ``data.predict_split``: return the softmax (N, classes) of each view, in every process.

    If the net's checkpoint is given, a single process also writes the softmax to softmax-<checkpoint>-<split>-<view>.npz
    in the folder of the run. It is read from there if it came from the same weights, images, precision, machine and
    version of the program.
    """
    if checkpoint is None or trainer.world_size > 1:  # several processes need not see the same files
        return {
            view: gathered(part, trainer) for view, part in _predict(trainer, model, data, views, scores=False).items()
        }
    facts = {
        "checkpoint": sha256(checkpoint),
        "store": data.store.images_sha256,
        **{key: value for key, value in circumstances(trainer).items() if key != "command"},
    }
    path = checkpoint.parents[1] / f"softmax-{checkpoint.stem}-{data.predict_split}-{views[-1]}.npz"
    if (found := _saved_softmax(path, facts)) is not None:
        print(f"read from {path}")
        return found
    softmax = _predict(trainer, model, data, views, scores=False)
    try:
        with written_whole(path) as file:
            arrays: dict[str, Any] = {view: part.numpy() for view, part in softmax.items()}
            np.savez(file, **arrays | {FACTS: np.array(json.dumps(facts))})
    except OSError as error:  # a full disk, or a folder of another user
        print(f"the softmax is not saved: {path}: {error.strerror}")
    return softmax


FACTS = "facts"


def _saved_softmax(path: Path, facts: dict[str, Any]) -> dict[str, Tensor] | None:
    """Return the softmax of each view that ``predict_whole`` saved with these facts, or None."""
    try:
        with np.load(path) as arrays:
            if json.loads(str(arrays[FACTS])) == facts:
                return {view: torch.from_numpy(arrays[view]) for view in arrays if view != FACTS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing, or damaged
        pass
    return None


def measure(
    trainer: L.Trainer, model: Classifier, data: StoreData, views: tuple[str, ...] = VIEWS[:2]
) -> dict[str, Tensor]:
    """Score every image of ``data.predict_split``: return {view: (N, 3), as from ``scores.score``}.

    With several processes, each returns the scores of all images.
    """
    scores_by_view = _predict(trainer, model, data, views, scores=True)
    return {view: gathered(scores, trainer) for view, scores in scores_by_view.items()}


def load_run(run: Path, checkpoint: str = "last") -> tuple[Classifier, DictConfig]:
    """Return the trained net and the config of a run. Raise UserError for a missing or damaged checkpoint."""
    trained = saved_config(run)
    return model_of(checkpoint_of(run, checkpoint)), trained


def checkpoint_of(run: Path, name: str) -> Path:
    """Return the path of a run's checkpoint. Raise UserError, with the names of those it has, if there is none."""
    path = run / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        there = kept(run)
        raise UserError(
            f"{run} has no checkpoint '{name}'",
            f"choose checkpoint={' or '.join(there)}" if there else "train for at least one epoch first",
        )
    return path


def model_of(path: Path) -> Classifier:
    """Return the trained net of a checkpoint. Raise UserError if it is damaged.

    The file chooses values only: Lightning's ``load_from_checkpoint`` would take from it what code to run.
    """
    checkpoint = load_checkpoint(path)
    try:
        known = signature(Classifier).parameters.keys() - {"mean", "covariance"}
        options = {key: value for key, value in checkpoint["hyper_parameters"].items() if key in known}
        model = Classifier(**options)
        model.load_state_dict(checkpoint["state_dict"])
        model.on_load_checkpoint({"history": [], "training_means": model.training_means.sums, **checkpoint})
        return model
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the net that it describes: {' '.join(str(error).split())[:120]}",
            "choose another checkpoint, or train again",
        ) from None


def fitting_store(path: str, model: Classifier, run: Path) -> Store:
    """Open the store at ``path``.

    Raises UserError if its classes or image size differ from those that the run's net was trained on.
    """
    store = Store(path)
    if store.classes != model.class_names:
        raise UserError(
            f"the store {store.path} has other classes than the training data of {run}",
            "choose another with store=PATH",
        )
    if store.image_size != model.image_size:
        raise UserError(f"the store {store.path} has images of another size than the training data of {run}")
    return store


def measure_training_sample(trainer: L.Trainer, model: Classifier, data: StoreData) -> dict[str, Any]:
    """Measure the centre patch of at most SAMPLE training images, without dropout.

    Returns errors (percent), log-loss (nats) and the number of images.
    """
    sample = StoreData(
        data.store, data.batch_size, data.seed, {"crop": model.crop}, data.workers, "train", sample=SAMPLE
    )
    (scores,) = measure(trainer, model, sample, ("centre",)).values()
    return {**errors(scores), "images": len(scores)}


def circumstances(trainer: L.Trainer) -> dict[str, Any]:
    """Return what a result depends on besides its config: hardware, precision, versions, commit and so on."""
    device = trainer.strategy.root_device
    facts = machine(device, trainer.world_size)
    return {
        "hardware": facts.pop("machine"),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "tf32": torch.backends.cudnn.allow_tf32 if device.type == "cuda" else False,
        **facts,
    }
