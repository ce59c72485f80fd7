"""The folder of a run, runs/<name>/seed-<n>.

It holds config.yaml, metrics.csv, checkpoints/ and result.json. A run never overwrites another run's files. A stopped
run resumes in its folder, exactly where it stopped.
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

# Options for where and how a run works, not for what it computes. A run's name leaves them out, and a resumed run may
# change them.
RUNTIME_OPTIONS = re.compile(r"(run|resume|logger|watch|placement)(\..*)?|trainer(\.(?!precision).*)?")


def run_name(recipe: str, overrides: Sequence[str], defaults: Sequence[str] = ()) -> str:
    """Return the name of a run: the recipe and what else the command line chose.

    For example paper, paper-no_lrn or paper-imagenette-epochs=2. Of a config group, the name has only the choice, and
    nothing if it is one of ``defaults`` (group=choice).
    """
    parts = [recipe]
    first = ("ablation", "net", "data")  # regardless of the order on the command line
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
    """Return the experiment that was chosen, and the options that no other field of a result records."""
    recorded = {
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
        "trainer.precision",
        "schedule",  # listed below unless it is a run of the 2012 log
    }
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    others = [
        f"{key}={value}" for key, value in given.items() if key not in recorded and not RUNTIME_OPTIONS.fullmatch(key)
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
    """Create or reopen the folder of a run. Return the checkpoint to resume from, or None to start.

    Raises UserError if the folder holds a finished run, an unfinished run without resume=true, a run with other
    options, or something that isn't a run.
    """
    config = run / "config.yaml"
    if (run / "result.json").exists():
        raise UserError(f"{run} holds a finished run", "choose another folder with run=PATH, or remove it to run again")
    if config.exists():
        if not cfg.resume:
            raise UserError(
                f"{run} holds an unfinished run",
                "resume it with resume=true, choose another folder with run=PATH, or remove it",
            )
        _refuse_differences(run, cfg)
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} is taken by something that isn't a run", "choose another folder with run=PATH")
    run.mkdir(parents=True, exist_ok=True)
    config.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    last = run / "checkpoints" / "last.ckpt"
    return last if last.exists() else None


def done_before(run: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """Return the result of a finished run, or None. Raise UserError if the run used other options."""
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
            f"{run} was started with other options: {', '.join(f'{k}={new.get(k)} (was {old.get(k)})' for k in keys[:3])}",
            "use the same options, or choose another folder with run=PATH",
        )


def csv_logger(run: Path, steps_done: int) -> CSVLogger:
    """Return the logger of metrics.csv, keeping the existing rows of the first ``steps_done`` steps."""
    if rank() > 0:
        return CSVLogger(run, name="", version="")  # only process 0 writes
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
