"""The LightningModule: a net, its training rule and its measurements."""

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from alexnet_repro.claims.scores import MEASURED, VIEWS, score
from alexnet_repro.data.augment import (
    COLOUR_UNITS,
    add_colour_noise,
    centre_crop,
    colour_noise_directions,
    jitter,
    nine_crop,
    subtract_mean,
    ten_crop,
)
from alexnet_repro.data.batches import TrainBatch, ValBatch
from alexnet_repro.data.module import replica_of
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.build import build, compiled
from alexnet_repro.net.lrn import at_least_float32
from alexnet_repro.training.checkpoints import FORMAT
from alexnet_repro.training.optim import ByHand, DivideWhenErrorStalls, PaperSGD, parameter_groups, scaled_epoch
from alexnet_repro.training.training_means import TrainingMeans

LOG_EVERY = 10  # updates between two logged values, on devices where reading a value makes the host wait
MEANS = ("patch", "centre")
RULES = ("when_error_stalls", "by_hand", "constant")


class Classifier(L.LightningModule):
    """A net with its training rule and everything needed to load it from a checkpoint.

    ``Classifier.load_from_checkpoint(path)`` needs no other arguments.

    net: name of the net, as in conf/net, and its keyword arguments.
    optim, schedule, augment, epochs: options that conf/recipe/paper.yaml explains.
    image_size: size of the store's images, in pixels. class_names: class of each label. seed: for the dropout masks.
    copied: layers that were copied from another net, and their learning rates, as in parameter_groups.
    mean (size, size, 3), covariance (3, 3): of the training images, on the 0-255 scale, stored as buffers.

    Raises ValueError for invalid values.
    """

    mean: Tensor
    noise_directions: Tensor

    def __init__(
        self,
        net: dict[str, Any],
        optim: dict[str, Any],
        schedule: dict[str, Any],
        augment: dict[str, Any],
        epochs: int,
        image_size: int,
        class_names: list[str],
        seed: int,
        mean: NDArray[np.float32] | None = None,
        covariance: NDArray[np.float64] | None = None,
        copied: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["mean", "covariance"], logger=False)
        self.net = build(**net).to(memory_format=torch.channels_last)
        self.classes = net["classes"]
        self.augment, self.crop, self.epochs, self.seed = augment, augment["crop"], epochs, seed
        self.image_size, self.class_names = image_size, class_names
        self.predicted_views = VIEWS[:2]  # the views that predict_step predicts, in this order
        self.predicts_scores = False  # what predict_step returns of each view: its scores, or its softmax
        if not 0 < self.crop <= image_size:
            raise ValueError(f"augment.crop={self.crop}: the images are {image_size}x{image_size}")
        for key, allowed in {"mean": MEANS, "colour_unit": COLOUR_UNITS}.items():
            if augment[key] not in allowed:
                raise ValueError(f"augment.{key}={augment[key]}: this must be one of {', '.join(allowed)}")
        if schedule["rule"] not in RULES:
            raise ValueError(f"schedule.rule={schedule['rule']}: this must be one of {', '.join(RULES)}")
        shape = (image_size, image_size, 3)
        self.register_buffer("mean", torch.zeros(shape) if mean is None else torch.from_numpy(mean.copy()))
        colour_covariance = torch.zeros(3, 3) if covariance is None else torch.from_numpy(covariance)
        self.register_buffer("noise_directions", colour_noise_directions(colour_covariance, augment["colour_unit"]))
        self._schedule_state: dict[str, Any] | None = None
        self._compiled: Callable[[Tensor], Tensor] | None = None  # the net's forward pass in training
        # one entry per epoch: its number from 1, updates so far, errors (%), losses (nats)
        self.history: list[dict[str, Any]] = []
        self.errors = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in MEASURED})
        self.training_means = TrainingMeans()

    @property
    def copied(self) -> dict[str, Any] | None:
        """Layers that were copied from another net, and their learning rates."""
        return self.hparams["copied"]

    @copied.setter
    def copied(self, value: dict[str, Any] | None) -> None:
        self.hparams["copied"] = value

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of mean-subtracted images (N, 3, 224, 224) on the 0-255 scale."""
        return self.net(images)

    def training_images(self, batch: TrainBatch) -> Tensor:
        """Return the augmented training input of a batch, (N, 3, 224, 224) float32 (Sections 2 and 4.1)."""
        with torch.autocast(self.device.type, enabled=False):
            return self._augmented(batch)

    def _augmented(self, batch: TrainBatch) -> Tensor:
        patches = batch.patches
        if self.augment["jitter"]:
            patches = jitter(patches, 1 + self.augment["jitter"] * batch.jitter)
        if self.augment["mean"] == "patch":
            images = subtract_mean(patches, self.mean, batch.tops, batch.lefts, batch.mirror)
        else:
            images = torch.sub(patches, self.mean_centre()).permute(0, 3, 1, 2)
        if self.colour_noise_is_on():
            add_colour_noise(images, self.noise_directions, batch.colour * self.augment["colour_noise"])
            images.div_(self.augment["colour_divisor"])
        return images

    def mean_centre(self) -> Tensor:
        """Return the centre patch of the mean image, (crop, crop, 3)."""
        return centre_crop(self.mean.permute(2, 0, 1), self.crop).permute(1, 2, 0)

    def colour_noise_is_on(self) -> bool:
        """Return whether the current epoch has colour noise.

        In the paper, every epoch has it. The 2012 run turned the noise off late in training.
        """
        until = self.augment["colour_noise_epochs"]
        of_epochs = self.hparams["schedule"]["by_hand"]["of_epochs"]
        in_effect = until is None or self.current_epoch < scaled_epoch(until, self.epochs, of_epochs)
        return bool(self.augment["colour_noise"]) and in_effect

    def compile_training(self, mode: str) -> None:
        """Compile training steps, as ``trainer.compile``. Evaluation is not compiled: its batches have other sizes."""
        torch.compiler.reset()  # a sweep's nets would count as one net compiled again and again, which PyTorch limits to 8 times
        self._compiled = compiled(self.net, mode)

    def draw_dropout(self, batch: TrainBatch) -> None:
        """Select the dropout masks of the current update."""
        if isinstance(self.net, AlexNet):
            self.net.dropout.draw_from(self.seed, self.global_step, batch.first)

    def loss(self, batch: TrainBatch) -> Tensor:
        """Return the multinomial logistic loss, averaged over the global batch (Sections 3.5 and 5).

        For one replica's part of the batch, return its contribution to the average.
        """
        self.draw_dropout(batch)
        logits = at_least_float32((self._compiled or self.net)(self.training_images(batch)))
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        self.training_means.update(batch.file, logits.detach(), batch.labels, losses.detach())
        return losses.sum() / batch.global_batch_size

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Return the loss of one update; log the loss and the learning rate.

        Values are logged every few updates where a GPU or another process would have to be waited for.
        """
        loss = self.loss(batch)
        _, replicas = replica_of(self.trainer)
        if (self.global_step + 1) % LOG_EVERY == 0 or (replicas == 1 and not self.waits()):
            logged = loss.detach().clone()
            if replicas > 1:
                logged = self.trainer.strategy.reduce(logged, reduce_op="mean") * replicas
            self.log("train/loss", logged, batch_size=batch.global_batch_size)
            self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss * replicas  # DDP averages gradients; multiply by the number of replicas to sum them

    def waits(self) -> bool:
        """Return whether reading a value makes the host wait for the device."""
        return self.device.type != "cpu"

    def views(self, batch: ValBatch, cut: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return mean-subtracted patches of whole images.

        cut: ``centre_crop`` for (N, 3, s, s); ``nine_crop`` or ``ten_crop`` for (N, crops, 3, s, s).
        """
        if self.augment["mean"] == "patch":
            return cut(torch.sub(batch.images, self.mean).permute(0, 3, 1, 2), self.crop)
        return cut(batch.images.permute(0, 3, 1, 2), self.crop) - self.mean_centre().permute(2, 0, 1)

    def validation_step(self, batch: ValBatch, batch_idx: int) -> None:
        """Measure top-1 error, top-5 error and log-loss on the centre patch."""
        softmax = at_least_float32(self.net(self.views(batch, centre_crop))).softmax(1)
        for name, values in zip(MEASURED, score(softmax, batch.labels).T, strict=True):
            self.errors[name].update(100 * values if name.endswith("error") else values)  # type: ignore[operator]

    def on_train_epoch_start(self) -> None:
        """Raise UserError if the store was changed since the last epoch."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            data.store.refuse_changes()

    def on_validation_epoch_end(self) -> None:
        """Log validation errors. After a training epoch, also log training errors and step the schedule.

        Logs val/top1_error and val/top5_error (percent) and val/log_loss (nats). A training epoch adds train/top1_error
        and train/log_loss, measured on each batch before its update.
        """
        errors = {f"val/{name}": metric.compute() for name, metric in self.errors.items()}  # type: ignore[operator]
        for metric in self.errors.values():
            metric.reset()  # type: ignore[operator]
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            means = self.training_means.compute()
            self.training_means.reset()
            errors |= {"train/top1_error": means[-1, 0], "train/log_loss": means[-1, 1]}
            val_error, watched = float(errors["val/top1_error"]), self._watched_split()
            entry = {
                "epoch": self.current_epoch + 1,
                "steps": self.global_step,
                "lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
                "train_error": round(float(means[-1, 0]), 4),
                "train_loss": round(float(means[-1, 1]), 5),
                f"{watched}_error": round(val_error, 4),
                f"{watched}_top5_error": round(float(errors["val/top5_error"]), 4),
                f"{watched}_loss": round(float(errors["val/log_loss"]), 5),
            }
            if len(means) > 2:  # for each stored batch file, as the 2012 program printed them
                entry["files"] = [[round(error, 4), round(loss, 5)] for error, loss in means[:-1].tolist()]
            self.history.append(entry)
            self.schedule.after_epoch(val_error)
        self.log_dict(errors, prog_bar=True)

    def _watched_split(self) -> str:
        return getattr(self.trainer.datamodule, "watched_split", "val")  # type: ignore[attr-defined]

    def predict_step(self, batch: ValBatch, batch_idx: int) -> tuple[Tensor, ...]:
        """Return the softmax (N, classes) of each of ``predicted_views``, which is the mean over the view's patches.

        With ``predicts_scores``, return the scores (N, 3) instead, as from ``scores.score``: the softmax of millions
        of images does not fit in memory.
        """
        softmax_by_view = self._softmax_by_view(batch)
        return tuple(score(softmax, batch.labels) if self.predicts_scores else softmax for softmax in softmax_by_view)

    def _softmax_by_view(self, batch: ValBatch) -> list[Tensor]:
        """Return the softmax (N, classes) of each of ``predicted_views``."""
        if self.predicted_views == ("centre",):
            return [at_least_float32(self.net(self.views(batch, centre_crop))).softmax(1)]
        parts = []
        for images in batch.images.split(16):  # limits the memory for ten patches per image
            part = ValBatch(images, batch.labels)
            softmax = self._softmax_of(self.views(part, ten_crop))
            views = {"centre": softmax[:, 4], "ten_crop": softmax.mean(1)}
            if "nine_crop" in self.predicted_views:
                views["nine_crop"] = self._softmax_of(self.views(part, nine_crop)).mean(1)
            parts.append([views[view] for view in self.predicted_views])
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def _softmax_of(self, crops: Tensor) -> Tensor:
        """Return the softmax (N, crops, classes) of crops (N, crops, 3, s, s)."""
        return at_least_float32(self.net(crops.flatten(0, 1))).softmax(1).unflatten(0, crops.shape[:2])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and create the schedule.

        on_validation_epoch_end steps the schedule, because Lightning would step it after saving the epoch's checkpoint.
        """
        optim, schedule = dict(self.hparams["optim"]), self.hparams["schedule"]
        momentum = optim.pop("momentum")
        optimizer = PaperSGD(parameter_groups(self.net, **optim, copied=self.copied), momentum=momentum)
        self.schedule: DivideWhenErrorStalls | ByHand
        if schedule["rule"] == "constant":
            self.schedule = ByHand(optimizer, self.epochs, of_epochs=1, changes={}, lr=optim["lr"])
        elif schedule["rule"] == "when_error_stalls":
            chance = 100 * (1 - 1 / self.classes)
            self.schedule = DivideWhenErrorStalls(optimizer, chance, **schedule["when_error_stalls"])
        else:
            self.schedule = ByHand(
                optimizer,
                self.epochs,
                of_epochs=schedule["by_hand"]["of_epochs"],
                changes=schedule["by_hand"]["changes"],
                lr=optim["lr"],
                copied=self.copied,
            )
        if self._schedule_state:
            self.schedule.load_state_dict(self._schedule_state)
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the format, the schedule's state, the history, and the training sums of the current epoch."""
        checkpoint["alexnet_repro"] = {"format": FORMAT}
        checkpoint["history"] = self.history
        if hasattr(self, "schedule"):
            checkpoint["schedule"] = self.schedule.state_dict()
        with self.training_means.sync_context():  # sums over all processes
            sums = self.training_means.sums.clone()
        # both towers of a replica count the same images
        checkpoint["training_means"] = sums / getattr(self._trainer and self._trainer.strategy, "towers", 1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history and the training sums.

        Keep the schedule's state for configure_optimizers, which Lightning calls later.
        """
        self.history = list(checkpoint["history"])
        self._schedule_state = checkpoint.get("schedule")
        if replica_of(self._trainer)[0] == 0:
            if "training_means" in checkpoint:
                self.training_means.sums = checkpoint["training_means"].to(self.training_means.sums)
            else:  # version 0.1 stored the mean error and the number of images, but no loss
                error, count = checkpoint["train_error"].float().tolist()
                self.training_means.sums = torch.tensor([[error / 100 * count, torch.nan, count]])
