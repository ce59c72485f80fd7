"""A run's folder: runs/<name>/seed-<n> with config.yaml, metrics.csv, checkpoints/ and result.json.

Nothing in it is ever overwritten by another run; a run that was stopped goes on in it, exactly.
"""

import csv
import json
import os
import pickle
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from alexnet_repro.cli import CONF, Interrupted, UserError, leaves, rank

# Options that say where and how a run works, not what it computes: not part of its name, free to change when it goes on.
HOW = re.compile(r"(run|resume|logger|watch|placement)(\..*)?|trainer(\.(?!precision).*)?")


def run_name(recipe: str, overrides: Sequence[str], defaults: Sequence[str] = ()) -> str:
    """paper, paper-no_lrn, paper-imagenette-epochs=2: the recipe and what else the command line chose.

    Of a config group its choice is enough, and one that is the default anyhow (``defaults``: group=choice) adds nothing.
    """
    parts = [recipe]
    first = ("ablation", "net", "data")  # whatever the order on the command line
    chosen = [override.lstrip("+").partition("=") for override in overrides]
    for key, _, value in sorted(chosen, key=lambda part: first.index(part[0]) if part[0] in first else len(first)):
        if key in ("recipe", "seed") or HOW.fullmatch(key) or f"{key}={value}" in defaults:
            continue
        is_group = (Path(CONF) / key).is_dir()
        value = value.strip("[]'\"")
        if value not in ("none", ""):
            parts.append(value if is_group else f"{key}={value}")
    return re.sub(r"[^\w.,=+-]+", "_", "-".join(parts)).strip("_")


def choices(overrides: Sequence[str]) -> dict[str, Any]:
    """The experiment that the command line named, and its options that no other field of a result tells."""
    told: tuple[str, ...] = (
        "recipe",
        "seed",
        "data",
        "net",
        "ablation",
        "experiment",
        "epochs",
        "batch_size",
        "optim.lr",
        "data.store",
    )
    told = (*told, "trainer.precision", "schedule")  # replaying a run of the log is no option of one's own
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    others = [f"{key}={value}" for key, value in given.items() if key not in told and not HOW.fullmatch(key)]
    if not re.fullmatch(r"log|run_\w+", given.get("schedule", "log")):
        others.append(f"schedule={given['schedule']}")
    return {"experiment": given.get("experiment"), "options": sorted(others)}


def named(folders: Any) -> list[Path]:
    """The folders that an option names: one, several, or none."""
    if folders is None:
        return []
    return [Path(str(folder)) for folder in (folders if OmegaConf.is_list(folders) else [folders])]


def open_run(run: Path, cfg: DictConfig) -> Path | None:
    """Take the folder for this run; return the checkpoint to go on from, or None to begin.

    Raises UserError if another run is there: a finished one, an unfinished one without resume=true, or one of another config.
    """
    config = run / "config.yaml"
    if (run / "result.json").exists():
        raise UserError(
            f"{run} holds a finished run", "to keep it, choose another folder with run=PATH; to do it again, remove it"
        )
    if config.exists():
        if not cfg.resume:
            raise UserError(
                f"{run} holds an unfinished run",
                "go on with resume=true, choose another folder with run=PATH, or remove it",
            )
        _refuse_differences(run, cfg)
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} is taken by something that isn't a run", "choose another folder with run=PATH")
    run.mkdir(parents=True, exist_ok=True)
    config.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    last = run / "checkpoints" / "last.ckpt"
    return last if last.exists() else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, with its tensors left in the file. Raises UserError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged: {str(error).splitlines()[0]}",
            "remove it; without it the run begins anew",
        ) from None


def done_before(run: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The result of this very run, if the folder holds it finished. Raises UserError if it was made with other options."""
    if not (run / "result.json").exists():
        return None
    _refuse_differences(run, cfg)
    return json.loads((run / "result.json").read_text())


def _refuse_differences(run: Path, cfg: DictConfig) -> None:
    before, now = OmegaConf.load(run / "config.yaml"), OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    old, new = (dict(leaves(DictConfig(config))) for config in (before, now))
    keys = [key for key in {**old, **new} if not HOW.fullmatch(str(key)) and old.get(key) != new.get(key)]
    if keys:
        raise UserError(
            f"{run} was begun with other options: {', '.join(f'{k}={new.get(k)} (was {old.get(k)})' for k in keys[:3])}",
            "go on with the same ones, or choose another folder with run=PATH",
        )


def csv_logger(run: Path, steps_done: int) -> CSVLogger:
    """metrics.csv in the run's folder, keeping what an earlier part of the run wrote in its first ``steps_done`` steps."""
    if rank() > 0:
        return CSVLogger(run, name="", version="")  # which writes nothing there
    path = run / "metrics.csv"
    rows: list[dict[str, str]] = []
    if path.exists() and steps_done:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < steps_done]
    path.unlink(missing_ok=True)  # Lightning would remove it, with a warning
    logger = CSVLogger(run, name="", version="")
    if rows:
        logger.experiment.metrics_keys = sorted({key for row in rows for key in row})
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, logger.experiment.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
    return logger


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


def machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Hardware, versions, commit, command."""
    if device.type == "cuda":
        hardware = f"{processes} x {torch.cuda.get_device_name(device)}"
    else:
        hardware = f"{processes * torch.get_num_threads()} threads of {_processor()}"
    packages = ("alexnet_repro", "torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow")
    return {
        "machine": hardware,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": _commit(),
        "command": f"python -m {_module()} {shlex.join(sys.argv[1:])}".strip(),
    }


def circumstances(trainer: L.Trainer) -> dict[str, Any]:
    """What a number depends on besides the config."""
    facts = machine(trainer.strategy.root_device, trainer.world_size)
    return {
        "hardware": facts.pop("machine"),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        **facts,
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this package is in, with a + if it has uncommitted changes; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / "pyproject.toml").exists():
        return None
    try:
        git = ["git", "-C", os.fspath(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result so that it is there whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.rename(path)
