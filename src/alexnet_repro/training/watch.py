"""Monitor training: report likely mistakes, and log statistics of activations and updates."""

import math
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from alexnet_repro.data.batches import TrainBatch
from alexnet_repro.errors import UserError
from alexnet_repro.training.classifier import LOG_EVERY, Classifier

RECENT = 50  # updates over which the loss is averaged
# The net has left its starting plateau when the mean loss is below this share of ln(classes), the loss of guessing.
LEFT_PLATEAU = 0.95


class Watchman(L.Callback):
    """End a run with a NaN or infinite loss, warn of likely mistakes, and log a summary of each layer.

    The warnings, each given once, are for a net that does not leave its starting plateau and for images that are not on
    the 0-255 scale.

    plateau_steps: number of updates after which a mean loss above 99% of ln(classes) is called a plateau.
    every: number of updates between two summaries, 0 for none. A summary has, for each layer, the mean absolute output
    of its neurons (``activation/conv1``), the share of outputs that are 0 (``silent/conv1``), and the norm of the last
    weight update divided by the norm of the weights (``update/conv1``).
    """

    def __init__(self, plateau_steps: int, every: int) -> None:
        self.plateau_steps, self.every = plateau_steps, every
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._plateau_checked = False
        # number of updates after which the mean loss of the last RECENT updates was first below LEFT_PLATEAU
        self.left_plateau: int | None = None

        self._pending: list[torch.Tensor] = []  # losses that are still on the device
        self._updates = 0  # number of updates done at the last pending loss
        self._threshold = 0.0  # LEFT_PLATEAU * ln(classes), nats

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to find the same ``left_plateau``."""
        self._record()
        return {"recent": list(self._recent), "left_plateau": self.left_plateau}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned."""
        self._recent.extend(state_dict["recent"])
        self.left_plateau = state_dict["left_plateau"]

    def _record(self) -> list[float]:
        """Fetch and return the pending losses; check whether the net has left its plateau."""
        losses = torch.stack(self._pending).tolist() if self._pending else []
        self._pending = []
        for updates, loss in enumerate(losses, self._updates - len(losses) + 1):
            self._recent.append(loss)
            mean = sum(self._recent) / len(self._recent)
            if self.left_plateau is None and len(self._recent) == RECENT and mean < self._threshold:
                self.left_plateau = updates
        return losses

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: TrainBatch, *_: Any
    ) -> None:
        """Check the images before the first update, and log activations every ``every`` updates."""
        assert isinstance(pl_module, Classifier)
        if trainer.global_step == 0:
            deviation = float(pl_module.training_images(batch).std())
            if deviation < 10:
                rank_zero_warn(
                    f"The training images have a standard deviation of {deviation:.2g}; on the 0-255 scale it is about 60. If "
                    "they were normalised, undo that: with initial weights from N(0, 0.01), the net hardly learns from "
                    "such inputs."
                )
        if self._is_due(trainer.global_step) and hasattr(pl_module.net, "activations"):
            pl_module.draw_dropout(batch)
            with torch.no_grad():
                seen = pl_module.net.activations(pl_module.training_images(batch))
            self._log(trainer, trainer.global_step, "activation", {name: x.abs().mean() for name, x in seen.items()})
            self._log(
                trainer, trainer.global_step, "silent", {name: (x == 0).float().mean() for name, x in seen.items()}
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Check the loss, and log update sizes every ``every`` updates."""
        assert isinstance(pl_module, Classifier)
        loss = outputs["loss"].detach()
        self._pending.append(loss)
        self._updates, self._threshold = trainer.global_step, LEFT_PLATEAU * math.log(pl_module.classes)
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not pl_module.waits() or trainer.global_step % LOG_EVERY == 0 or is_last:
            self._check_loss(self._record(), trainer, pl_module)
        step = trainer.global_step - 1  # the update just done
        if self._is_due(step):
            self._log(trainer, step, "update", update_sizes(pl_module.net, trainer.optimizers[0]))

    def _check_loss(self, losses: list[float], trainer: L.Trainer, model: Classifier) -> None:
        if bad := [loss for loss in losses if not math.isfinite(loss)]:
            raise UserError(
                f"the loss is {bad[0]} after {trainer.global_step} updates",
                f"the learning rate is probably too high: start again with less than optim.lr={model.hparams['optim']['lr']}; "
                "last.ckpt in the run's folder, if there is one, was saved before that and can be used",
            )
        plateau = math.log(model.classes)
        mean = sum(self._recent) / len(self._recent)
        if (
            self._plateau_checked
            or trainer.global_step < self.plateau_steps
            or len(self._recent) < min(RECENT, self.plateau_steps)
        ):
            return
        self._plateau_checked = True
        if mean > 0.99 * plateau:
            rank_zero_warn(
                f"After {trainer.global_step} updates the loss is {mean:.3f}, no better than guessing (ln {model.classes} = "
                f"{plateau:.3f}): the net is still on its starting plateau. With the paper's initial weights, N(0, 0.01) in "
                "every layer, it can stay there for thousands of updates; with net.init=as_run (0.03 in conv3 to conv5, as "
                "in the 2012 program), it soon leaves. If neither helps, try a higher optim.lr."
            )

    def _is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _log(self, trainer: L.Trainer, step: int, kind: str, values: dict[str, torch.Tensor]) -> None:
        # Processes hold different images or different towers, so average over them. For update/, this is the mean
        # of the towers' ratios.
        means = {
            f"{kind}/{name}": trainer.strategy.reduce(x.float(), reduce_op="mean").item() for name, x in values.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(means, step=step)


@torch.no_grad()
def update_sizes(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return, for each layer, the norm of the last weight update divided by the norm of the weights."""
    rates = {id(p): group["velocity_lr"] for group in optimizer.param_groups for p in group["params"]}
    sizes = {}
    for name, p in net.named_parameters():
        buffer = optimizer.state[p].get("momentum_buffer")
        if name.endswith(".weight") and buffer is not None:
            sizes[name.removesuffix(".weight")] = rates[id(p)] * buffer.norm() / p.norm()
    return sizes
