"""Loader processes. They write pixels into memory that they share with the main process.

PyTorch's DataLoader allocates new shared memory for each batch. For batches of 20 MB, that takes longer than filling it:
a loader gave about 6,000 images per second, with one process or two. Here, each process has its own buffers, and reuses them.
"""

import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from alexnet_repro.data.sampler import EpochSampler, Part
from alexnet_repro.data.split import Split
from alexnet_repro.errors import UserError

PREFETCH = 2  # batches that each process prepares before they are asked for


class Images(Protocol):
    """A data set that fetches whole batches, as named tuples whose first field holds the pixels."""

    split: Split

    def __getitems__(self, chosen: Any, out: NDArray[np.uint8] | None = None) -> Any:
        """Return a batch. Its pixels are written into the beginning of ``out``, if given."""

    def pixels(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of a batch's pixels."""


def make_loader(
    images: Images,
    batch_size: int,
    workers: int = 0,
    device: torch.device | None = None,
    *,
    sampler: EpochSampler | Iterable[int],
) -> DataLoader[Any]:
    """Return a loader of batches.

    batch_size: maximum number of images in a batch. workers: number of loader processes. device: where a batch will be used.
    With loader processes, its pixels are on that device already. sampler: yields indices, or whole batches of indices if it
    is an EpochSampler.

    Raises UserError if there is too little shared memory.
    """
    options: dict[str, Any] = {
        "sampler": sampler,
        "batch_size": None if isinstance(sampler, EpochSampler) else batch_size,
        "collate_fn": _already_a_batch,
        "generator": torch.Generator(),  # otherwise the loader draws from the global generator in each epoch
    }
    device = device or torch.device("cpu")
    if not workers:
        return DataLoader(images, pin_memory=device.type == "cuda", **options)  # type: ignore[arg-type]
    images.split.share()
    return _Loader(
        _IntoBuffers(images, workers, batch_size, device),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
        worker_init_fn=_leave_signals_to_the_main_process,
        **options,
    )


class _IntoBuffers(Dataset[Any]):
    """Fetch batches in loader processes.

    Each process has PREFETCH + 1 buffers, and uses them in turn. It has at most PREFETCH batches to prepare, and the
    main process has copied all but the last one that it was given.
    """

    def __init__(self, images: Images, workers: int, batch_size: int, device: torch.device) -> None:
        self.images, self.device, self.turn, self.is_pinned = images, device, 0, False
        shape = ((PREFETCH + 1) * workers, *images.pixels(batch_size))
        gc.collect()  # frees the buffers of a run before, in a sweep
        try:
            self.buffers = torch.empty(shape, dtype=torch.uint8).share_memory_()
        except RuntimeError:
            size = round(np.prod(shape) / 2**20)
            raise UserError(
                f"{workers} loader processes need {size:,} MB of shared memory, and there is less",
                "allow more (Docker: --shm-size), or use fewer processes: trainer.workers=N",
            ) from None

    def pin(self) -> None:
        """Let the GPU read the buffers directly until they are gone. If the system forbids that, copies are slower."""
        if self.is_pinned:
            return
        self.is_pinned, cuda, buffers = True, torch.cuda.cudart(), self.buffers
        with torch.cuda.device(self.device):
            if int(cuda.cudaHostRegister(buffers.data_ptr(), buffers.nbytes, 0)) == 0:
                weakref.finalize(self, lambda: cuda.cudaHostUnregister(buffers.data_ptr())).atexit = False
            else:
                with suppress(RuntimeError):  # CUDA keeps the error, and the next kernel reports it as its own
                    torch.ones(1, device=self.device)

    def __getitem__(self, part: Part) -> tuple[int, type, list[Any]]:
        """Return the same as ``__getitems__``, for a batch that an EpochSampler chose."""
        return self.__getitems__(part)

    def __getitems__(self, chosen: Any) -> tuple[int, type, list[Any]]:
        """Return the number of the buffer that holds the pixels, the batch's type, and its other fields without tensors."""
        info = get_worker_info()
        assert info is not None
        buffer = info.id * (PREFETCH + 1) + self.turn
        self.turn = (self.turn + 1) % (PREFETCH + 1)
        batch = self.images.__getitems__(chosen, self.buffers[buffer].numpy())
        others = [field.numpy() if isinstance(field, Tensor) else field for field in batch[1:]]
        return buffer, type(batch), [len(batch[0]), *others]


class _Loader(DataLoader[Any]):
    """Turn what loader processes return into batches. Lightning creates this again from DataLoader's arguments."""

    dataset: _IntoBuffers

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        on_gpu = self.dataset.device.type == "cuda"
        if on_gpu:
            _copying_stream(self.dataset.device).synchronize()  # an epoch that was left may still be copying
        batches = super().__iter__()
        if on_gpu:
            self.dataset.pin()  # after the processes were started
        for buffer, batch_type, (count, *others) in batches:
            pixels, copied = _copy(self.dataset.buffers[buffer, :count], self.dataset.device)
            try:
                yield batch_type(pixels, *(_tensor(field, on_gpu) for field in others))
            finally:
                if copied:
                    copied.synchronize()  # before a process is told to fill this buffer again


def _tensor(field: Any, pinned: bool) -> Any:
    """Return a field of a batch as a tensor, if it is an array."""
    if not isinstance(field, np.ndarray):
        return field
    return torch.from_numpy(field).pin_memory() if pinned else torch.from_numpy(field)


def _copy(buffer: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy a buffer to a device. A GPU copies while it computes, and is done at the event that is returned."""
    if device.type != "cuda":
        return buffer.to(device, copy=True), None
    with torch.cuda.device(device):
        computing, copying = torch.cuda.current_stream(), _copying_stream(device)
        with torch.cuda.stream(copying):
            pixels = buffer.to(device, non_blocking=True)
        copied = copying.record_event()
        computing.wait_event(copied)
        pixels.record_stream(computing)
        return pixels, copied


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _already_a_batch(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Let a loader process outlive the signals that ask a run to stop, unless the main process itself sends SIGTERM.

    Terminals, timeout, Slurm and containers send signals to all processes of a run. If a loader ended, PyTorch would raise
    an error in the main process while that saves the run. The main process tells its loaders when to end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_main_process_says_so, daemon=True).start()


def _end_when_the_main_process_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
