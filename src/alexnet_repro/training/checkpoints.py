"""Checkpoints: when they are written, what a signal does, and how they are read."""

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
    """A checkpoint's content, with its tensors left in the file. Raises UserError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged: {str(error).splitlines()[0]}",
            "remove it; without it the run begins anew",
        ) from None


class KeepLast(Checkpoint):
    """Write last.ckpt after every epoch, every so many minutes, and when the user or the system asks the run to stop.

    Ctrl-C and SIGTERM let the update in progress finish, save, and end the run; a second Ctrl-C ends it at once.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self._asked_to_stop, self._asked_at = False, 0.0
        self._before: dict[int, Any] = {}
        self._began = self._saved_at = time.monotonic()
        self._seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, in all its parts."""
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, float]:
        """The time goes into the checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on counting from what earlier parts took."""
        self._seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for signals, in place of Lightning's own handlers, which would end a run without saving it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask_to_stop)
            except ValueError:  # not in the main thread: whoever runs us there handles signals
                break

    def _ask_to_stop(self, number: int, frame: object) -> None:
        if self._asked_to_stop and number == signal.SIGINT:
            if time.monotonic() - self._asked_at > 1:  # and not the same one, passed on by a launcher
                raise KeyboardInterrupt(f"{self.path} is as it was last saved; resume=true goes on from there")
            return
        self._asked_to_stop, self._asked_at = True, time.monotonic()
        if rank() == 0:
            print("\nstopping after this update (Ctrl-C again: at once)", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save in the middle of an epoch. Not at its last batch: validation belongs to it, and saving comes right after."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        stop, due = self._agree(trainer)
        if stop or due:
            self._save(trainer)
        if stop:
            raise self._interrupted()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the epoch."""
        self._save(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop between two epochs."""
        if self._agree(trainer)[0]:
            raise self._interrupted()

    def _agree(self, trainer: L.Trainer) -> tuple[bool, bool]:
        """Whether to stop, and whether it's time to save: in all processes, as soon as it is so in one of them."""
        due = time.monotonic() - self._saved_at > 60 * self.minutes
        if trainer.world_size == 1:
            return self._asked_to_stop, due
        device = trainer.strategy.root_device
        if device.type != "cpu" and trainer.global_step % 20:  # asking makes a GPU wait
            return False, False
        wish = torch.tensor([self._asked_to_stop, due], dtype=torch.float32, device=device)
        stop, due = (bool(share) for share in trainer.strategy.reduce(wish, reduce_op="mean"))
        return stop, due

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"saved in {self.path}; the same command with resume=true goes on from there")

    def _save(self, trainer: L.Trainer) -> None:
        unfinished = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(self.path)  # beside it, so that there is a whole checkpoint at every moment
        self._saved_at = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
