"""Write and read checkpoints, and save the run when a signal asks it to stop.

A run keeps checkpoints/last.ckpt and the one before it, checkpoints/previous.ckpt. Each is a zip archive, as torch.save
writes it, with a CRC-32 for each of its parts.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from alexnet_repro.errors import Interrupted, UserError
from alexnet_repro.provenance import hardware, rank, written_whole

FORMAT = 1  # of checkpoints; checkpoints of version 0.1 have no format number
CHECKPOINTS = ("last", "previous", "best")
# A checkpoint that takes at most LONG_WRITING seconds to write is written after every epoch, however short. One that takes
# longer is written again at the end of an epoch only after WRITING_SHARE times as long.
LONG_WRITING, WRITING_SHARE = 0.25, 5
NEEDED = ("state_dict", "hyper_parameters", "global_step", "epoch")
NEEDED_TO_RESUME = ("optimizer_states", "loops", "callbacks", "history")


def newest(run: Path) -> Path | None:
    """Return the path of a run's newest checkpoint, or None if it has none."""
    paths = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    return next((path for path in paths if path.exists()), None)


def load_checkpoint(path: Path, to_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint with its tensors memory-mapped.

    to_resume: whether training is to continue from it, which requires more than the weights.

    Raises UserError if the file is damaged, if it isn't a checkpoint of this program, or if a weight is not finite.
    """
    other = path.with_name("previous.ckpt")
    remedy = "train again, or choose another checkpoint"
    if path.name == "last.ckpt":
        remedy = (
            f"remove it to continue from the one before it, {other}"
            if other.exists()
            else "remove it; the run then starts from the beginning"
        )
    try:
        if not path.stat().st_size:
            raise UserError(f"the checkpoint {path} is damaged: the file is empty", remedy)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"the checkpoint {path} is damaged: the checksum of its part {damaged} is wrong", remedy)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (zipfile.BadZipFile, struct.error, OSError):  # zipfile seeks to wherever a damaged archive says
        raise UserError(f"the checkpoint {path} is damaged: it is not a whole file of torch.save", remedy) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, NotImplementedError):
        raise UserError(f"{path} is not a checkpoint of alexnet_repro: torch can't read it", remedy) from None
    needed = NEEDED + (NEEDED_TO_RESUME if to_resume else ())
    missing = [key for key in needed if key not in checkpoint] if isinstance(checkpoint, dict) else list(needed)
    if missing:
        raise UserError(f"{path} is not a checkpoint of alexnet_repro: it has no {', '.join(missing)}", remedy)
    found = checkpoint.get("alexnet_repro", {"format": FORMAT})["format"]
    if found > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {found}, this version reads up to {FORMAT}", "install a newer version"
        )
    if not finite(checkpoint):
        raise UserError(f"the checkpoint {path} holds weights that are not finite numbers", remedy)
    return checkpoint


def refuse_other_weights(path: Path, checkpoint: dict[str, Any], model: L.LightningModule) -> None:
    """Raise UserError if a checkpoint's seed, or the names or shapes of its weights, are not those of ``model``."""
    seed = checkpoint["hyper_parameters"].get("seed", model.hparams["seed"])
    if seed != model.hparams["seed"]:
        raise UserError(
            f"{path} is not a checkpoint of this run: its seed is {seed}, not {model.hparams['seed']}",
            "put back the run's own checkpoint, or remove it to start from the beginning",
        )
    own, found = (
        {name: tuple(value.shape) for name, value in state.items()}
        for state in (model.state_dict(), checkpoint["state_dict"])
    )
    if own != found:
        name = next(name for name in {**own, **found} if own.get(name) != found.get(name))
        raise UserError(
            f"{path} is not a checkpoint of this run: its {name} has shape {found.get(name)}, not {own.get(name)}",
            "put back the run's own checkpoint, or remove it to start from the beginning",
        )


def finite(checkpoint: dict[str, Any]) -> bool:
    """Return whether all weights of a checkpoint are finite."""
    return all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values() if value.is_floating_point())


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


class KeepEpochs(Callback):
    """Keep epoch-N.ckpt after each of the chosen epochs, without the optimiser's state: for measuring, not to resume.

    folder: of the run's checkpoints. epochs: numbers from 1.
    """

    def __init__(self, folder: Path, epochs: Sequence[int]) -> None:
        self.folder, self.epochs = folder, set(epochs)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the weights after the epoch and its validation."""
        if (number := trainer.current_epoch + 1) in self.epochs:
            trainer.save_checkpoint(self.folder / f"epoch-{number}.ckpt", weights_only=True)


def kept(run: Path) -> list[str]:
    """Return the names of a run's checkpoints: last, previous, best, and epoch-N in the order of N."""
    names = [name for name in CHECKPOINTS if (run / "checkpoints" / f"{name}.ckpt").is_file()]
    numbers = [path.stem.removeprefix("epoch-") for path in (run / "checkpoints").glob("epoch-*.ckpt")]
    return names + [f"epoch-{number}" for number in sorted(map(int, filter(str.isdigit, numbers)))]


class OneFile(TorchCheckpointIO):
    """Write each checkpoint whole or not at all, in its own folder.

    Lightning would hold the whole file in memory and write it by way of TMPDIR.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. Raise UserError, and write nothing, if one of its weights is not finite."""
        if not finite(checkpoint):
            raise UserError(
                f"the weights are not finite after {checkpoint['global_step']} updates: training diverged",
                "start again with a lower optim.lr; the last good checkpoint is kept",
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # about the archive that a full disk cut off
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


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
        self._previous_handlers: dict[int, Any] = {}
        self._started_at = self._saved_at = time.monotonic()
        self._saved_epoch: int | None = None  # number from 0 of the last epoch that was saved at its end
        self._writing = 0.0  # seconds that it took to write the last checkpoint
        self._earlier_seconds = 0.0
        self.hardware: list[str] = []  # on which the run was trained, in order

    @property
    def seconds(self) -> float:
        """Return the seconds spent on the run so far, including the time before it was resumed."""
        return self._earlier_seconds + time.monotonic() - self._started_at

    def state_dict(self) -> dict[str, Any]:
        """Return the time spent so far, and on which hardware."""
        return {"seconds": self.seconds, "hardware": self.hardware}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the time that was spent before the run was resumed, and on which hardware."""
        self._earlier_seconds = state_dict["seconds"]
        self.hardware = list(state_dict.get("hardware", []))  # earlier versions did not keep it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install signal handlers. They replace Lightning's, which would end a run without saving it."""
        if (here := hardware(trainer.strategy.root_device, trainer.world_size)) not in self.hardware[-1:]:
            self.hardware.append(here)
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
        if stop:
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
