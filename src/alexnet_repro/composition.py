"""Compose the config of a command, and say what was chosen on its command line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from alexnet_repro.configs import CONF, search_also
from alexnet_repro.errors import UserError


def composed(name: str, options: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """Return the config of a command with these options; with_hydra: and Hydra's own, under the key hydra."""
    running = GlobalHydra.instance()
    if running.is_initialized() and any(
        path.path == f"file://{CONF}" for path in running.config_loader().get_search_path().get_path()
    ):
        return hydra.compose(name, list(options), return_hydra_config=with_hydra)  # in a command
    other, running.hydra = running.hydra, None  # of a program that calls this package
    try:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            return hydra.compose(name, list(options), return_hydra_config=with_hydra)
    finally:
        GlobalHydra.instance().hydra = other


_given: list[str] | None = None  # the overrides of a job that is planned, or of a call in Python


@contextmanager
def given_overrides(overrides: Sequence[str]) -> Iterator[None]:
    """Let ``task_overrides`` return these."""
    global _given
    before, _given = _given, list(overrides)
    try:
        yield
    finally:
        _given = before


def task_overrides() -> list[str]:
    """Return the overrides on the command line, as Hydra parsed them."""
    if _given is not None:
        return list(_given)
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def search_config_dir() -> None:
    """Let checks and names know the folder of --config-dir. Hydra knows it already."""
    for source in HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ():
        if source.provider == "command-line" and source.schema == "file":
            search_also(Path(source.path))


def instances(group: DictConfig, name: str) -> list[Any]:
    """Return the object of each entry of a config group that names a class with ``_target_``.

    Raises UserError, with the name of the group, if there is no such class or if it refuses its arguments.
    """
    made = []
    key: Any
    for key, entry in group.items():
        if isinstance(entry, DictConfig) and "_target_" in entry:
            try:
                made.append(hydra.utils.instantiate(entry))
            except HydraException as error:
                reason = str(error.__cause__ or error).splitlines()[0]
                raise UserError(
                    f"{name}.{key}: {entry['_target_']}: {reason}", f"correct the options {name}.{key}.*"
                ) from None
    return made


def options_of(cfg: DictConfig, name: str) -> list[str]:
    """Return the overrides that make ``cfg`` out of the defaults of a command, the groups' choices first."""
    chosen = [f"{key}={cfg[key]}" for key in ("recipe", "scale") if key in cfg]
    chosen += [f"{key}={cfg[key].name}" for key in ("data", "net", "placement") if key in cfg]
    if cfg.get("ablation"):
        chosen.append(f"+ablation=[{','.join(cfg.ablation)}]")
    usual, own = (OmegaConf.to_container(part, resolve=True) for part in (composed(name, chosen), cfg))
    return [*chosen, *_differences(usual, own)]


def _differences(usual: Any, own: Any, prefix: str = "") -> Iterator[str]:
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(usual.get(key), dict):
            yield from _differences(usual[key], value, f"{prefix}{key}.")
        elif value != usual.get(key):
            yield f"{prefix}{key}={value}"
