"""An index of trained nets: which checkpoints there are, how good they are, and their checksums."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import torch

from alexnet_repro.data.store import sha256
from alexnet_repro.errors import UserError
from alexnet_repro.sharing.nets import validation_error
from alexnet_repro.training.checkpoints import kept, load_checkpoint
from alexnet_repro.training.run_folder import saved_config

COLUMNS = ("run", "recipe", "ablation", "data", "seed", "checkpoint", "epoch", "validation error, %", "sha256")


def index(runs: Iterable[Path]) -> str:
    """Return the checkpoints of finished runs as CSV, except the ones before the last.

    The error is that of one view of the validation images after this epoch, in percent.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        try:
            config = saved_config(run)
        except UserError as error:
            print(f"not in the index: {error.problem}")
            continue
        for name in kept(run):
            if name == "previous":
                continue
            path = run / "checkpoints" / f"{name}.ckpt"
            try:
                checkpoint = load_checkpoint(path)
            except UserError as error:
                print(f"not in the index: {error.problem}")
                continue
            history = checkpoint.get("history") or []
            writer.writerow(
                [
                    run.as_posix(),
                    config.get("recipe"),
                    "+".join(config.get("ablation", {})) or "none",
                    config.data.name,
                    config.get("seed"),
                    name,
                    history[-1]["epoch"] if history else None,
                    validation_error(history, checkpoint.get("training_means", torch.zeros(1, 3))),
                    sha256(path),
                ]
            )
    return out.getvalue()
