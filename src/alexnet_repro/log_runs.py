"""Which run of the authors' 2012 log has a given data set and ablation: schedule=log follows its epochs."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

# The log's runs of ablations; the baseline has one for each of the two data sets.
RUN_OF_ABLATION = {
    "one_gpu": "run_145_half",
    "non_overlapping_pooling": "run_147",
    "no_lrn": "run_148",
    "no_communication": "run_150",
}


def log_run(data: str, ablation: Mapping[str, Any]) -> str:
    """Return the name of the run, as in conf/schedule: that of a single ablation, else run 145 on that data.

    Data other than ILSVRC-2012 get run 145 on ILSVRC-2010. Combined ablations have no run in the log.
    """
    if len(ablation) == 1 and (run := RUN_OF_ABLATION.get(next(iter(ablation)))):
        return run
    return "run_145_2012" if data == "ilsvrc2012" else "run_145_2010"


def register(conf: str) -> None:
    """Make ``${log_run:data,ablation,key}`` available in the configs below the folder ``conf``."""

    @cache
    def schedule(name: str) -> dict[str, Any]:
        loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(conf) / "schedule" / f"{name}.yaml"))
        return loaded

    OmegaConf.register_new_resolver(
        "log_run", lambda data, ablation, key: schedule(log_run(data, ablation or {}))[key], replace=True
    )
