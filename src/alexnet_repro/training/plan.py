"""Say what a run or the runs of a sweep would do, before any of them starts."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from alexnet_repro.claims.results import read_result
from alexnet_repro.composition import task_overrides
from alexnet_repro.configs import plain
from alexnet_repro.errors import UserError
from alexnet_repro.net.build import build
from alexnet_repro.training.checkpoints import newest
from alexnet_repro.training.progress import in_words
from alexnet_repro.training.run_folder import run_name
from alexnet_repro.training.setup import check, open_store

DEFAULTS = ("data=photos", "net=alexnet", "scale=full")


@dataclass
class Plan:
    """What a run would do: in which folder, what is there already, and how many bytes its checkpoints take at most."""

    run: Path
    state: str
    bytes: int
    seconds: float | None = None  # of a finished run

    def __str__(self) -> str:
        return f"{self.state:<10}  {self.run}"


def plan(cfg: DictConfig) -> Plan:
    """Return what ``train`` would do with these options, and write nothing.

    Raises UserError for options or a store that cannot be used.
    """
    check(cfg)
    embedded = cfg.data.source == "embedded" and not Path(str(cfg.data.store)).exists()  # train prepares it
    classes = 10 if embedded else len(open_store(cfg).classes)
    run = Path(str(cfg.run)) if cfg.run is not None else default_run(cfg)
    if (run / "result.json").exists():
        seconds = read_result(run / "result.json", "centre").get("seconds")
        return Plan(run, "finished", 0, seconds)
    state = "to do"
    if newest(run):
        state = "to resume" if cfg.resume else "unfinished: add resume=true"
    return Plan(run, state, checkpoint_bytes(cfg, classes))


def checkpoint_bytes(cfg: DictConfig, classes: int) -> int:
    """Return the size of the checkpoints that a run keeps: two to resume from, the best, and those of keep_epochs."""
    with torch.device("meta"):
        net = build(**{**plain(cfg.net), "classes": classes})
    weights = 4 * sum(p.numel() for p in net.parameters())
    return weights * (2 * 2 + 1 + len(cfg.keep_epochs))  # the optimizer holds a velocity for each weight


def default_run(cfg: DictConfig) -> Path:
    """Return runs/<name>/seed-<n>, where the name lists what the command line chose, in whatever order.

    If a folder has the same parts in another order, as earlier versions wrote them, that is the run's folder.
    """
    name, seed = run_name(cfg.recipe, task_overrides(), DEFAULTS), f"seed-{cfg.seed}"
    if not (Path("runs") / name / seed).exists():
        parts = sorted(name.split("-"))
        for folder in sorted(Path("runs").glob("*")):
            if sorted(folder.name.split("-")) == parts and (folder / seed).is_dir():
                return folder / seed
    return Path("runs") / name / seed


def refuse_shared_folders(plans: Sequence[Plan]) -> None:
    """Raise UserError if two jobs of a sweep would work in the same folder, so that one result would be shown for both."""
    run, count = Counter(plan.run for plan in plans).most_common(1)[0]
    if count > 1:
        first, second = [number for number, plan in enumerate(plans) if plan.run == run][:2]
        raise UserError(
            f"{run} is also the folder of job {first}: job {second} differs in options that change no result, or run=PATH is the same",
            "sweep over other options, or give each job a folder of its own: 'run=runs/NAME/seed-${seed}'",
        )


def summary(plans: Sequence[Plan]) -> str:
    """Return a line for each job of a sweep, and one with the time, judged by the finished ones, and the disk space."""
    left = [plan for plan in plans if plan.state != "finished"]
    seconds = [plan.seconds for plan in plans if plan.seconds is not None]
    time = (
        f"about {in_words(len(left) * statistics.median(seconds))} by the finished ones" if seconds else "time unknown"
    )
    size = sum(plan.bytes for plan in left) / 1e9
    total = f"{len(plans)} jobs, {len(left)} to do: {time}, up to {size:.1f} GB of checkpoints"
    return "\n".join([*map(str, plans), total])
