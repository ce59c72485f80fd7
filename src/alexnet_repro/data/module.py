"""Load batches from a store. All randomness is a function of (seed, epoch, sample index).

Random numbers therefore do not depend on the number of workers or processes, or on what ran before. A run that is
resumed in the middle of an epoch sees the same images, crops and colour noise as an uninterrupted run.
"""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from alexnet_repro.data.augment import crop_and_mirror
from alexnet_repro.data.split import JoinedSplits, Split
from alexnet_repro.data.store import Store
from alexnet_repro.provenance import cores


class TrainBatch(NamedTuple):
    """Training patches and the random numbers drawn for them.

    The training device subtracts the mean and adds the colour noise.
    """

    patches: Tensor  # (N, crop, crop, 3) uint8, cropped and mirrored
    labels: Tensor  # (N,) int64
    tops: Tensor  # (N,) int64, first row of the patch in its image
    lefts: Tensor  # (N,) int64
    mirror: Tensor  # (N,) bool
    colour: Tensor  # (N, 3) float32 from N(0, 1)
    jitter: Tensor  # (N, 3) float32, uniform from -1 to 1
    first: int  # position of the first of these images in the global batch, which replicas may share
    global_batch_size: int  # images in the global batch
    file: int  # number of the stored batch file that the images come from with order=stored; otherwise 0


class ValBatch(NamedTuple):
    """Whole images for evaluation, to be cut into one view or ten crops."""

    images: Tensor  # (N, size, size, 3) uint8
    labels: Tensor  # (N,) int64


# Purposes of random streams. Streams with different purposes are independent.
PLACE, SHARED_PLACE, COLOUR, JITTER, ORDER = range(5)


def stream(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """Return the generator of (seed, epoch, purpose), which does not depend on earlier draws."""
    return np.random.Generator(np.random.Philox(key=(seed, epoch << 8 | purpose)))


def draw_places(rng: np.random.Generator, count: int, positions: int) -> NDArray[np.int64]:
    """Draw top, left and mirror of ``count`` patches: (count, 3) (Section 4.1).

    positions: number of offsets along each axis, 33 for 224-pixel patches of 256-pixel images. mirror is 0 or 1 with
    equal probability.
    """
    return rng.integers(0, (positions, positions, 2), (count, 3))


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of the images in an epoch: a permutation of range(count)."""
    return stream(seed, epoch, ORDER).permutation(count)


ORDERS = ("reshuffled", "fixed", "stored")


class Part(NamedTuple):
    """Images of one batch, or one replica's part of them."""

    epoch: int
    images: NDArray[np.int64]  # indices into the split
    positions: NDArray[np.int64]  # positions of these images in the epoch's order
    first: int  # position of the first of these images in the global batch
    global_batch_size: int  # images in the global batch
    file: int = 0  # number of the stored batch file, with order=stored


class Drawn(NamedTuple):
    """Random numbers of one epoch."""

    places: NDArray[np.int64]  # (images or groups of images, 3): top, left, mirror
    colour: NDArray[np.float32]  # (images, 3) from N(0, 1)
    jitter: NDArray[np.float32]  # (images, 3), uniform from -1 to 1


class EpochSampler(Sampler[Part]):
    """Sampler of batches of indices.

    The position in the epoch follows from the number of updates done, so resuming a run requires no other state.

    count: number of images in the split.
    steps_done: function that returns the number of updates done so far.
    replica, replicas: each batch is divided into ``replicas`` nearly equal parts; this process takes part ``replica``.
    order: "reshuffled", a new permutation in each epoch; "fixed", one permutation for all epochs, as in the 2012
        program, which read its stored batches in the same order in every epoch; "stored", the order of the store.
    images_per_file: number of images in a stored batch file. With order="stored", no batch spans two files, as in the
        2012 program, and the last batch of each file may be smaller.
    first_epoch, steps_before: first epoch of this sampler and number of updates before this epoch, for runs whose
        earlier epochs had a different number of images.

    Raises ValueError for an unknown order.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        steps_done: Callable[[], int],
        replica: int = 0,
        replicas: int = 1,
        *,
        order: str = "reshuffled",
        images_per_file: int | None = None,
        first_epoch: int = 0,
        steps_before: int = 0,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order}: this must be one of {', '.join(ORDERS)}")
        self.count, self.batch_size, self.seed, self.steps_done = count, batch_size, seed, steps_done
        self.replica, self.replicas, self.order = replica, replicas, order
        self.first_epoch, self.steps_before = first_epoch, steps_before
        self.images_per_file = images_per_file if order == "stored" and images_per_file else count

    def __len__(self) -> int:
        files, rest = divmod(self.count, self.images_per_file)
        return files * -(-self.images_per_file // self.batch_size) - (-rest // self.batch_size)

    def __iter__(self) -> Iterator[Part]:
        epoch, first_batch = divmod(self.steps_done() - self.steps_before, len(self))
        epoch += self.first_epoch
        if self.order == "stored":
            order = np.arange(self.count)
        else:
            order = epoch_order(self.seed, epoch if self.order == "reshuffled" else 0, self.count)
        batches = (
            (start, min(start + self.batch_size, file_start + self.images_per_file, self.count))
            for file_start in range(0, self.count, self.images_per_file)
            for start in range(file_start, min(file_start + self.images_per_file, self.count), self.batch_size)
        )
        for start, stop in islice(batches, first_batch, None):
            size = stop - start
            first, end = (size * edge // self.replicas for edge in (self.replica, self.replica + 1))
            positions = np.arange(start + first, start + end)
            yield Part(epoch, order[positions], positions, first, size, start // self.images_per_file)


class TrainImages(Dataset[TrainBatch]):
    """Random patches of a split, fetched one batch at a time.

    crop: side of a patch, in pixels.
    random_crops: whether to cut patches at random positions; otherwise from the centre.
    mirror: whether to mirror patches at random.
    share: number of consecutive images in the epoch's order that share one position and one reflection; 1 according to
        the paper, 32 in the 2012 code.
    """

    def __init__(
        self, split: Split, seed: int, crop: int, random_crops: bool = True, mirror: bool = True, share: int = 1
    ) -> None:
        self.split, self.seed, self.crop = split, seed, crop
        self.random_crops, self.mirror, self.share = random_crops, mirror, share
        self._drawn: tuple[int, Drawn] | None = None

    def drawn(self, epoch: int) -> Drawn:
        """Return the random numbers of an epoch, indexed by image.

        With ``share`` > 1, ``places`` is indexed by group of images instead. Drawing all numbers at once is much faster
        than drawing them per image.
        """
        if self._drawn is None or self._drawn[0] != epoch:
            count, positions = len(self.split), self.split.image_size - self.crop + 1
            places = draw_places(
                stream(self.seed, epoch, SHARED_PLACE if self.share > 1 else PLACE), -(-count // self.share), positions
            )
            colour = stream(self.seed, epoch, COLOUR).standard_normal((count, 3), np.float32)
            jitter = 2 * stream(self.seed, epoch, JITTER).random((count, 3), np.float32) - 1
            self._drawn = epoch, Drawn(places, colour, jitter)
        return self._drawn[1]

    def __getitems__(self, part: Part) -> TrainBatch:
        drawn, images = self.drawn(part.epoch), part.images
        room = self.split.image_size - self.crop
        # groups of ``share`` images are consecutive in the epoch's order, not in the split
        tops, lefts, turned = drawn.places[part.positions // self.share if self.share > 1 else images].T
        if not self.random_crops:
            tops, lefts = np.full_like(tops, room // 2), np.full_like(lefts, room // 2)
        mirror = turned.astype(bool) & self.mirror
        patches = crop_and_mirror(self.split.read(images.tolist()), tops, lefts, mirror, self.crop)
        return TrainBatch(
            torch.from_numpy(patches),
            torch.from_numpy(self.split.labels[images]),
            torch.from_numpy(tops.copy()),
            torch.from_numpy(lefts.copy()),
            torch.from_numpy(mirror),
            torch.from_numpy(drawn.colour[images]),
            torch.from_numpy(drawn.jitter[images]),
            part.first,
            part.global_batch_size,
            part.file,
        )


class ValImages(Dataset[ValBatch]):
    """Whole images of a split in stored order, fetched one batch at a time."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> ValBatch:
        images = np.stack(list(self.split.read(indices)))
        return ValBatch(torch.from_numpy(images), torch.from_numpy(self.split.labels[indices]))


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
        return self._loader(images, batch_size=self.batch_size, sampler=[int(i) for i in chosen[replica::replicas]])

    def _cores(self) -> int:
        """Return the number of cores for this process's loaders, at most eight.

        torch.get_num_threads() would be 1 under torchrun. Processes on one machine share the cores that they may use,
        unless Slurm has given each its own.
        """
        sharing = 1 if "SLURM_CPUS_PER_TASK" in os.environ else self.trainer.num_devices if self.trainer else 1
        return max(1, min(8, cores() // sharing))

    def _loader(self, images: Dataset, **order: object) -> DataLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        workers = self.workers if self.workers is not None else (self._cores() if on_gpu else 0)
        if workers:
            images.split.share()  # type: ignore[attr-defined]
        return DataLoader(
            images,
            **order,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=already_a_batch,
            worker_init_fn=_leave_ctrl_c_to_the_main_process,
            pin_memory=on_gpu,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise the loader draws from the global generator in each epoch
        )


def replica_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return the index of this process's replica of the network and the number of replicas."""
    return getattr(trainer.strategy, "replica", (0, 1)) if trainer else (0, 1)


def _leave_ctrl_c_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def already_a_batch(batch: Any) -> Any:
    """Return the batch unchanged, as the collate function of data sets that fetch whole batches."""
    return batch
