"""Compare the options of a command with their schema, and say in two lines what is wrong."""

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from alexnet_repro.command_options import COMMANDS, UNUSED
from alexnet_repro.errors import UserError
from alexnet_repro.options import NETS, OnlyIf, by_hand, net_options


def check_options(cfg: DictConfig, command: str, given: list[str], default: Callable[[str], Any]) -> None:
    """Raise UserError for the first option of ``cfg`` that has an invalid value or no effect.

    given: the overrides on the command line. default: function that returns the default of an option, for the message.
    """
    model = COMMANDS[command]
    parts: list[tuple[type[BaseModel], str]] = [(model, "")]
    if "net" in model.model_fields:
        parts.insert(0, (_schema_of_net(cfg), "net"))
    for part, key in parts:
        try:
            part.model_validate(OmegaConf.to_container(cfg[key] if key else cfg, resolve=True))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            first["loc"] = (*([key] if key else []), *first["loc"])
            raise _told(first, cfg, default) from None
    conditions = [condition for part, key in parts for condition in _conditions(part, f"{key}." if key else "")]
    if command == "train":
        conditions.append(("schedule", by_hand))  # the group
    for override in given:
        key = override.lstrip("+~").partition("=")[0]
        if re.fullmatch(UNUSED[command], key):
            raise UserError(f"{override} has no effect on {command}", f"remove {key}")
        for condition in (condition for name, condition in conditions if name == key and not condition.holds(cfg)):
            other = re.sub(r"\{([\w.]+)\}", lambda name: str(OmegaConf.select(cfg, name[1])), condition.otherwise)
            raise UserError(f"{override} has no effect with {other}", condition.remedy)


def _schema_of_net(cfg: DictConfig) -> type[BaseModel]:
    """Return the schema of the net that ``cfg`` names. Raise UserError if there is no such net."""
    try:
        return net_options(str(cfg.net.name))
    except ValueError as error:
        raise UserError(str(error), "name a net of net/build.py") from None


def _conditions(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, OnlyIf]]:
    """Yield (dotted name of an option, its condition)."""
    for name, field in model.model_fields.items():
        for condition in (part for part in field.metadata if isinstance(part, OnlyIf)):
            yield f"{prefix}{name}", condition
        for part in _groups(field.annotation):
            yield from _conditions(part, f"{prefix}{name}.")


def _groups(annotation: Any) -> list[type[BaseModel]]:
    parts = getattr(annotation, "__args__", (annotation,))
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


WANTED = {  # pydantic's types of errors, and what a value must be
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a word",
    "list_type": "a list",
    "dict_type": "a mapping, such as {{name: value}}",
    "model_type": "a group of options",
    "finite_number": "a finite number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "one of {choices}",
    "string_pattern_mismatch": "last, previous, best or epoch-N",
}


def _told(error: ErrorDetails, cfg: DictConfig, default: Callable[[str], Any]) -> UserError:
    """Return what is wrong with an option in two lines."""
    location = [str(part) for part in error["loc"]]
    # without the branches of unions, which pydantic adds, too
    location = list(takewhile(lambda part: part.isidentifier() or part.lstrip("-").isdecimal(), location))
    key, value = ".".join(location), error["input"]
    context: Any = error.get("ctx", {})
    kind = error["type"]
    if kind == "extra_forbidden" and location[0] == "net" and cfg.net.name not in NETS:
        return UserError(f"net={cfg.net.name} has no option net.{location[-1]}", "leave it out")
    if kind == "extra_forbidden" and location[0] == "net":
        return UserError(
            f"net={cfg.net.name} has no option net.{location[-1]}",
            "the recipes paper and as_run are for net=alexnet; the other nets use recipe=cuda_convnet",
        )
    if kind == "extra_forbidden":
        return UserError(f"there is no option '{key}'", "list the options with --help")
    if kind == "missing" and location[0] == "net":
        return UserError(
            f"recipe={cfg.recipe} does not set net.{location[-1]}",
            "recipe=cuda_convnet is for net=locally_connected and net=four_layer, as in +experiment=cifar10_11pct",
        )
    if kind == "missing":
        return UserError(f"{key} has no value", f"set {key}=...")
    choices = _listed(context)
    wanted = (
        WANTED[kind].format(**context, choices=choices)
        if kind in WANTED
        else error["msg"].removeprefix("Input should be ")
    )
    usual = default(key)
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
    message = f"{key}={shown}: this must be {wanted}"
    if kind == "list_type" and isinstance(value, str):
        return UserError(message, f"write {key}=[{value}]")
    if kind == "literal_error":
        near = get_close_matches(str(value), choices.split(", "), 1, 0.8)
        return UserError(message, f"did you mean {key}={near[0]}?" if near else "")
    if usual is not None and _is_plain(usual) and usual != value and not isinstance(usual, bool):
        message += f", such as {usual}"
    return UserError(message)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _listed(context: dict[str, Any]) -> str:
    """Return the choices in pydantic's message, 'a', 'b' or 'c', as a, b, c."""
    words = re.findall(r"'([^']+)'|(\d+)", context.get("expected", ""))
    return ", ".join(word or number for word, number in words)
