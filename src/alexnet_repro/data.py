"""Store -> batches. All randomness is a function of (seed, epoch, sample index).

So it doesn't depend on the number of workers or processes, nor on what ran before: a run that is resumed in the middle of
an epoch goes on with the same images, crops and colours as one that was never stopped.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from alexnet_repro.augment import crop_and_mirror
from alexnet_repro.store import Split, Store


class TrainBatch(NamedTuple):
    """Patches and what was drawn for them: the mean and the colour noise are applied on the training device."""

    patches: Tensor  # (N, crop, crop, 3) uint8, cut and mirrored
    labels: Tensor  # (N,) int64
    tops: Tensor  # (N,) int64, first row of the patch in its image
    lefts: Tensor  # (N,) int64
    mirror: Tensor  # (N,) bool
    colour: Tensor  # (N, 3) float32 from N(0, 1)


class ValBatch(NamedTuple):
    """Whole images, for one view or ten crops."""

    images: Tensor  # (N, size, size, 3) uint8
    labels: Tensor  # (N,) int64


class Draws(NamedTuple):
    """The random numbers of one sample in one epoch."""

    top: int
    left: int
    mirror: bool
    colour: NDArray[np.float64]  # (3,) from N(0, 1)


def draw(seed: int, epoch: int, index: int, positions: int) -> Draws:
    """The random numbers for image ``index`` in ``epoch``; ``positions`` offsets in each axis (33 for 224 of 256)."""
    rng = np.random.Generator(np.random.Philox(key=(seed, epoch << 40 | index)))
    top, left, mirror = rng.integers(0, (positions, positions, 2))
    return Draws(int(top), int(left), bool(mirror), rng.standard_normal(3))


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """A permutation of range(count): the order of images in ``epoch``."""
    return np.random.Generator(np.random.Philox(key=(seed, epoch << 40 | 2**40 - 1))).permutation(count)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index). Where it begins follows from the number of steps done, so a resumed run needs no other state."""

    def __init__(self, count: int, batch_size: int, seed: int, steps_done: Callable[[], int]) -> None:
        self.count, self.batch_size, self.seed, self.steps_done = count, batch_size, seed, steps_done

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.steps_done(), len(self))
        order = epoch_order(self.seed, epoch, self.count).tolist()
        for start in range(first * self.batch_size, self.count, self.batch_size):
            yield [(epoch, index) for index in order[start : start + self.batch_size]]


class TrainImages(Dataset[TrainBatch]):
    """Random patches of a split; fetched a batch at a time."""

    def __init__(self, split: Split, seed: int, crop: int) -> None:
        self.split, self.seed, self.crop = split, seed, crop

    def __getitems__(self, keys: list[tuple[int, int]]) -> TrainBatch:
        positions = self.split.image_size - self.crop + 1
        draws = [draw(self.seed, epoch, index, positions) for epoch, index in keys]
        tops, lefts = (np.array([d[axis] for d in draws]) for axis in (0, 1))
        mirror = np.array([d.mirror for d in draws])
        indices = [index for _, index in keys]
        patches = crop_and_mirror([self.split[i] for i in indices], tops, lefts, mirror, self.crop)
        return TrainBatch(
            torch.from_numpy(patches),
            torch.from_numpy(self.split.labels[indices]),
            torch.from_numpy(tops),
            torch.from_numpy(lefts),
            torch.from_numpy(mirror),
            torch.from_numpy(np.stack([d.colour for d in draws])).float(),
        )


class ValImages(Dataset[ValBatch]):
    """Whole images of a split, in its order; fetched a batch at a time."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> ValBatch:
        images = np.stack([self.split[i] for i in indices])
        return ValBatch(torch.from_numpy(images), torch.from_numpy(self.split.labels[indices]))


class StoreData(L.LightningDataModule):
    """Train and validation batches of a store.

    crop: side of a patch, pixels. workers: loader processes; None is none on a CPU, where they would take the cores that
    train, and up to eight on a GPU.
    """

    def __init__(self, store: Store, batch_size: int, seed: int, crop: int, workers: int | None = None) -> None:
        super().__init__()
        self.store, self.batch_size, self.seed, self.crop, self.workers = store, batch_size, seed, crop, workers

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Random patches, in a new order each epoch."""
        images = TrainImages(self.store.split("train"), self.seed, self.crop)
        sampler = EpochSampler(
            len(images.split), self.batch_size, self.seed, lambda: self.trainer.global_step if self.trainer else 0
        )
        return self._loader(images, batch_sampler=sampler)

    def val_dataloader(self, split: str = "val") -> DataLoader[ValBatch]:
        """Whole images, in the store's order."""
        return self._loader(ValImages(self.store.split(split)), batch_size=self.batch_size)

    predict_dataloader = val_dataloader

    def _loader(self, images: Dataset, **order: object) -> DataLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        workers = self.workers if self.workers is not None else (min(8, torch.get_num_threads()) if on_gpu else 0)
        return DataLoader(
            images,
            **order,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_already_a_batch,
            pin_memory=on_gpu,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else each epoch would take a number from the global one
        )


def _already_a_batch(batch: Any) -> Any:
    return batch
