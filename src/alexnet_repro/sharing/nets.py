"""Load a trained net from a run, a checkpoint or a safetensors file, with what is known about it."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alexnet_repro.claims.results import read_result
from alexnet_repro.data.store import sha256
from alexnet_repro.errors import UserError, needed
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.training.checkpoints import CHECKPOINTS, finite
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.measurement import checkpoint_of, model_of
from alexnet_repro.training.run_folder import saved_config

AT_CHANCE = 0.98  # share of the error of guessing, above which a net counts as untrained
METADATA = "alexnet_repro"  # key of the description in a file of weights
ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/repo
RECORDED = (
    "recipe", "ablation", "experiment", "scale", "data", "seed", "epochs", "steps", "precision", "split", "images",
    "centre", "ten_crop", "versions", "commit", "command", "converted",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedNet:
    """A trained net, in evaluation mode, and what is known about it.

    facts: the fields RECORDED of its result, as far as there are any; ``validation_error`` in percent, for one view,
    after its last epoch. sha256: of the file that the weights came from.
    """

    model: Classifier
    facts: dict[str, Any]
    sha256: str

    @property
    def net(self) -> AlexNet:
        """The net itself. Raises UserError if it is not AlexNet."""
        if not isinstance(self.model.net, AlexNet):
            raise UserError(f"this is for net=alexnet, and not for net={self.model.hparams['net']['name']}")
        return self.model.net


def load_net(source: str | Path, *, checkpoint: str = "last", at_chance: bool = False) -> Classifier:
    """Return a trained net, in evaluation mode; ``load_net(...).net`` is the nn.Module without preprocessing.

    source: the folder of a run, a checkpoint (.ckpt), a file that ``export`` wrote (.safetensors), a folder that it wrote
    (format=hub), or "user/repo", such a folder on the Hugging Face hub, where there is no folder of this name.
    checkpoint: which one of a run's folder. at_chance: whether to load a net that does no better than guessing.

    Raises UserError if there is no such net, if the file is damaged, or if the net's recorded error is at chance.
    """
    return load(source, checkpoint=checkpoint, at_chance=at_chance).model


def load(source: str | Path, *, checkpoint: str = "last", at_chance: bool = False) -> TrainedNet:
    """Return a trained net with what is known about it. Arguments and errors are those of ``load_net``."""
    path = Path(source)
    if ON_HUB.fullmatch(str(source)) and not path.exists() and not path.parent.exists():
        path = _from_hub(str(source))
    if (path / "model.safetensors").is_file():  # what export format=hub wrote
        path = path / "model.safetensors"
    if (path.suffix in (".safetensors", ".ckpt") or path.is_file()) and checkpoint != "last":
        raise UserError(f"checkpoint={checkpoint} is for the folder of a run, and {source} is a file", "leave it out")
    if path.suffix == ".safetensors":
        trained = _from_safetensors(path)
    elif path.suffix == ".ckpt" or path.is_file():
        trained = _from_checkpoint(path, path.parent.parent)
    else:
        saved_config(path)  # raises UserError if the folder is not a run
        trained = _from_checkpoint(checkpoint_of(path, checkpoint), path)
    classes = len(trained.model.class_names)
    chance = 100 * (1 - 1 / classes)
    error = trained.facts.get("validation_error")
    if error is not None and error > AT_CHANCE * chance and not at_chance:
        raise UserError(
            f"{source} has an error of {error:.1f}%, and guessing one of its {classes} classes has {chance:.1f}%",
            "its features mean little; load it all the same with at_chance=true",
        )
    trained.model.eval()
    return trained


def _from_hub(repo: str) -> Path:
    """Return the path of a repo's weights, which huggingface_hub downloads or has in its cache."""
    needed("huggingface_hub", f"there is no folder {repo}, and to load it from the hub", "sharing")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, "model.safetensors"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"there is no folder {repo}, and the hub does not give it: {' '.join(str(error).split())[:120]}",
            "name the folder of a run, a .ckpt or .safetensors file, or a repo that export format=hub made",
        ) from None


def _from_checkpoint(path: Path, run: Path) -> TrainedNet:
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "name the folder of a run, or one of its checkpoints")
    model = model_of(path)
    facts: dict[str, Any] = {}
    if path.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        config = saved_config(run)
        facts = {key: config[key] for key in ("recipe", "seed", "converted") if key in config}
        if (run / "result.json").is_file() and path.stem in CHECKPOINTS[:1]:  # the result is that of the last weights
            result = read_result(run / "result.json", "centre")
            facts = {key: result[key] for key in RECORDED if result.get(key) is not None}
    if model.history:
        facts["validation_error"] = validation_error(model.history, model.training_means.sums)
        facts["epochs"] = model.history[-1]["epoch"]
    return TrainedNet(model, facts, sha256(path))


def validation_error(history: list[dict[str, Any]], sums: Tensor) -> float | None:
    """Return the error of a checkpoint's weights in percent, of the val images, or else of the test images.

    Returns None if it was not measured, because another epoch has begun since the last one of the history.

    history, sums: of the checkpoint. The sums are (files, 3), with the numbers of images of the current epoch last.
    """
    if not history or sums[:, -1].sum() > 0:
        return None
    return history[-1].get("val_error", history[-1].get("test_error"))


def _from_safetensors(path: Path) -> TrainedNet:
    needed("safetensors", "a .safetensors file")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, struct.error) as error:
        raise UserError(f"{path} is damaged, or not a safetensors file: {error}") from None
    if described is None:
        raise UserError(
            f"{path} does not say which net its weights are for: alexnet_repro did not write it",
            refusal(set(tensors)) or "write it with python -m alexnet_repro.export, or convert it first",
        )
    if not finite({"state_dict": tensors}):
        raise UserError(f"{path} holds weights that are not finite numbers")
    try:
        content = json.loads(described)
        model = Classifier(**content["hyper_parameters"])
        model.load_state_dict(tensors)
        return TrainedNet(model, dict(content["facts"]), sha256(path))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not fit the net that it describes: {' '.join(str(error).split())[:120]}"
        ) from None


def described(trained: TrainedNet, subtracts_mean: bool = False) -> dict[str, Any]:
    """Return the description that every exported file carries: what to know for using the weights.

    subtracts_mean: whether the file is a graph that subtracts the mean image itself.
    """
    model = trained.model
    return {
        "facts": trained.facts,
        "sha256_of_checkpoint": trained.sha256,
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "classes": model.class_names,
        "mean_rgb": [round(float(value), 4) for value in model.mean_centre().mean((0, 1))],
        "preprocessing": preprocessing(model, subtracts_mean),
        "hyper_parameters": dict(model.hparams),
    }


def preprocessing(model: Classifier, subtracts_mean: bool = False) -> str:
    """Say how an image becomes the net's input, or that of a graph that subtracts the mean image itself, in a sentence."""
    size, crop = model.image_size, model.crop
    scaled = (
        f"scale the shorter side of an RGB image to {size} pixels (bicubic, antialiased), cut the central {size}x{size}"
    )
    if subtracts_mean:
        return f"{scaled}, and cut the central {crop}x{crop}, with values from 0 to 255; the file subtracts the mean image itself"
    return f"{scaled}, subtract the mean image, on the 0-255 scale, and cut the central {crop}x{crop}; no division"


def refusal(names: set[str]) -> str:
    """Return why the weights with these names can't be taken, if they are those of a well-known other net."""
    if {"features.0.weight", "classifier.6.weight"} <= names:
        return (
            "it is torchvision's alexnet, another net: one tower with 64, 192, 384, 256 and 256 maps (Krizhevsky 2014), no "
            "normalisation, and inputs divided by their standard deviation"
        )
    return ""


def layers_with_weights(net: nn.Module) -> list[str]:
    """Return the names of the layers that have weights, from the first to the last."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in net.named_parameters()))
