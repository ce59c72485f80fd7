"""Decide when a run is saved: after epochs, every few minutes, and when a signal asks it to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from alexnet_repro.errors import Interrupted
from alexnet_repro.processes import rank
from alexnet_repro.provenance import hardware, versions

# A checkpoint that takes at most LONG_WRITING seconds to write is written after every epoch, however short. One that takes
# longer is written again at the end of an epoch only after WRITING_SHARE times as long.
LONG_WRITING, WRITING_SHARE = 0.25, 5


class KeepBest(ModelCheckpoint):
    """Keep best.ckpt, the epoch with the lowest validation error.

    Lightning forgets the best error of a run whose folder was moved, and would replace best.ckpt by a worse one.
    """

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint, as in version 0.1."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best error, wherever the folder is now."""

        def moved(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path  # noqa: PTH118, PTH119

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        super().load_state_dict(
            {
                **state_dict,
                **{key: moved(state_dict[key]) for key in paths},
                "best_k_models": {moved(path): score for path, score in state_dict["best_k_models"].items()},
                "dirpath": self.dirpath,
            }
        )


class KeepEpochs(Checkpoint):
    """Keep epoch-N.ckpt after each of the chosen epochs, without the optimiser's state: for measuring, not to resume.

    folder: of the run's checkpoints. epochs: numbers from 1.
    """

    def __init__(self, folder: Path, epochs: Sequence[int]) -> None:
        self.folder, self.epochs = folder, set(epochs)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the weights after the epoch and its validation."""
        if (number := trainer.current_epoch + 1) in self.epochs:
            trainer.save_checkpoint(self.folder / f"epoch-{number}.ckpt", weights_only=True)


class KeepLast(Checkpoint):
    """Write last.ckpt after every epoch, every few minutes, and when a signal asks the run to stop.

    Where an epoch is shorter than writing (a large net and few images on a GPU), only some epochs are saved, so that
    writing takes at most about a fifth of the time. The last epoch always is.

    After Ctrl-C, SIGTERM or SIGUSR1, the current update finishes, the run is saved, and training ends. A second Ctrl-C
    ends it at once, without saving. After SIGUSR1 in a Slurm job, the job is put back into the queue.

    path: path of last.ckpt. minutes: interval between checkpoints within an epoch.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self._asked_to_stop, self._asked_at, self._requeue = False, 0.0, False
        self._stops = False  # whether the run is saved and ends before its next update
        self._previous_handlers: dict[int, Any] = {}
        self._started_at = self._saved_at = time.monotonic()
        self._saved_epoch: int | None = None  # number from 0 of the last epoch that was saved at its end
        self._writing = 0.0  # seconds that it took to write the last checkpoint
        self._earlier_seconds = 0.0
        self.hardware: list[str] = []  # on which the run was trained, in order
        self.versions: list[str] = []  # of this package, with its commit, and of torch and Lightning

    @property
    def seconds(self) -> float:
        """Return the seconds spent on the run so far, including the time before it was resumed."""
        return self._earlier_seconds + time.monotonic() - self._started_at

    def state_dict(self) -> dict[str, Any]:
        """Return the time spent so far, on which hardware and with which versions."""
        return {"seconds": self.seconds, "hardware": self.hardware, "versions": self.versions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the time that was spent before the run was resumed, and on which hardware."""
        self._earlier_seconds = state_dict["seconds"]
        # earlier versions did not keep these
        self.hardware = list(state_dict.get("hardware", ["unknown hardware"]))
        self.versions = list(state_dict.get("versions", ["unknown versions"]))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install signal handlers. They replace Lightning's, which would end a run without saving it."""
        if (here := hardware(trainer.strategy.root_device, trainer.world_size)) not in self.hardware[-1:]:
            self.hardware.append(here)
        if (now := versions()) not in self.versions[-1:]:
            self.versions.append(now)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
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
        self._requeue = number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ
        if rank() == 0:
            print("\nstopping after this update; press Ctrl-C again to stop at once, without saving", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save within an epoch, if it is time or a signal asks the run to stop.

        Do nothing after the last batch of an epoch: on_train_epoch_end saves after validation.
        """
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if trainer.strategy.root_device.type != "cpu" and trainer.world_size > 1 and trainer.global_step % 20:
            return  # to agree makes a GPU wait
        stop, due = self._agree(trainer, 60 * self.minutes)
        if stop or due:
            self._save(trainer)
        self._stops = stop

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """End the run if it was asked to stop: now, after Lightning has logged the last update."""
        if self._stops:
            raise self._interrupted()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the epoch and its validation."""
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        stop, due = self._agree(trainer, WRITING_SHARE * self._writing if self._writing > LONG_WRITING else 0)
        if stop or due or is_last:
            self._save(trainer)
            self._saved_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop between two epochs if a signal asks the run to stop and the epoch before is saved."""
        if self._agree(trainer, 0)[0] and self._saved_epoch == trainer.current_epoch - 1:
            raise self._interrupted()

    def _agree(self, trainer: L.Trainer, seconds: float) -> tuple[bool, bool]:
        """Return whether to stop and whether to save, which is due after ``seconds``. One process's yes counts for all."""
        due = time.monotonic() - self._saved_at >= seconds
        if trainer.world_size == 1:
            return self._asked_to_stop, due
        device = trainer.strategy.root_device
        flags = torch.tensor([self._asked_to_stop, due], dtype=torch.float32, device=device)
        stop, due = (bool(share) for share in trainer.strategy.reduce(flags, reduce_op="mean"))
        return stop, due

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"saved in {self.path}; the same command with resume=true continues from there" + self._requeued()
        )

    def _requeued(self) -> str:
        if not self._requeue or rank() > 0:
            return ""
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            failure = done.stderr.strip() or "it failed" if done.returncode else ""
        except OSError as error:
            failure = str(error)
        return f"\ncould not requeue job {job}: {failure}" if failure else f"\njob {job} is back in the queue"

    def _save(self, trainer: L.Trainer) -> None:
        started = time.monotonic()
        new = self.path.with_name("new.ckpt")
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if self.path.exists():
                self.path.replace(self.path.with_name("previous.ckpt"))
            new.replace(self.path)  # a complete checkpoint exists at every moment
        self._saved_at = time.monotonic()
        self._writing = self._saved_at - started

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the signal handlers. Stop if a signal came after the last update."""
        self._restore_handlers()
        asked = torch.tensor(float(self._asked_to_stop), device=trainer.strategy.root_device)
        if bool(trainer.strategy.reduce(asked, reduce_op="mean")):
            raise self._interrupted()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
