"""Many runs from one command line (-m): each job leaves its outcome, and the end is one table."""

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


def sweeping() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def leave_outcome(outcome: dict[str, Any]) -> None:
    """Write what became of this job into the sweep's folder: {"result": ...} or {"error": ...}."""
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {"overrides": list(hydra.overrides.task), **outcome}
    (folder / f"job-{hydra.job.num:04d}.json").write_text(json.dumps(outcome, indent=1))


def sweep_table(outcomes: list[dict[str, Any]]) -> str:
    """A line for each job: what it had that not all had, and its errors in percent or why there are none."""
    common = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes))
    jobs = [" ".join(o for o in outcome["overrides"] if o not in common) or "-" for outcome in outcomes]
    width = max(map(len, ("errors, %", *jobs)))
    lines = [f"  {'errors, %':<{width}}  one view: top-1   top-5   ten crops: top-1   top-5"]
    for job, outcome in zip(jobs, outcomes, strict=True):
        if "error" in outcome:
            lines.append(f"  {job:<{width}}  {outcome['error']}")
        else:
            views = (outcome["result"]["centre"], outcome["result"]["ten_crop"])
            one, five, ten_one, ten_five = (f"{view[f'top{k}_error']:.1f}" for view in views for k in (1, 5))
            lines.append(f"  {job:<{width}}  {one:>15} {five:>7} {ten_one:>18} {ten_five:>7}")
    return "\n".join(lines)


class TableAtTheEnd(Callback):
    """Hydra's callback: prints the table when all jobs have ended, with exit status 2 if one of them couldn't be done."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Gather what the jobs left."""
        folder = Path(config.hydra.sweep.dir)
        outcomes = [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]
        if outcomes:
            print(f"\n{sweep_table(outcomes)}\n{len(outcomes)} runs; this table's numbers are in {folder}")
        if any("error" in outcome for outcome in outcomes):
            raise SystemExit(2)
