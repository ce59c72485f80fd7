"""The folder of a run, runs/<name>/seed-<n>.

It holds config.yaml, metrics.csv, checkpoints/ and result.json, and a lock while a process works in it. A run never
overwrites another run's files. A stopped run resumes in its folder, exactly where it stopped.
"""

import csv
import errno
import hashlib
import re
import shutil
import socket
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from filelock import SoftFileLease
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from alexnet_repro.claims.results import read_result
from alexnet_repro.composition import task_overrides
from alexnet_repro.configs import groups, leaves, plain
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.files import plain_yaml, written_whole
from alexnet_repro.processes import rank
from alexnet_repro.training.checkpoints import kept, newest
from alexnet_repro.training.run_lock import is_alive, locked, owner_of

# Options for where and how a run works, not for what it computes. A run's name leaves them out, and a resumed run may
# change them.
RUNTIME_TRAINER = (
    "accelerator|devices|nodes|deterministic|compile|workers|checkpoint_minutes|keep_memory|"
    # of Lightning's Trainer; its others may change what a run computes
    "profiler|detect_anomaly|log_every_n_steps|num_sanity_val_steps|enable_model_summary|enable_progress_bar|inference_mode"
)
RUNTIME_OPTIONS = re.compile(
    r"(run|resume|dry_run|keep_epochs|logger|watch|placement)(\..*)?|data\.store|" + rf"trainer(\.({RUNTIME_TRAINER}))?"
)
IMAGES = "images_sha256"  # in config.yaml: which images the run is trained on, wherever they lie
PATIENCE = 30.0  # seconds that a process waits for the folder that process 0 creates
OURS = re.compile(r"lock|config\.yaml\.tmp")  # what a killed start may leave
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}  # as Hydra writes the values of a sweep's jobs
LONGEST_NAME = 200  # bytes; file systems allow 255


def run_name(recipe: str, overrides: Sequence[str], defaults: Sequence[str] = ()) -> str:
    """Return the name of a run: the recipe and what else the command line chose.

    For example paper, paper-no_lrn or paper-imagenette-epochs=2. Of a config group, the name has only the choice, and
    nothing if it is one of ``defaults`` (group=choice). A long name is cut, and ends with a hash of all of it.
    """
    parts = [recipe]
    first = ("ablation", "net", "data")
    typed = (override.lstrip("+").partition("=") for override in overrides)
    chosen = {key: value for key, _, value in typed}  # the last value of an option counts
    data = chosen.get("data", "photos")
    # whatever their order on the command line
    for key in sorted(chosen, key=lambda key: (first.index(key) if key in first else len(first), key)):
        value = PYTHON_WORDS.get(chosen[key], chosen[key])
        if key == "data.store" and (folder := Path(value.strip("'\"")).name) != data:
            parts.append(f"store={folder}")  # only its name, so that a copy on another disk gives the same name
        if key in ("recipe", "seed") or RUNTIME_OPTIONS.fullmatch(key) or f"{key}={value}" in defaults:
            continue
        is_group = key in groups()
        value = value.strip("[]'\"")
        if value not in ("none", ""):
            parts.append(value if is_group else f"{key}={value}")
    name = re.sub(r"[^\w.,=+-]+", "_", "-".join(parts)).strip("_")
    if len(name.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + "-" + digest
    return name


def choices(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the experiment that was chosen, and the options that no other field of a result records."""
    recorded = {
        "recipe",
        "seed",
        "data",
        "net",
        "ablation",
        "experiment",
        "pretraining",
        "scale",
        "epochs",
        "batch_size",
        "optim.lr",
        "data.store",
        "trainer.precision",
        "trainer.tf32",
        "schedule",  # listed below unless it is a run of the 2012 log
    }
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    others = [
        f"{key}={value}" for key, value in given.items() if key not in recorded and not RUNTIME_OPTIONS.fullmatch(key)
    ]
    if not re.fullmatch(r"log|run_\w+", given.get("schedule", "log")):
        others.append(f"schedule={given['schedule']}")
    chosen = {key: given.get(key) for key in ("experiment", "pretraining")}
    return {**chosen, "options": sorted(others)}


def named(folders: Any) -> list[Path]:
    """Return the folders that an option names: one, several, or none."""
    if folders is None:
        return []
    return [Path(str(folder)) for folder in (folders if OmegaConf.is_list(folders) else [folders])]


def open_run(run: Path, cfg: DictConfig, store: Store) -> SoftFileLease:
    """Lock, create or reopen the folder of a run, and write config.yaml. Return the lock, which the caller releases.

    Call refuse_taken first: it writes nothing into a folder that isn't a run.

    A folder without a checkpoint has nothing to lose, so the run starts again, with other options too.

    Raises UserError if the folder cannot be written or is in use, or if it holds a finished run, an unfinished run
    without resume=true, a run with other options or images, or something that isn't a run.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = locked(run)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{run} cannot be written: {error.strerror}", "choose another folder with run=PATH") from None
    try:
        refuse_taken(run, cfg, store)  # another process may have used it before the lock was free
        content = {**plain(cfg), IMAGES: store.images_sha256}
        with written_whole(run / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(content)).encode())
    except BaseException:
        lock.release()
        raise
    return lock


def finished_result(run: Path, called: str = "") -> Path:
    """Return the path of a finished run's result.json. Raise UserError, with what the run is called, for another run."""
    if not (run / "result.json").is_file():
        raise UserError(f"{called or run} holds no finished run", "finish it first: train with resume=true")
    return run / "result.json"


def wait_for(run: Path) -> None:
    """Wait until the run's folder has a lock, so that all processes see the same checkpoints.

    Raises UserError if it does not appear on this machine.
    """
    deadline = time.monotonic() + PATIENCE
    while not (run / "lock").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"process {rank()} on {socket.gethostname()} does not see {run}/lock, which process 0 creates",
                "either process 0 has failed, or the folder is not on a file system that all machines share",
            )
        time.sleep(0.2)


def abandon(run: Path) -> None:
    """Remove what a failed start left in the run's folder, unless there is a checkpoint of any kind."""
    if kept(run):
        return
    for name in ("config.yaml", "metrics.csv", "wandb-id", "checkpoints/new.ckpt"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "wandb", ignore_errors=True)
    remove_if_empty(run / "checkpoints")


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def refuse_taken(run: Path, cfg: DictConfig, store: Store) -> None:
    """Raise UserError if ``run`` cannot be started or resumed with this config. Write nothing."""
    if (run / "result.json").exists():
        read_result(run / "result.json", "centre")  # raises UserError, about this file alone, if it is damaged
        raise UserError(f"{run} holds a finished run", "choose another folder with run=PATH, or remove it to run again")
    if (run / "config.yaml").exists():
        if not newest(run):
            if weights := kept(run):
                raise UserError(
                    f"{run} holds the weights {', '.join(weights)} of a run, and no checkpoint from which it could resume",
                    "choose another folder with run=PATH, or move these weights away",
                )
            return
        if not cfg.resume:
            owner = owner_of(run / "lock")
            in_use = f", in use on {owner[1]}" if owner and is_alive(owner) else ""
            raise UserError(
                f"{run} holds an unfinished run{in_use}",
                "resume it with resume=true, choose another folder with run=PATH, or remove it",
            )
        refuse_differences(run, cfg, store)
    elif run.exists() and (not run.is_dir() or any(not OURS.match(path.name) for path in run.iterdir())):
        raise UserError(f"{run} is taken by something that isn't a run", "choose another folder with run=PATH")


def done_before(run: Path, cfg: DictConfig, store: Store) -> dict[str, Any] | None:
    """Return the result of a finished run, or None. Raise UserError if the run used other options."""
    if not (run / "result.json").exists():
        return None
    refuse_differences(run, cfg, store)
    found: dict[str, Any] = read_result(run / "result.json", "centre")
    return found


def refuse_differences(run: Path, cfg: DictConfig, store: Store) -> None:
    """Raise UserError if the run in ``run`` computes something else than ``cfg`` on these images.

    Where files lie and how the work is divided does not matter. An option that did not exist when the run started may
    have any value that the command line did not choose.
    """
    before, now = saved_config(run), OmegaConf.create({**plain(cfg), IMAGES: store.images_sha256})
    if (known := images_of(before, store)) is not None:
        before[IMAGES] = known
    old, new = (dict(leaves(DictConfig(config))) for config in (before, now))
    old.pop("store_sha256", None)
    chosen = {override.lstrip("+").partition("=")[0] for override in task_overrides()}
    keys = [
        key
        for key in {**old, **new}
        if not RUNTIME_OPTIONS.fullmatch(str(key)) and old.get(key) != new.get(key) and (key in old or key in chosen)
    ]
    if keys == [IMAGES]:
        raise UserError(
            f"the images of {cfg.data.store} are not those that {run} was trained on",
            "use the same store, or choose another folder with run=PATH",
        )
    if keys:
        raise UserError(
            f"{run} was started with other options: {', '.join(f'{k}={new.get(k)} (was {old.get(k)})' for k in keys[:3])}",
            "use the same options, or choose another folder with run=PATH",
        )


def images_of(config: DictConfig, store: Store) -> str | None:
    """Return the checksum of the images that a run was trained on, or None if its config does not say.

    Earlier versions named the store by its manifest. If it is the manifest of ``store``, the images are those of ``store``.
    """
    former = config.get("store_sha256")
    if IMAGES in config or former is None:
        return config.get(IMAGES)
    return store.images_sha256 if former == store.manifest_sha256 else str(former)


def _where_runs_are(run: Path) -> str:
    """Return which folders of runs a wrong name may stand for."""
    if seeds := sorted(path.parent.name for path in run.glob("*/config.yaml")):
        return f"it holds runs: choose one, such as {run / seeds[0]}"
    known = [str(path.parent) for path in run.parent.parent.glob("*/*/config.yaml")]
    if near := get_close_matches(str(run), known, 1, 0.5):
        return f"did you mean {near[0]}?"
    return "name a folder that train created, such as run=runs/paper/seed-0"


def saved_config(run: Path) -> DictConfig:
    """Return the config in a run's folder. Raise UserError if it is missing or damaged."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not the folder of a run", _where_runs_are(run))
    try:
        config = OmegaConf.create(plain_yaml(path))
        if not isinstance(config, DictConfig):
            raise ValueError("it holds no options")
        for group in ("data", "net", "ablation"):
            if not isinstance(config.get(group, {} if group == "ablation" else None), dict | DictConfig):
                raise ValueError(f"{group} is not a group of options")
        return config
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"{path} is damaged: {str(error).splitlines()[0]}", "remove the folder and train again"
        ) from None


def csv_logger(run: Path, steps_done: int) -> CSVLogger:
    """Return the logger of metrics.csv, keeping the existing rows of the first ``steps_done`` steps."""
    if rank() > 0:
        return CSVLogger(run, name="", version="")  # only process 0 writes
    path = run / "metrics.csv"
    rows: list[dict[str, str]] = []
    csv.field_size_limit(2**31 - 1)  # damage may leave a long line
    if path.exists() and steps_done:
        with path.open(newline="", errors="replace") as file:
            whole = (row for row in csv.DictReader(file) if (row.get("step") or "").isdigit())  # the last may be cut
            rows = [row for row in whole if int(row["step"]) < steps_done]
    path.unlink(missing_ok=True)  # Lightning would remove it with a warning
    logger = CSVLogger(run, name="", version="")
    if rows:
        logger.experiment.metrics_keys = sorted({key for row in rows for key in row})
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, logger.experiment.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
    return logger
