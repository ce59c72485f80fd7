"""Read the layer and parameter files of the authors' 2012 program, with the log that its parameter files end with."""

import re
from collections.abc import Iterator
from configparser import ConfigParser
from configparser import Error as ConfigError
from dataclasses import dataclass, field
from pathlib import Path

from alexnet_repro.errors import UserError

FIRST_RATE = 0.01  # of weights, with which the log's runs begin ("set epsw to 0.001 from 0.01")
# "set epsw to 0.001 from 0.01 on conv1, 0.00001 elsewhere", with everything after the first rate optional
_CHANGE = re.compile(r"set eps\w*\s+\w+\s+([\d.]+)(?: from ([\d.]+))?(?: on (conv1))?(?:, ([\d.]+) elsewhere)?")


@dataclass(frozen=True)
class Layer:
    """One layer of a layer file, with the options of both files."""

    name: str
    kind: str  # data, conv, cmrnorm, rnorm, pool, fc, hs, softmax or cost.logreg
    options: dict[str, str]

    @property
    def inputs(self) -> list[str]:
        """Names of the layers that this one reads."""
        return [part.strip() for part in self.options.get("inputs", "").split(",") if part.strip()]

    def number(self, option: str, default: float | None = None, place: int = 0) -> float:
        """Return an option's number for the input in this place. Raise UserError if it is missing or is no number."""
        parts = self.options.get(option, "").split(",")
        text = (parts[place] if place < len(parts) else parts[0]).strip()
        if not text and default is not None:
            return default
        try:
            return float(text)
        except ValueError:
            raise UserError(
                f"layer {self.name} has no number as its {option}: {text or 'nothing'}",
                "take the released files as they are",
            ) from None


@dataclass
class Log:
    """What the comments of a parameter file say about a run, for each of its epochs."""

    epochs: int  # after which the run was ended
    conv1: list[float] = field(default_factory=list)  # learning rate of the weights of conv1
    others: list[float] = field(default_factory=list)  # and of the other layers
    noise: list[bool] = field(default_factory=list)  # whether there was colour noise


def read_layers(folder: Path, name: str) -> tuple[list[Layer], Log]:
    """Read layers-NAME.cfg and layer-params-NAME.cfg, wherever they are below ``folder``.

    Several parameter files may belong to one layer file: 145-2010 has that of 145.

    Raises UserError if a file is missing or damaged, or if its log does not say how the run ended.
    """
    params_file = _find(folder, [f"layer-params-{name}.cfg"])
    layers_file = _find(folder, [f"layers-{name}.cfg", f"layers-{name.rpartition('-')[0]}.cfg"])
    layers, params = _parse(layers_file), _parse(params_file)
    found = [
        Layer(section, layers[section].get("type", ""), {**layers[section], **params.get(section, {})})
        for section in layers
    ]
    known: set[str] = set()
    for layer in found:
        if unknown := set(layer.inputs) - known:
            raise UserError(f"{layers_file}: {layer.name} reads {sorted(unknown)[0]}, which is not above it")
        known.add(layer.name)
    return found, _read_log(params_file)


def _find(folder: Path, names: list[str]) -> Path:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "set source= to the released source code of 2012")
    for name in names:
        if found := sorted(folder.rglob(name)):
            return found[0]
    raise UserError(
        f"there is no {names[0]} in {folder}",
        "set source= to the released source code of 2012, and layers= to the name of a run, such as 145",
    )


def _parse(file: Path) -> dict[str, dict[str, str]]:
    parser = ConfigParser(comment_prefixes=("#",), inline_comment_prefixes=("#",), interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # names keep their capital letters
    try:
        parser.read_string(file.read_text(errors="replace"))
    except ConfigError as error:
        raise UserError(f"{file} is not a layer file: {str(error).splitlines()[0]}") from None
    return {section: dict(parser[section]) for section in parser.sections()}


def _read_log(file: Path) -> Log:
    log, conv1, others, noise = Log(0), FIRST_RATE, FIRST_RATE, True
    for epoch, text in _entries(file.read_text(errors="replace")):
        while len(log.others) < epoch:
            log.conv1.append(conv1)
            log.others.append(others)
            log.noise.append(noise)
        for change in _CHANGE.finditer(text):
            rate, was, only, elsewhere = change.groups()
            if only:
                conv1, others = float(rate), float(elsewhere) if elsewhere else others
            else:  # without a layer, it concerns those that had the rate before
                conv1 = float(rate) if was is None or float(was) == conv1 else conv1
                others = float(rate)
        if "color noise to 0" in text:
            noise = False
        if "killed" in text:
            log.epochs = epoch
            return log
    raise UserError(f"the comments of {file} do not say after which epoch the run was killed", "choose another run")


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """Yield (epoch, text) for each entry of the log, with the lines that continue it."""
    epoch, parts = None, []
    for line in text.splitlines():
        if not line.startswith("#"):
            continue
        begun = re.match(r"#\s*epoch (\d+)\s*:(.*)", line)
        if begun or not line.startswith("#  "):
            if epoch is not None:
                yield epoch, " ".join(parts)
            epoch, parts = (int(begun[1]), [begun[2].strip()]) if begun else (None, [])
        else:
            parts.append(line[1:].strip())
    if epoch is not None:
        yield epoch, " ".join(parts)
