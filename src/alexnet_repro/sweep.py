"""Sweeps (-m): each job writes its outcome to a file, and the sweep ends with one table."""

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


def sweeping() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def leave_outcome(outcome: dict[str, Any]) -> None:
    """Write the outcome of this job into the folder of the sweep: {"result": ...}, {"error": ...} or {"in_use": ...}."""
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {"overrides": list(hydra.overrides.task), **outcome}
    (folder / f"job-{hydra.job.num:04d}.json").write_text(json.dumps(outcome, indent=1))


def sweep_table(outcomes: list[dict[str, Any]]) -> str:
    """Return a table with one line per job.

    A line has the options that not all jobs share, and the errors in percent or, for a failed job, the error message.
    """
    common = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes))
    jobs = [" ".join(o for o in outcome["overrides"] if o not in common) or "-" for outcome in outcomes]
    width = max(map(len, ("errors, %", *jobs)))
    lines = [f"  {'errors, %':<{width}}  one view: top-1   top-5   ten crops: top-1   top-5"]
    for job, outcome in zip(jobs, outcomes, strict=True):
        if told := outcome.get("error") or outcome.get("in_use"):
            lines.append(f"  {job:<{width}}  {told}")
        else:
            views = (outcome["result"]["centre"], outcome["result"]["ten_crop"])
            one, five, ten_one, ten_five = (f"{view[f'top{k}_error']:.1f}" for view in views for k in (1, 5))
            lines.append(f"  {job:<{width}}  {one:>15} {five:>7} {ten_one:>18} {ten_five:>7}")
    return "\n".join(lines)


class TableAtTheEnd(Callback):
    """A Hydra callback that prints the table after the last job, and exits with status 2 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the outcomes of the jobs and print the table."""
        folder = Path(config.hydra.sweep.dir)
        outcomes = [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]
        if outcomes:
            print(f"\n{sweep_table(outcomes)}\n{len(outcomes)} runs; this table's numbers are in {folder}")
        if any("in_use" in outcome for outcome in outcomes):
            print("Runs in use were skipped: another process does them. The same command shows their results later.")
        if any("error" in outcome for outcome in outcomes):
            raise SystemExit(2)
