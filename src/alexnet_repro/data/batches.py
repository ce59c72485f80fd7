"""Batches of random patches for training and of whole images for evaluation, and the data sets that make them."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from alexnet_repro.data.augment import crop_and_mirror
from alexnet_repro.data.sampler import COLOUR, JITTER, PLACE, SHARED_PLACE, Part, stream
from alexnet_repro.data.split import Split


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


class Drawn(NamedTuple):
    """Random numbers of one epoch."""

    places: NDArray[np.int64]  # (images or groups of images, 3): top, left, mirror
    colour: NDArray[np.float32]  # (images, 3) from N(0, 1)
    jitter: NDArray[np.float32]  # (images, 3), uniform from -1 to 1


def draw_places(rng: np.random.Generator, count: int, positions: int) -> NDArray[np.int64]:
    """Draw top, left and mirror of ``count`` patches: (count, 3) (Section 4.1).

    positions: number of offsets along each axis, 33 for 224-pixel patches of 256-pixel images. mirror is 0 or 1 with
    equal probability.
    """
    return rng.integers(0, (positions, positions, 2), (count, 3))


class TrainImages(Dataset[TrainBatch]):
    """Random patches of a split, fetched one batch at a time, by what EpochSampler yields.

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

    def pixels(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of a batch's patches."""
        return batch_size, self.crop, self.crop, 3

    def __getitem__(self, part: Part) -> TrainBatch:
        """Return a batch."""
        return self.__getitems__(part)

    def __getitems__(self, part: Part, out: NDArray[np.uint8] | None = None) -> TrainBatch:
        """Return a batch. Its patches are written into the beginning of ``out``, if given."""
        drawn, images = self.drawn(part.epoch), part.images
        room = self.split.image_size - self.crop
        # groups of ``share`` images are consecutive in the epoch's order, not in the split
        tops, lefts, turned = drawn.places[part.positions // self.share if self.share > 1 else images].T
        if not self.random_crops:
            tops, lefts = np.full_like(tops, room // 2), np.full_like(lefts, room // 2)
        mirror = turned.astype(bool) & self.mirror
        patches = crop_and_mirror(self.split.read(images.tolist()), tops, lefts, mirror, self.crop, out)
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

    def pixels(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of a batch's images."""
        return batch_size, self.split.image_size, self.split.image_size, 3

    def __getitems__(self, indices: list[int], out: NDArray[np.uint8] | None = None) -> ValBatch:
        """Return a batch. Its images are written into the beginning of ``out``, if given."""
        images = np.empty(self.pixels(len(indices)), np.uint8) if out is None else out[: len(indices)]
        for place, image in zip(images, self.split.read(indices), strict=True):
            place[...] = image
        return ValBatch(torch.from_numpy(images), torch.from_numpy(self.split.labels[indices]))
