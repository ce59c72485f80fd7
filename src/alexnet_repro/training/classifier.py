"""The LightningModule: a net, its training rule and its measurements."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from alexnet_repro.data.augment import COLOUR_UNITS, add_colour_noise, jitter, subtract_mean
from alexnet_repro.data.batches import TrainBatch
from alexnet_repro.data.module import StoreData, batches_done, replica_of
from alexnet_repro.net.build import compiled, parameters
from alexnet_repro.net.dropout import Dropout
from alexnet_repro.net.lrn import at_least_float32
from alexnet_repro.training.checkpoints import FORMAT
from alexnet_repro.training.measured_net import ForeignBatch, MeasuredNet
from alexnet_repro.training.optim import PaperSGD, parameter_groups
from alexnet_repro.training.recipes import AUGMENT, NET, OPTIM, SCHEDULE, recipe_options, with_changes
from alexnet_repro.training.schedule import RULES, make_schedule, scaled_epoch
from alexnet_repro.training.training_means import TrainingMeans

LOG_EVERY = 10  # updates between two logged values, on devices where reading a value makes the host wait
MEANS = ("patch", "centre")


class Classifier(MeasuredNet):
    """A net with its training rule, for any ``lightning.Trainer``. The defaults are the printed recipe.

    ``Classifier(classes=10)`` and a StoreData of the images are all that ``Trainer.fit`` needs: the mean image and the
    covariance come from its store. ``Classifier.load_from_checkpoint(path)`` needs no other arguments.

    Batches are those of StoreData, or (images, labels) of any other data: images (N, 3, crop, crop) float, RGB,
    mean-subtracted on the 0-255 scale, which are used as they are; labels (N,) int64.

    classes: number of classes; None: the length of ``class_names``, or 1000.
    net: what differs from AlexNet's defaults, by its keyword arguments; ``name`` chooses another net of conf/net.
    optim, schedule, augment: what differs from the printed recipe; conf/recipe/paper.yaml explains each option.
    epochs: length of the run, to which schedules by hand are scaled.
    image_size: size of the store's images, in pixels. class_names: class of each label. seed: for the dropout masks.
    mean (size, size, 3), covariance (3, 3): of the training images, on the 0-255 scale, stored as buffers.
    copied: layers that were copied from another net, and their learning rates, as in parameter_groups.

    Raises ValueError for invalid values.
    """

    def __init__(
        self,
        classes: int | None = None,
        net: Mapping[str, Any] = NET,
        optim: Mapping[str, Any] = OPTIM,
        schedule: Mapping[str, Any] = SCHEDULE,
        augment: Mapping[str, Any] = AUGMENT,
        epochs: int = 90,
        image_size: int = 256,
        class_names: list[str] | None = None,
        seed: int = 0,
        mean: NDArray[np.float32] | None = None,
        covariance: NDArray[np.float64] | None = None,
        copied: dict[str, Any] | None = None,
    ) -> None:
        optim, schedule = with_changes(OPTIM, optim), with_changes(SCHEDULE, schedule)
        augment = with_changes(AUGMENT, augment)
        self.classes = net.get("classes") or classes or len(class_names or []) or 1000
        if classes not in (None, self.classes) or (class_names and len(class_names) != self.classes):
            names = len(class_names or [])
            raise ValueError(f"classes={classes}: net.classes is {self.classes}, and there are {names} names")
        net = {**NET, **net, "classes": self.classes}
        if "image_size" in parameters(net["name"]):
            net = {"image_size": augment["crop"], **net}
        super().__init__(net, augment, image_size, mean, covariance)
        self.epochs, self.seed, self.named = epochs, seed, class_names is not None
        classes, class_names = self.classes, class_names or [str(label) for label in range(self.classes)]
        self.save_hyperparameters(ignore=["mean", "covariance"], logger=False)  # with the defaults filled in
        for key, allowed in {"mean": MEANS, "colour_unit": COLOUR_UNITS}.items():
            if augment[key] not in allowed:
                raise ValueError(f"augment.{key}={augment[key]}: this must be one of {', '.join(allowed)}")
        if schedule["rule"] not in RULES:
            raise ValueError(f"schedule.rule={schedule['rule']}: this must be one of {', '.join(RULES)}")
        self._schedule_state: dict[str, Any] | None = None
        self._compiled: Callable[[Tensor], Tensor] | None = None  # the net's forward pass in training
        # one entry per epoch: its number from 1, updates so far, errors (%), losses (nats)
        self.history: list[dict[str, Any]] = []
        self._validated: dict[str, float] = {}  # what the last validation of the current epoch measured
        self.training_means = TrainingMeans()

    @classmethod
    def from_recipe(cls, recipe: str, classes: int | None = None, epochs: int | None = None, **changes: Any) -> Self:
        """Return a Classifier with the recipe "paper" or "as_run", for the paper's data, and what differs from it.

        epochs: length of the run; None: that of the recipe. changes: other arguments of Classifier. Each of the groups
        net, optim, schedule and augment takes only what differs: ``net={"width": 0.25}``.

        Raises ValueError for an unknown recipe or an invalid value.
        """
        options = recipe_options(recipe)
        for group in ("net", "optim", "schedule", "augment"):
            changes[group] = with_changes(options[group], changes.get(group))
        if "crop" in changes["augment"] and "image_size" not in changes["net"]:
            changes["net"]["image_size"] = changes["augment"]["crop"]
        return cls(classes, epochs=options["epochs"] if epochs is None else epochs, **changes)

    @property
    def class_names(self) -> list[str]:
        """Class of each label."""
        return self.hparams["class_names"]

    def setup(self, stage: str) -> None:
        """Take the mean image, the covariance and the class names of a StoreData, unless these are known.

        Raises UserError if its images or classes are not those of this net.
        """
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StoreData):
            data.refuse_other_net(self.classes, self.image_size)
            if not self.mean.any():
                self.take_statistics(data.store.mean, data.store.covariance)
            if not self.named:
                self.hparams["class_names"] = data.store.classes
        if stage == "fit":
            self._check_trainer()

    def _check_trainer(self) -> None:
        """Warn of options of the Trainer with which the schedule does not do what it says."""
        rule = self.hparams["schedule"]["rule"]
        if rule == "when_error_stalls" and not self.trainer.limit_val_batches:
            rank_zero_warn(
                "The learning rate falls when the validation error stalls, and no validation images are measured: it never falls."
            )
        if rule == "by_hand" and self.trainer.max_epochs not in (None, -1, self.epochs):
            rank_zero_warn(
                f"The schedule is for {self.epochs} epochs, and the Trainer stops after {self.trainer.max_epochs}: "
                f"give Classifier epochs={self.trainer.max_epochs}, too."
            )

    @property
    def copied(self) -> dict[str, Any] | None:
        """Layers that were copied from another net, and their learning rates."""
        return self.hparams["copied"]

    @copied.setter
    def copied(self, value: dict[str, Any] | None) -> None:
        self.hparams["copied"] = value

    def training_images(self, batch: TrainBatch | ForeignBatch) -> Tensor:
        """Return the augmented training input of a batch, (N, 3, 224, 224) float32 (Sections 2 and 4.1)."""
        if not isinstance(batch, TrainBatch):
            return batch.images
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

    def draw_dropout(self, batch: TrainBatch | ForeignBatch) -> None:
        """Select the dropout masks of the current batch."""
        replica, _ = replica_of(self._trainer)
        first = batch.first if isinstance(batch, TrainBatch) else replica * len(batch.labels)
        # without gradient accumulation, the number of updates done
        batches = batches_done(self._trainer)
        for module in self.net.modules():
            if isinstance(module, Dropout):
                module.draw_from(self.seed, batches, first)

    def loss(self, batch: TrainBatch | ForeignBatch) -> Tensor:
        """Return the multinomial logistic loss, averaged over the global batch (Sections 3.5 and 5).

        For one replica's part of the batch, return its contribution to the average.
        """
        self.draw_dropout(batch)
        logits = at_least_float32((self._compiled or self.net)(self.training_images(batch)))
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        file = batch.file if isinstance(batch, TrainBatch) else 0
        self.training_means.update(file, logits.detach(), batch.labels, losses.detach())
        return losses.sum() / self._global_batch_size(batch)

    def _global_batch_size(self, batch: TrainBatch | ForeignBatch) -> int:
        if isinstance(batch, TrainBatch):
            return batch.global_batch_size
        return len(batch.labels) * replica_of(self._trainer)[1]  # a foreign loader gives all replicas the same number

    def training_step(self, batch: TrainBatch | ForeignBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch; log the loss and the learning rate.

        Values are logged every few updates where a GPU or another process would have to be waited for.
        """
        batch = self.understood(batch)
        loss = self.loss(batch)
        _, replicas = replica_of(self.trainer)
        if (self.global_step + 1) % LOG_EVERY == 0 or (replicas == 1 and not self.waits()):
            logged = loss.detach().clone()
            if replicas > 1:
                logged = self.trainer.strategy.reduce(logged, reduce_op="mean") * replicas
            self.log("train/loss", logged, batch_size=self._global_batch_size(batch))
            self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss * replicas  # DDP averages gradients; multiply by the number of replicas to sum them

    def waits(self) -> bool:
        """Return whether reading a value makes the host wait for the device."""
        return self.device.type != "cpu"

    def on_train_start(self) -> None:
        """End the epoch of a checkpoint that was saved between its last batch and its validation: Lightning does not."""
        if self.history and self.history[-1]["epoch"] < self.current_epoch:
            self._end_epoch(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Raise UserError if the store was changed since the last epoch."""
        if isinstance(data := getattr(self.trainer, "datamodule", None), StoreData):
            data.store.refuse_changes()

    def on_validation_epoch_end(self) -> None:
        """Log val/top1_error and val/top5_error (percent) and val/log_loss (nats)."""
        errors = self.validated()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._validated = {name: float(value) for name, value in errors.items()}
        self.log_dict({f"val/{name}": value for name, value in errors.items()}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Add the epoch to the history, step the schedule, and log the training errors.

        Lightning calls this after the epoch's validation, if there was one, and before checkpoint callbacks. It logs
        train/top1_error (percent) and train/log_loss (nats), measured on each batch before its update.
        """
        error, loss = self._end_epoch(self.current_epoch + 1)
        self.log_dict({"train/top1_error": error, "train/log_loss": loss}, prog_bar=True)

    def _end_epoch(self, number: int) -> Tensor:
        """Add an epoch to the history, and step the schedule. Return its training error and loss."""
        means = self.training_means.compute()
        self.training_means.reset()
        entry = {
            "epoch": number,
            "steps": self.global_step,
            "lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
            "train_error": round(float(means[-1, 0]), 4),
            "train_loss": round(float(means[-1, 1]), 5),
        }
        if validated := self._validated:
            watched = getattr(getattr(self.trainer, "datamodule", None), "watched_split", "val")
            entry[f"{watched}_error"] = round(validated["top1_error"], 4)
            entry[f"{watched}_top5_error"] = round(validated["top5_error"], 4)
            entry[f"{watched}_loss"] = round(validated["log_loss"], 5)
        if len(means) > 2:  # for each stored batch file, as the 2012 program printed them
            entry["files"] = [[round(error, 4), round(loss, 5)] for error, loss in means[:-1].tolist()]
        self.history.append(entry)
        self.schedule.after_epoch(validated.get("top1_error"))
        self._validated = {}
        return means[-1]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and create the schedule.

        on_train_epoch_end steps the schedule, because Lightning would step it after saving the epoch's checkpoint.
        """
        optim = dict(self.hparams["optim"])
        momentum = optim.pop("momentum")
        optimizer = PaperSGD(parameter_groups(self.net, **optim, copied=self.copied), momentum=momentum)
        self.schedule = make_schedule(
            optimizer, self.hparams["schedule"], self.epochs, optim["lr"], self.classes, self.copied
        )
        if self._schedule_state:
            self.schedule.load_state_dict(self._schedule_state)
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the format, the schedule's state, the history, and the training sums of the current epoch."""
        checkpoint["alexnet_repro"] = {"format": FORMAT}
        checkpoint["history"], checkpoint["validated"] = self.history, self._validated
        if isinstance(data := getattr(self._trainer, "datamodule", None), StoreData):
            checkpoint["images_sha256"] = data.store.images_sha256
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
        self.history, self._validated = list(checkpoint["history"]), checkpoint.get("validated", {})
        self._schedule_state = checkpoint.get("schedule")
        if replica_of(self._trainer)[0] == 0:
            if "training_means" in checkpoint:
                self.training_means.sums = checkpoint["training_means"].to(self.training_means.sums)
            else:  # version 0.1 stored the mean error and the number of images, but no loss
                error, count = checkpoint["train_error"].float().tolist()
                self.training_means.sums = torch.tensor([[error / 100 * count, torch.nan, count]])
