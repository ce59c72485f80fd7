"""Rewrite what a user types so that Hydra's grammar takes it: paths, names of runs, options of Lightning's Trainer."""

import os
import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from alexnet_repro.configs import CONF

SWEEP = ("-m", "--multirun")
# Options whose values are paths.
PATHS = (
    "run", "runs", "of", "pretrained", "pretrained.run", "mistakes", "source", "data.store", "store", "results", "out", "classes",
)  # fmt: skip
FLAGS_WITH_VALUE = {"--cfg": "--cfg job", "-c": "-c job", "--config-dir": "--config-dir FOLDER", "-cd": "-cd FOLDER"}
FLAGS = re.compile(
    r"-(m|h|c|p|r|i|cp|cn|cd|sc)|--(multirun|help|hydra-help|version|cfg|package|resolve|info|run|config-path|config-name|"
    r"config-dir|shell-completion|experimental-rerun)(=.*)?"
)


def with_plus(argument: str) -> str:
    """Return trainer.X=value with a + before it if X is an option of Lightning's Trainer and none of conf/trainer."""
    key = argument.partition("=")[0]
    if not key.startswith("trainer.") or (Path(CONF) / "trainer" / "auto.yaml").read_text().find(f"\n{key[8:]}:") >= 0:
        return argument
    return f"+{argument}"


def quoted(argument: str, sweep: bool) -> str:
    """Return key=value with quotes around a value that Hydra's grammar does not take as it is.

    Names of runs contain = and commas, and paths may contain anything, and begin with ~/. The items of a list are quoted one by one. A comma
    separates the values of a sweep with -m, and the runs of runs=, unless it is part of a path that exists.
    """
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals or value in ("", "null") or value[0] in "'\"":
        return argument
    is_list = re.fullmatch(r"\[[^][\"']*\]", value) is not None  # one list, not the values of a sweep over lists
    if is_list and (key in PATHS or "=" in value):
        paths = [
            f"'{path}'" if key in PATHS or "=" in path else path for path in _paths(value[1:-1].split(",")) if path
        ]
        return f"{key}=[{','.join(paths)}]"
    if key in PATHS and value.startswith("~/"):  # not every shell expands it after a =
        value = str(Path(value).expanduser())
        argument = f"{key}={value}"
    several = "," in value and (sweep or key == "runs")
    if key in PATHS and (os.access(value, os.F_OK) if several else value[0] != "["):
        return f"{key}={in_quotes(value)}"
    try:
        OverridesParser.create().parse_override(argument)
        return argument
    except HydraException:
        return argument if value[0] in "[{" else f"{key}={in_quotes(value)}"


def _paths(parts: list[str]) -> list[str]:
    """Return the items of a list that was split at each comma, with the paths that exist and contain commas whole."""
    items = []
    while parts:
        last = next((n for n in range(len(parts), 1, -1) if os.access(",".join(parts[:n]).strip(), os.F_OK)), 1)
        items.append(",".join(parts[:last]).strip())
        parts = parts[last:]
    return items


def in_quotes(value: str) -> str:
    """Return a value in quotes, as Hydra's grammar wants it."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"
