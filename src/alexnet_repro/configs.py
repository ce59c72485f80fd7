"""Locate the config files, resolve schedule=log to a run of the authors' 2012 log, and give --help the files' text."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_packaged = Path(__file__).resolve().parent / "conf"  # in a wheel
CONF = str(_packaged if _packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf")  # in a checkout
CHECKOUT = Path(CONF).parent


_own: list[Path] = []  # the folder of --config-dir, if there is one


def search_also(folder: Path) -> None:
    """Look for configs in a user's own folder, too (``--config-dir``)."""
    if folder not in _own:
        _own.append(folder)


def groups() -> list[str]:
    """Return the names of the config groups: the folders of conf/ and of a user's own."""
    return sorted(
        {path.name for folder in (Path(CONF), *_own) if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    )


def members(group: str) -> list[str]:
    """Return the names of a config group's files."""
    return sorted({path.stem for folder in (Path(CONF), *_own) for path in (folder / group).glob("*.yaml")})


def config_file(group: str, name: str) -> Path:
    """Return the path of a config group's file, of conf/ if both have one."""
    paths = [folder / group / f"{name}.yaml" for folder in (Path(CONF), *_own)]
    return next((path for path in paths if path.is_file()), paths[0])


# The run of each ablation in the 2012 log. The baseline has one run for each of the two data sets.
RUN_OF_ABLATION = {
    "one_gpu": "run_145_half",
    "non_overlapping_pooling": "run_147",
    "no_lrn": "run_148",
    "no_communication": "run_150",
}


def log_run(data: str, ablation: Mapping[str, Any]) -> str:
    """Return the name, as in conf/schedule, of the run in the 2012 log that has this single ablation.

    Without such a run, return run 145 on ILSVRC-2012, or on ILSVRC-2010 for all other data. The log has no combined
    ablations.
    """
    if len(ablation) == 1 and (run := RUN_OF_ABLATION.get(next(iter(ablation)))):
        return run
    return "run_145_2012" if data == "ilsvrc2012" else "run_145_2010"


@cache
def _schedule(name: str) -> dict[str, Any]:
    loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF) / "schedule" / f"{name}.yaml"))
    return loaded


# ${log_run:data,ablation,key} in a config: the value of key in that run's schedule
OmegaConf.register_new_resolver(
    "log_run", lambda data, ablation, key: _schedule(log_run(data, ablation or {}))[key], replace=True
)

# ${command_file:train} in a config: the text of conf/train.yaml, as a template of string.Template, without Hydra's part
OmegaConf.register_new_resolver(
    "command_file",
    lambda name: (Path(CONF) / f"{name}.yaml").read_text().partition("\nhydra:")[0].strip().replace("$", "$$"),
    replace=True,
)


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value of a config that is not a mapping."""
    key: Any
    for key in node:
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the options as plain values, with all interpolations resolved."""
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    return content
