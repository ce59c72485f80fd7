"""The LightningDataModule: loaders of a store's batches for training, validation and prediction."""

import os
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from alexnet_repro.data.batches import TrainBatch, TrainImages, ValBatch, ValImages
from alexnet_repro.data.loader import Images, make_loader
from alexnet_repro.data.sampler import EpochSampler
from alexnet_repro.data.split import JoinedSplits, Split
from alexnet_repro.data.store import Store
from alexnet_repro.processes import cores


class StoreData(L.LightningDataModule):
    """Training, validation and prediction batches of a store.

    patches: arguments crop, random_crops, mirror and share of TrainImages.
    workers: number of loader processes. None means none on a CPU, where they would compete with training, and on a
        GPU as many as this process has cores, up to eight.
    predict_split: split to predict (None: ``store.measured_split``).
    order, images_per_file: as in EpochSampler.
    val_joins_after: epoch after which the network is also trained on the validation images (0: from the start; None:
        never). From then on, the test images are evaluated after each epoch instead.
    sample: maximum number of images to predict, evenly spaced (None: all).
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        seed: int,
        patches: dict[str, Any],
        workers: int | None = None,
        predict_split: str | None = None,
        *,
        order: str = "reshuffled",
        images_per_file: int | None = None,
        val_joins_after: int | None = None,
        sample: int | None = None,
    ) -> None:
        super().__init__()
        self.predict_split = predict_split or store.measured_split
        self.store, self.batch_size, self.seed, self.patches, self.workers = store, batch_size, seed, patches, workers
        self.order, self.images_per_file, self.val_joins_after = order, images_per_file, val_joins_after
        self.sample = sample

    def val_has_joined(self) -> bool:
        """Return whether the current epoch also trains on the validation images."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return self.val_joins_after is not None and epoch >= self.val_joins_after and self.store.has("val")

    @property
    def watched_split(self) -> str:
        """Split to evaluate after the current epoch."""
        return "test" if self.val_has_joined() and self.store.has("test") else self.store.watched_split

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Return a loader of random patches of the training images.

        After ``val_joins_after`` epochs, it also includes the validation images.
        """
        split: Split = self.store.split("train")
        sampler = self._sampler(len(split), 0, 0)
        if self.val_has_joined():
            assert self.val_joins_after is not None
            steps_before = self.val_joins_after * len(sampler)
            split = JoinedSplits([split, self.store.split("val")])
            sampler = self._sampler(len(split), self.val_joins_after, steps_before)
        return self._loader(TrainImages(split, self.seed, **self.patches), batch_sampler=sampler)

    def _sampler(self, count: int, first_epoch: int, steps_before: int) -> EpochSampler:
        return EpochSampler(
            count,
            self.batch_size,
            self.seed,
            lambda: self.trainer.global_step if self.trainer else steps_before,
            *replica_of(self.trainer),
            order=self.order,
            images_per_file=self.images_per_file,
            first_epoch=first_epoch,
            steps_before=steps_before,
        )

    def val_dataloader(self) -> DataLoader[ValBatch]:
        """Return a loader of the whole images to evaluate after every epoch, in stored order."""
        return self._whole_images(self.watched_split)

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
        return self._loader(images, sampler=[int(i) for i in chosen[replica::replicas]])

    def _cores(self) -> int:
        """Return the number of cores for this process's loaders, at most eight.

        torch.get_num_threads() would be 1 under torchrun. Processes on one machine share the cores that they may use,
        unless Slurm has given each its own.
        """
        sharing = 1 if "SLURM_CPUS_PER_TASK" in os.environ else self.trainer.num_devices if self.trainer else 1
        return max(1, min(8, cores() // sharing))

    def _loader(self, images: Images, **order: object) -> DataLoader[Any]:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        workers = self.workers if self.workers is not None else (self._cores() if device.type != "cpu" else 0)
        return make_loader(images, self.batch_size, workers, device, **order)


def replica_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return the index of this process's replica of the network and the number of replicas."""
    return getattr(trainer.strategy, "replica", (0, 1)) if trainer else (0, 1)
