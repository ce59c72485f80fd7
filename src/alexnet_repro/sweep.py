"""Sweeps (-m): each job writes its outcome to a file, and the sweep ends with one table."""

import json
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from alexnet_repro.errors import UserError


def sweeping() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def leave_outcome(outcome: dict[str, Any]) -> None:
    """Write the outcome of this job into the folder of the sweep: {"result": ...}, {"error": ...} or {"in_use": ...}."""
    outcome = {"overrides": list(HydraConfig.get().overrides.task), **outcome}
    _file_of_job(".json").write_text(json.dumps(outcome, indent=1, default=str))


def _file_of_job(suffix: str) -> Path:
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"job-{hydra.job.num:04d}{suffix}"


def refuse_second_job_of(run: Path) -> None:
    """Raise UserError if an earlier job of this sweep works in the folder ``run``, whose result would be shown for both."""
    own = _file_of_job(".run")
    own.write_text(str(run))
    for other in sorted(own.parent.glob("job-*.run")):
        if other < own and other.read_text() == str(run):
            raise UserError(
                f"{run} is also the folder of job {int(other.stem[4:])}: these options change no result, or run=PATH is the same",
                "start the jobs one by one, each with a run=PATH of its own",
            )


def sweep_table(outcomes: list[dict[str, Any]]) -> str:
    """Return a table with one line per job.

    A line has the options that not all jobs share, and the errors in percent, "done" for a command that measures none, or
    the message of a job that failed.
    """
    common = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes))
    jobs = [" ".join(o for o in outcome["overrides"] if o not in common) or "-" for outcome in outcomes]
    width = max(map(len, ("errors, %", *jobs)))
    lines = [f"  {'errors, %':<{width}}  one view: top-1   top-5   ten crops: top-1   top-5"]
    for job, outcome in zip(jobs, outcomes, strict=True):
        if told := outcome.get("error") or outcome.get("in_use"):
            lines.append(f"  {job:<{width}}  {told}")
        elif errors := _errors(outcome["result"] or {}):
            one, five, ten_one, ten_five = errors
            lines.append(f"  {job:<{width}}  {one:>15} {five:>7} {ten_one:>18} {ten_five:>7}")
        else:
            lines.append(f"  {job:<{width}}  done")
    if not any(_errors(outcome.get("result") or {}) for outcome in outcomes):
        del lines[0]
    return "\n".join(lines)


def _errors(result: dict[str, Any]) -> list[str]:
    """Return the top-1 and top-5 errors of one view and of ten crops, "-" for an unknown one, or [] without any errors."""
    views = [result.get(view, {}) for view in ("centre", "ten_crop")]
    found = [view.get(f"top{k}_error") for view in views for k in (1, 5)]
    return ["-" if error is None else f"{error:.1f}" for error in found] if any(views) else []


class TableAtTheEnd(Callback):
    """A Hydra callback that prints the table after the last job, and exits with status 2 if a job failed or none ran."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remove what an earlier sweep left in the same folder (hydra.sweep.dir=PATH)."""
        for ending in ("json", "run"):
            for path in Path(config.hydra.sweep.dir).glob(f"job-[0-9]*.{ending}"):
                path.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the outcomes of the jobs and print the table."""
        folder = Path(config.hydra.sweep.dir)
        outcomes = [json.loads(path.read_text()) for path in sorted(folder.glob("job-[0-9]*.json"))]
        if outcomes:
            print(
                f"\n{sweep_table(outcomes)}\n{len(outcomes)} job{'s' if len(outcomes) > 1 else ''}; this table's numbers are in {folder}"
            )
        else:
            print(
                "error: no job of the sweep left a result\n  an option without values, such as seed=range(2,0), makes no jobs",
                file=sys.stderr,
            )
            raise SystemExit(2)
        if any("in_use" in outcome for outcome in outcomes):
            print("Runs in use were skipped: another process does them. The same command shows their results later.")
        if any("error" in outcome for outcome in outcomes):
            raise SystemExit(2)
