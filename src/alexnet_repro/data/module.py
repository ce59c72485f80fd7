"""The LightningDataModule: loaders of a store's batches for training, validation and prediction."""

import os
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from alexnet_repro.data.batches import TrainBatch, TrainImages, ValBatch, ValImages
from alexnet_repro.data.loader import Images, make_loader
from alexnet_repro.data.sampler import EpochSampler, OwnPart
from alexnet_repro.data.split import JoinedSplits, Split, part_of
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.processes import cores

PATCHES = ("crop", "random_crops", "mirror", "share")


class StoreData(L.LightningDataModule):
    """Training, validation, test and prediction batches of a store, for a Classifier and any ``lightning.Trainer``.

    The order of the images, the crops and the reflections are functions of the seed and the epoch. With several processes,
    each takes its part of every batch.

    batch_size: of all processes together.
    patches: arguments crop, random_crops, mirror and share of TrainImages; None: those of the Classifier's ``augment``.
    workers: number of loader processes. None means none on a CPU, where they would compete with training, and on a
        GPU as many as this process has cores, up to eight.
    predict_split: split to predict (None: ``store.measured_split``).
    order, images_per_file: as in EpochSampler.
    val_joins_after: epoch after which the network is also trained on the validation images (0: from the start; None:
        never). From then on, the test images are evaluated after each epoch instead.
    sample: maximum number of images to predict, evenly spaced (None: all).
    train_per_class: maximum number of training images of each class, drawn with the seed (None: all).

    Raises UserError, when the loaders are made, for a Trainer's option that has no meaning for these batches.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int = 128,
        seed: int = 0,
        patches: dict[str, Any] | None = None,
        workers: int | None = None,
        predict_split: str | None = None,
        *,
        order: str = "reshuffled",
        images_per_file: int | None = None,
        val_joins_after: int | None = None,
        sample: int | None = None,
        train_per_class: int | None = None,
    ) -> None:
        super().__init__()
        self.predict_split = predict_split or store.measured_split
        self.store, self.batch_size, self.seed, self.patches, self.workers = store, batch_size, seed, patches, workers
        self.order, self.images_per_file, self.val_joins_after = order, images_per_file, val_joins_after
        self.sample, self.train_per_class = sample, train_per_class

    def val_has_joined(self) -> bool:
        """Return whether the current epoch also trains on the validation images."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return self.val_joins_after is not None and epoch >= self.val_joins_after and self.store.has("val")

    @property
    def watched_split(self) -> str:
        """Split to evaluate after the current epoch."""
        return "test" if self.val_has_joined() and self.store.has("test") else self.store.watched_split

    def train_images(self) -> Split:
        """Return the training images of the current epoch."""
        train = self.store.split("train")
        if self.train_per_class is not None:
            train = part_of(train, self.train_per_class, self.seed)
        return JoinedSplits([train, self.store.split("val")]) if self.val_has_joined() else train

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Return a loader of random patches of the training images.

        After ``val_joins_after`` epochs, it also includes the validation images.
        """
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError(
                "overfit_batches: StoreData draws its batches anew in each epoch",
                "use limit_train_batches=N with StoreData(order='fixed'), or train_per_class=N",
            )
        images = self.train_images()
        sampler = EpochSampler(
            len(images),
            self.batch_size,
            self.seed,
            lambda: position_of(self.trainer),
            *replica_of(self.trainer),
            order=self.order,
            images_per_file=self.images_per_file,
        )
        return self._loader(TrainImages(images, self.seed, **self._patches()), sampler)

    def refuse_other_net(self, classes: int, image_size: int) -> None:
        """Raise UserError if the images do not have this number of classes, or this size."""
        if (found := len(self.store.classes)) != classes:
            raise UserError(
                f"the images of {self.store.path} have {found} classes, and the net has {classes}",
                f"use Classifier(classes={found}), or another store",
            )
        if (size := self.store.image_size) != image_size:
            raise UserError(
                f"the images of {self.store.path} are {size}x{size}, and the net expects {image_size}x{image_size}",
                f"use Classifier(image_size={size}), or another store",
            )

    def _patches(self) -> dict[str, Any]:
        augment = getattr(self.trainer and self.trainer.lightning_module, "augment", {"crop": 224})
        return self.patches or {key: augment[key] for key in PATCHES if key in augment}

    def val_dataloader(self) -> DataLoader[ValBatch]:
        """Return a loader of the whole images to evaluate after every epoch, in stored order."""
        return self._whole_images(self.watched_split)

    def test_dataloader(self) -> DataLoader[ValBatch]:
        """Return a loader of the whole images of ``store.measured_split``, in stored order."""
        return self._whole_images(self.store.measured_split)

    def predict_dataloader(self) -> DataLoader[ValBatch]:
        """Return a loader of the whole images of ``predict_split``, in stored order."""
        return self._whole_images(self.predict_split, self.sample)

    def _whole_images(self, split: str, sample: int | None = None) -> DataLoader[ValBatch]:
        images = ValImages(self.store.split(split))
        replica, replicas = replica_of(self.trainer)
        count = len(images)
        chosen = (
            range(count) if sample is None else np.unique(np.linspace(0, count - 1, min(sample, count)).astype(int))
        )
        return self._loader(images, OwnPart([int(i) for i in chosen[replica::replicas]]))

    def _cores(self) -> int:
        """Return the number of cores for this process's loaders, at most eight.

        torch.get_num_threads() would be 1 under torchrun. Processes on one machine share the cores that they may use,
        unless Slurm has given each its own.
        """
        sharing = 1 if "SLURM_CPUS_PER_TASK" in os.environ else self.trainer.num_devices if self.trainer else 1
        return max(1, min(8, cores() // sharing))

    def _loader(self, images: Images, sampler: EpochSampler | OwnPart) -> DataLoader[Any]:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        workers = self.workers if self.workers is not None else (self._cores() if device.type != "cpu" else 0)
        return make_loader(images, self.batch_size, workers, device, sampler=sampler)


def replica_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return the index of this process's replica of the network and the number of replicas."""
    division = trainer.distributed_sampler_kwargs if trainer else None
    return (division["rank"], division["num_replicas"]) if division else (0, 1)


def position_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return the number of epochs done and the number of batches done in the current epoch.

    They come from the loops' progress, which checkpoints hold, and not from the number of updates: with gradient
    accumulation, an update takes several batches.
    """
    if trainer is None:
        return 0, 0
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    if epochs.ready == epochs.processed:  # between two epochs
        return epochs.processed, 0
    if batches.is_last_batch:  # of a checkpoint saved after the last batch, but before the end of the epoch
        return epochs.processed + 1, 0
    return epochs.processed, batches.current.processed


def batches_done(trainer: L.Trainer | None) -> int:
    """Return the number of training batches done, in all epochs."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total if trainer else None
    return total.processed if trainer else 0
