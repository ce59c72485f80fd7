"""The folder of a run: runs/<name>/seed-<n> with config.yaml, metrics.csv, checkpoints/ and result.json.

No other run ever overwrites anything in it. A run that was stopped resumes in it, exactly.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from alexnet_repro.configs import CONF, leaves
from alexnet_repro.errors import UserError
from alexnet_repro.provenance import rank

# Options that say where and how a run works, not what it computes. They are not part of its name and may change on resuming.
RUNTIME_OPTIONS = re.compile(r"(run|resume|logger|watch|placement)(\..*)?|trainer(\.(?!precision).*)?")


def run_name(recipe: str, overrides: Sequence[str], defaults: Sequence[str] = ()) -> str:
    """Return a name from the recipe and what else the command line chose: paper-no_lrn, paper-imagenette-epochs=2.

    A config group contributes its choice only. ``defaults`` (group=choice) contribute nothing.
    """
    parts = [recipe]
    first = ("ablation", "net", "data")  # in any order on the command line
    chosen = [override.lstrip("+").partition("=") for override in overrides]
    for key, _, value in sorted(chosen, key=lambda part: first.index(part[0]) if part[0] in first else len(first)):
        if key in ("recipe", "seed") or RUNTIME_OPTIONS.fullmatch(key) or f"{key}={value}" in defaults:
            continue
        is_group = (Path(CONF) / key).is_dir()
        value = value.strip("[]'\"")
        if value not in ("none", ""):
            parts.append(value if is_group else f"{key}={value}")
    return re.sub(r"[^\w.,=+-]+", "_", "-".join(parts)).strip("_")


def choices(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the experiment that the command line named, and the options that no other field of a result records."""
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
    told = (*told, "trainer.precision", "schedule")  # replaying a run of the log is not an option of one's own
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    others = [
        f"{key}={value}" for key, value in given.items() if key not in told and not RUNTIME_OPTIONS.fullmatch(key)
    ]
    if not re.fullmatch(r"log|run_\w+", given.get("schedule", "log")):
        others.append(f"schedule={given['schedule']}")
    return {"experiment": given.get("experiment"), "options": sorted(others)}


def named(folders: Any) -> list[Path]:
    """Return the folders that an option names: one, several, or none."""
    if folders is None:
        return []
    return [Path(str(folder)) for folder in (folders if OmegaConf.is_list(folders) else [folders])]


def open_run(run: Path, cfg: DictConfig) -> Path | None:
    """Take the folder for this run. Return the checkpoint to resume from, or None to start from the beginning.

    Raises UserError if the folder holds another run: a finished one, an unfinished one without resume=true, or one of
    another config.
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


def done_before(run: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """Return the result of this very run if it is finished. Raise UserError if it was made with other options."""
    if not (run / "result.json").exists():
        return None
    _refuse_differences(run, cfg)
    return json.loads((run / "result.json").read_text())


def _refuse_differences(run: Path, cfg: DictConfig) -> None:
    before, now = OmegaConf.load(run / "config.yaml"), OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    old, new = (dict(leaves(DictConfig(config))) for config in (before, now))
    keys = [key for key in {**old, **new} if not RUNTIME_OPTIONS.fullmatch(str(key)) and old.get(key) != new.get(key)]
    if keys:
        raise UserError(
            f"{run} was begun with other options: {', '.join(f'{k}={new.get(k)} (was {old.get(k)})' for k in keys[:3])}",
            "go on with the same ones, or choose another folder with run=PATH",
        )


def csv_logger(run: Path, steps_done: int) -> CSVLogger:
    """Return the logger of metrics.csv, keeping the rows of the first ``steps_done`` steps of an earlier part of the run."""
    if rank() > 0:
        return CSVLogger(run, name="", version="")  # which writes nothing in these processes
    path = run / "metrics.csv"
    rows: list[dict[str, str]] = []
    if path.exists() and steps_done:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < steps_done]
    path.unlink(missing_ok=True)  # Lightning would remove it with a warning
    logger = CSVLogger(run, name="", version="")
    if rows:
        logger.experiment.metrics_keys = sorted({key for row in rows for key in row})
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, logger.experiment.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
    return logger
