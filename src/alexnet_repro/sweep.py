"""Sweeps (-m): each job writes its outcome to a file, and the sweep ends with one table."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from alexnet_repro.errors import UserError


def sweeping() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


_plan: Callable[[list[list[str]]], str | None] | None = None


def before_first_job(plan: Callable[[list[list[str]]], str | None]) -> None:
    """Call ``plan`` with the overrides of all jobs before a sweep starts. It returns what to print instead of starting it."""
    global _plan
    _plan = plan


def jobs_of(config: DictConfig) -> list[list[str]]:
    """Return the overrides of each job, or nothing if a sweeper chooses them as it goes."""
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith("BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    return BasicSweeper.split_arguments(overrides, None)[0]


def leave_outcome(outcome: dict[str, Any]) -> None:
    """Write the outcome of this job into the folder of the sweep: {"result": ...}, {"error": ...} or {"in_use": ...}."""
    outcome = {"overrides": list(HydraConfig.get().overrides.task), **outcome}
    _file_of_job(".json").write_text(json.dumps(outcome, indent=1, default=str))


def _file_of_job(suffix: str) -> Path:
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"job-{hydra.job.num:04d}{suffix}"


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
    """A Hydra callback that checks all jobs before the first, and prints the table after the last.

    It exits with status 2 if a job failed or none ran.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check all jobs, and end a dry run. Remove what an earlier sweep left in the same folder (hydra.sweep.dir=PATH)."""
        try:
            if _plan is not None and (jobs := jobs_of(config)) and (told := _plan(jobs)):
                print(told)
                raise SystemExit(0)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        for path in Path(config.hydra.sweep.dir).glob("job-[0-9]*.json"):
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
