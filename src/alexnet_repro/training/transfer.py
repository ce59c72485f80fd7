"""Start a net from the layers of another one, as in pre-training (Section 6, Table 2)."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from alexnet_repro.errors import UserError
from alexnet_repro.training.checkpoints import load_checkpoint, newest
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.measurement import load_run
from alexnet_repro.training.run_folder import finished_result

# Options of a net that do not change what the layers of both nets compute.
FREE = {"classes", "conv6", "bottleneck", "init", "bias_init", "dropout"}


def start_from_pretrained(cfg: DictConfig, model: Classifier, run: Path) -> None:
    """Copy layers of the run ``cfg.pretrained.run`` into ``model``, and print which are copied and which are new.

    Layers are matched by name. The output layer is always new, unless it is named. If ``run`` has a checkpoint, from
    which it will be resumed, only the choice of layers is restored.

    Raises UserError if the two nets do not match.
    """
    options = cfg.pretrained
    if options.run is None:
        return
    rates = {"rate": options.rate, "conv1_rate": options.conv1_rate}
    if last := newest(run):
        copied = load_checkpoint(last)["hyper_parameters"].get("copied") or {"layers": []}
        model.copied = {**rates, "layers": copied["layers"]}
        return
    finished_result(Path(str(options.run)), f"pretrained.run={options.run}")
    source, _ = load_run(Path(str(options.run)), options.checkpoint)
    for key, value in source.hparams["net"].items():
        own = model.hparams["net"].get(key, value)
        if key not in FREE and own != value:
            raise UserError(
                f"pretrained.run={options.run} was trained with net.{key}={value}, this net has {own}",
                f"its layers would not compute the same: set net.{key}={value}, or choose another run",
            )
    theirs, ours = source.net.state_dict(), model.net.state_dict()
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in ours))
    available = {name.rpartition(".")[0] for name in theirs}
    chosen = (
        list(options.layers) if options.layers is not None else [n for n in layers if n in available - {layers[-1]}]
    )
    if unknown := [name for name in chosen if name not in layers or name not in available]:
        raise UserError(
            f"pretrained.layers: {'this net' if unknown[0] not in layers else options.run} has no layer {unknown[0]}",
            f"both have: {', '.join(name for name in layers if name in available)}",
        )
    for name, value in ours.items():
        if name.rpartition(".")[0] in chosen and (found := theirs[name].shape) != value.shape:
            raise UserError(
                f"pretrained.run={options.run}: its {name} has shape {tuple(found)}, this net's has {tuple(value.shape)}",
                f"copy only layers that are alike, for example pretrained.layers=[{','.join(_convolutions(chosen))}]",
            )
    with torch.no_grad():
        model.net.load_state_dict({**ours, **{n: v for n, v in theirs.items() if n.rpartition(".")[0] in chosen}})
    model.copied = {**rates, "layers": chosen}
    model.configure_optimizers()  # raises ValueError for rates that do not fit the schedule
    new = [name for name in layers if name not in chosen]
    print(f"from {options.run}: {', '.join(chosen)}; new: {', '.join(new) or 'none'}")


def _convolutions(layers: list[str]) -> list[str]:
    return [name for name in layers if name.startswith("conv") and name != "conv6"]


def in_result(cfg: DictConfig, model: Classifier) -> dict[str, Any]:
    """Return what result.json says about pre-training: nothing for a run without."""
    if cfg.pretrained.run is None:
        return {}
    assert model.copied is not None
    source = {"run": Path(str(cfg.pretrained.run)).as_posix(), "checkpoint": cfg.pretrained.checkpoint}
    return {"pretrained": {**source, **model.copied}}
