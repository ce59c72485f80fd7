"""Write a trained net for other programs, with its description."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig

from alexnet_repro.errors import UserError, needed
from alexnet_repro.files import written_whole
from alexnet_repro.sharing.card import model_card
from alexnet_repro.sharing.nets import METADATA, TrainedNet, described, load
from alexnet_repro.sharing.steps import ExportedNet

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torchscript": ".pt", "hub": "-hub"}
NEEDS = {"safetensors": "safetensors", "hub": "safetensors", "onnx": "onnx"}


def export(cfg: DictConfig) -> dict[str, Any]:
    """Write the net of ``cfg.run`` in ``cfg.format``.

    - safetensors: the weights, mean image and description; ``load_net`` and ``features`` read it.
    - onnx: a graph of RGB images from 0 to 255 to logits, with the mean image and the description in it.
    - torchscript: the same for torch.jit.load, with the description as its extra file "alexnet_repro".
    - hub: a folder with model.safetensors, config.json and a model card, as model hubs expect it.

    The default of ``cfg.out`` is in the run's folder. Returns the path. Raises UserError for an unusable option, a net
    at chance, or a path that exists.
    """
    if cfg.run is None:
        raise UserError("say which net to export: run=FOLDER", "for example run=runs/paper/seed-0")
    if package := NEEDS.get(cfg.format):
        needed(package, f"format={cfg.format}")
    source = Path(str(cfg.run))
    suffix = SUFFIXES[cfg.format]
    if source.is_dir():
        default = source / f"alexnet-{cfg.checkpoint}{suffix}"
    else:
        folder = source.parent.parent if source.parent.name == "checkpoints" else source.parent
        default = folder / f"alexnet-{source.stem}{suffix}"
    out = Path(str(cfg.out)) if cfg.out is not None else default
    if cfg.format != "hub" and out.suffix != suffix:
        raise UserError(f"out={out}: the name must end with {suffix}", f"for example out={out.stem}{suffix}")
    if out.exists():
        raise UserError(f"{out} exists", "remove it, or choose another name with out=PATH")
    trained = load(source, checkpoint=cfg.checkpoint, at_chance=cfg.at_chance)
    content = described(trained, cfg.format in ("onnx", "torchscript"))
    description = json.dumps(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    if cfg.format == "safetensors":
        _write_safetensors(trained, description, out)
    elif cfg.format == "hub":
        with TemporaryDirectory(dir=out.parent) as unfinished:  # a full disk leaves no half of the folder
            hub = Path(unfinished, "hub")
            hub.mkdir()
            _write_safetensors(trained, description, hub / "model.safetensors")
            (hub / "config.json").write_text(json.dumps(content, indent=1) + "\n")
            (hub / "README.md").write_text(model_card(trained, content))
            hub.rename(out)
    else:
        net = trained.net
        mean = trained.model.mean_centre().permute(2, 0, 1).contiguous()
        plain = ExportedNet(net, mean).eval()
        if cfg.format == "onnx":
            from alexnet_repro.sharing.onnx_file import write_onnx

            write_onnx(plain, trained.model.crop, len(trained.model.class_names), description, out)
        else:
            _write_torchscript(plain, trained.model.crop, description, out)
    print(f"written to {out}")
    return {"out": str(out)}


def _write_safetensors(trained: TrainedNet, description: str, path: Path) -> None:
    from safetensors.torch import save

    state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    with written_whole(path) as file:
        file.write(save(state, {METADATA: description}))


def _write_torchscript(net: ExportedNet, side: int, description: str, path: Path) -> None:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; sizes are constant in the file, as they should be
        traced = torch.jit.trace(net, torch.zeros(2, 3, side, side))
        with written_whole(path) as file:
            torch.jit.save(traced, file, _extra_files={METADATA: description})
