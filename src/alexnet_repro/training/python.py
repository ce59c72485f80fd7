"""Train from Python, with the options of the command line."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexnet_repro.cli import check
from alexnet_repro.command_line import in_quotes
from alexnet_repro.composition import composed, given_overrides, options_of
from alexnet_repro.configs import config_file, groups
from alexnet_repro.provenance import TYPED
from alexnet_repro.training import run


def train(cfg: DictConfig | None = None, **options: Any) -> dict[str, Any]:
    """Start or resume one run, as ``python -m alexnet_repro.train`` does, and return the content of its result.json.

    options: those of the command line: ``train(data="imagenette", ablation="no_lrn", epochs=1, optim={"lr": 0.02})``.
    cfg: the config of conf/train.yaml instead, for a program with a ``hydra.main`` of its own.

    Raises UserError for options, stores or folders that cannot be used, and Interrupted if a signal stops the run, after
    saving it.
    """
    if cfg is not None and options:
        raise TypeError("train() takes a config or options, not both")
    if cfg is None:
        overrides = list(_overrides(options))
        cfg = composed("train", overrides)
    else:
        overrides = options_of(cfg, "train")
    with given_overrides(overrides):
        check(cfg, "train")
        os.environ[TYPED] = " ".join(["python -m alexnet_repro.train", *overrides])
        return run.train(cfg)


def _overrides(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield options as Hydra's overrides. A group that is not in use by default gets a +."""
    defaults = OmegaConf.load(config_file(".", "train")).defaults
    in_use = {next(iter(entry)) for entry in defaults if isinstance(entry, DictConfig)}
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _overrides(value, f"{name}.")
        else:
            yield f"{'+' if name in groups() and name not in in_use else ''}{name}={_written(value)}"


def _written(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value) if str(value).isidentifier() else in_quotes(str(value))
