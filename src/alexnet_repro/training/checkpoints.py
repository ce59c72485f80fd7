"""Write and read checkpoints, and save the run when a signal asks it to stop."""

import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from alexnet_repro.errors import Interrupted, UserError
from alexnet_repro.provenance import rank


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with its tensors memory-mapped. Raise UserError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged: {str(error).splitlines()[0]}",
            "remove it; the run then starts from the beginning",
        ) from None


class KeepLast(Checkpoint):
    """Write last.ckpt after every epoch, every few minutes, and when a signal asks the run to stop.

    After Ctrl-C or SIGTERM, the current update finishes, the run is saved, and training ends. A second Ctrl-C ends it
    at once, without saving.

    path: path of last.ckpt. minutes: interval between checkpoints within an epoch.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self._asked_to_stop, self._asked_at = False, 0.0
        self._previous_handlers: dict[int, Any] = {}
        self._started_at = self._saved_at = time.monotonic()
        self._earlier_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds spent on the run so far, including the time before it was resumed."""
        return self._earlier_seconds + time.monotonic() - self._started_at

    def state_dict(self) -> dict[str, float]:
        """Return the time spent so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the time that was spent before the run was resumed."""
        self._earlier_seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install signal handlers. They replace Lightning's, which would end a run without saving it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous_handlers[number] = signal.signal(number, self._ask_to_stop)
            except ValueError:  # not in the main thread: the caller handles signals
                break

    def _ask_to_stop(self, number: int, frame: object) -> None:
        if self._asked_to_stop and number == signal.SIGINT:
            if time.monotonic() - self._asked_at > 1:  # sooner, it may be the same Ctrl-C, forwarded by a launcher
                raise KeyboardInterrupt(f"resume=true continues from the last checkpoint, {self.path}")
            return
        self._asked_to_stop, self._asked_at = True, time.monotonic()
        if rank() == 0:
            print("\nstopping after this update; press Ctrl-C again to stop at once, without saving", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save within an epoch, if it is time or a signal asks the run to stop.

        Do nothing after the last batch of an epoch: on_train_epoch_end saves after validation.
        """
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        stop, due = self._agree(trainer)
        if stop or due:
            self._save(trainer)
        if stop:
            raise self._interrupted()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the epoch and its validation."""
        self._save(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop between two epochs if a signal asks the run to stop."""
        if self._agree(trainer)[0]:
            raise self._interrupted()

    def _agree(self, trainer: L.Trainer) -> tuple[bool, bool]:
        """Return whether to stop and whether to save. If one process says yes, all processes return yes."""
        due = time.monotonic() - self._saved_at > 60 * self.minutes
        if trainer.world_size == 1:
            return self._asked_to_stop, due
        device = trainer.strategy.root_device
        if device.type != "cpu" and trainer.global_step % 20:  # the reduction makes a GPU wait
            return False, False
        flags = torch.tensor([self._asked_to_stop, due], dtype=torch.float32, device=device)
        stop, due = (bool(share) for share in trainer.strategy.reduce(flags, reduce_op="mean"))
        return stop, due

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"saved in {self.path}; the same command with resume=true continues from there")

    def _save(self, trainer: L.Trainer) -> None:
        unfinished = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(self.path)  # atomic, so that a complete checkpoint exists at every moment
        self._saved_at = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
