"""The order of the images in each epoch. All randomness of training is a function of (seed, epoch, sample index).

Random numbers therefore do not depend on the number of workers or processes, or on what ran before. A run that is
resumed in the middle of an epoch sees the same images, crops and colour noise as an uninterrupted run.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

# Purposes of random streams. Streams with different purposes are independent.
PLACE, SHARED_PLACE, COLOUR, JITTER, ORDER, PART = range(6)


def stream(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """Return the generator of (seed, epoch, purpose), which does not depend on earlier draws."""
    return np.random.Generator(np.random.Philox(key=(seed, epoch << 8 | purpose)))


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


class OwnPart(DistributedSampler[int]):
    """Sampler of the given indices, which are this process's part of a split.

    As a DistributedSampler, it tells Lightning not to divide the indices once more (``use_distributed_sampler``).
    """

    def __init__(self, indices: Sequence[int]) -> None:  # DistributedSampler's would ask torch.distributed
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class EpochSampler(DistributedSampler[Part]):
    """Sampler of batches of indices, of which each replica takes its part.

    The position follows from the number of epochs and batches done, so resuming a run requires no other state.

    count: number of images in the split.
    position: function that returns the number of epochs done and the number of batches done in the current epoch.
    replica, replicas: each batch is divided into ``replicas`` nearly equal parts; this process takes part ``replica``.
    order: "reshuffled", a new permutation in each epoch; "fixed", one permutation for all epochs, as in the 2012
        program, which read its stored batches in the same order in every epoch; "stored", the order of the store.
    images_per_file: number of images in a stored batch file. With order="stored", no batch spans two files, as in the
        2012 program, and the last batch of each file may be smaller.

    Raises ValueError for an unknown order.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]],
        replica: int = 0,
        replicas: int = 1,
        *,
        order: str = "reshuffled",
        images_per_file: int | None = None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order}: this must be one of {', '.join(ORDERS)}")
        self.count, self.batch_size, self.seed, self.position = count, batch_size, seed, position
        self.replica, self.replicas, self.order = replica, replicas, order
        self.images_per_file = images_per_file if order == "stored" and images_per_file else count

    def __len__(self) -> int:
        files, rest = divmod(self.count, self.images_per_file)
        return files * -(-self.images_per_file // self.batch_size) - (-rest // self.batch_size)

    def __iter__(self) -> Iterator[Part]:
        epoch, first_batch = self.position()
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
