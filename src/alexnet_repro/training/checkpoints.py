"""Write and read checkpoints.

A run keeps checkpoints/last.ckpt and the one before it, checkpoints/previous.ckpt. Each is a zip archive, as torch.save
writes it, with a CRC-32 for each of its parts.
"""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from alexnet_repro.errors import UserError
from alexnet_repro.files import written_whole

FORMAT = 1  # of checkpoints; checkpoints of version 0.1 have no format number
CHECKPOINTS = ("last", "previous", "best")
NEEDED = ("state_dict", "hyper_parameters", "global_step", "epoch")
NEEDED_TO_RESUME = ("optimizer_states", "loops", "callbacks", "history")


def newest(run: Path) -> Path | None:
    """Return the path of a run's newest checkpoint, or None if it has none."""
    paths = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    return next((path for path in paths if path.exists()), None)


def load_checkpoint(path: Path, to_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint with its tensors memory-mapped.

    to_resume: whether training is to continue from it, which requires more than the weights.

    Raises UserError if the file is damaged, if it isn't a checkpoint of this program, or if a weight is not finite.
    """
    other = path.with_name("previous.ckpt")
    remedy = "train again, or choose another checkpoint"
    if path.name == "last.ckpt":
        remedy = (
            f"remove it to continue from the one before it, {other}"
            if other.exists()
            else "remove it; the run then starts from the beginning"
        )
    try:
        if not path.stat().st_size:
            raise UserError(f"the checkpoint {path} is damaged: the file is empty", remedy)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"the checkpoint {path} is damaged: the checksum of its part {damaged} is wrong", remedy)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (zipfile.BadZipFile, struct.error, OSError):  # zipfile seeks to wherever a damaged archive says
        raise UserError(f"the checkpoint {path} is damaged: it is not a whole file of torch.save", remedy) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, NotImplementedError):
        raise UserError(f"{path} is not a checkpoint of alexnet_repro: torch can't read it", remedy) from None
    needed = NEEDED + (NEEDED_TO_RESUME if to_resume else ())
    missing = [key for key in needed if key not in checkpoint] if isinstance(checkpoint, dict) else list(needed)
    if missing:
        raise UserError(f"{path} is not a checkpoint of alexnet_repro: it has no {', '.join(missing)}", remedy)
    found = checkpoint.get("alexnet_repro", {"format": FORMAT})["format"]
    if found > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {found}, this version reads up to {FORMAT}", "install a newer version"
        )
    if not finite(checkpoint):
        raise UserError(f"the checkpoint {path} holds weights that are not finite numbers", remedy)
    return checkpoint


def refuse_other_run(path: Path, checkpoint: dict[str, Any], model: L.LightningModule, images: str) -> None:
    """Raise UserError if a checkpoint is not of this run: by its options, its images or the shapes of its weights.

    images: checksum of the run's images. Checkpoints of earlier versions do not hold it, nor newer options.
    """
    remedy = "put back the run's own checkpoint, or remove it to start from the beginning"
    options, own_options = _leaves(checkpoint["hyper_parameters"]), _leaves(dict(model.hparams))
    for name in sorted(set(options) & set(own_options)):
        if options[name] != own_options[name] and not name.startswith(("copied", "class_names")):
            problem = f"its {name} is {options[name]}, not {own_options[name]}"
            raise UserError(f"{path} is not a checkpoint of this run: {problem}", remedy)
    if checkpoint.get("images_sha256", images) != images:
        raise UserError(f"{path} is not a checkpoint of this run: it was trained on other images", remedy)
    own, found = (
        {name: tuple(value.shape) for name, value in state.items()}
        for state in (model.state_dict(), checkpoint["state_dict"])
    )
    if own != found:
        name = next(name for name in {**own, **found} if own.get(name) != found.get(name))
        problem = f"its {name} has shape {found.get(name)}, not {own.get(name)}"
        raise UserError(f"{path} is not a checkpoint of this run: {problem}", remedy)


def _leaves(options: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of options, which may hold options."""
    if not isinstance(options, dict):
        return {prefix.rstrip("."): options}
    return {name: leaf for key, value in options.items() for name, leaf in _leaves(value, f"{prefix}{key}.").items()}


def finite(checkpoint: dict[str, Any]) -> bool:
    """Return whether all weights of a checkpoint are finite."""
    extremes = (
        torch.stack(value.aminmax())  # in one pass, and NaN if any is; isfinite() of all weights takes 20 times as long
        for value in checkpoint["state_dict"].values()
        if value.is_floating_point() and value.numel()
    )
    return all(bool(pair.isfinite().all()) for pair in extremes)


def kept(run: Path) -> list[str]:
    """Return the names of a run's checkpoints: last, previous, best, and epoch-N in the order of N."""
    names = [name for name in CHECKPOINTS if (run / "checkpoints" / f"{name}.ckpt").is_file()]
    numbers = [path.stem.removeprefix("epoch-") for path in (run / "checkpoints").glob("epoch-*.ckpt")]
    return names + [f"epoch-{number}" for number in sorted(map(int, filter(str.isdigit, numbers)))]


class OneFile(TorchCheckpointIO):
    """Write each checkpoint whole or not at all, in its own folder.

    Lightning would hold the whole file in memory and write it by way of TMPDIR.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. Raise UserError, and write nothing, if one of its weights is not finite."""
        if not finite(checkpoint):
            raise UserError(
                f"the weights are not finite after {checkpoint['global_step']} updates: training diverged",
                "start again with a lower optim.lr; the last good checkpoint is kept",
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # about the archive that a full disk cut off
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
