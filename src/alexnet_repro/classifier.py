"""A net, the training rule and the measurements, as a LightningModule."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from alexnet_repro import augment
from alexnet_repro.data import TrainBatch, ValBatch
from alexnet_repro.net import AlexNet
from alexnet_repro.optim import DivideWhenErrorStalls, PaperSGD


def top_k_misses(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N, classes), (N,) -> (N,): 1 where the label isn't among the k highest scores, else 0.

    A label tied for the last of the k places counts fractionally, as in the 2012 code. A NaN score is a miss.
    """
    own = scores.gather(1, labels[:, None])
    higher, equal = (scores > own).sum(1), (scores == own).sum(1)
    return 1 - ((k - higher) / equal.clamp(min=1)).clamp(0, 1) * own.isfinite().squeeze(1)


class Classifier(L.LightningModule):
    """AlexNet with everything that its checkpoint needs to be used again: ``Classifier.load_from_checkpoint(path)``.

    net: keyword arguments of AlexNet. optim: lr, momentum, weight_decay. schedule: factor, times, patience, threshold.
    colour_noise: standard deviation of alpha_i in Section 4.1, 0 for none. seed: of dropout's masks.
    mean (size, size, 3) and covariance (3, 3), 0-255: of the training images; in a checkpoint they are buffers.
    """

    mean: Tensor
    noise_directions: Tensor

    def __init__(
        self,
        net: dict[str, Any],
        optim: dict[str, Any],
        schedule: dict[str, Any],
        colour_noise: float,
        crop: int,
        image_size: int,
        seed: int,
        mean: NDArray[np.float32] | None = None,
        covariance: NDArray[np.float64] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["mean", "covariance"], logger=False)
        self.net = AlexNet(**net).to(memory_format=torch.channels_last)
        self.classes = self.net.fc8.out_features
        self.colour_noise, self.crop, self.seed = colour_noise, crop, seed
        shape = (image_size, image_size, 3)
        self.register_buffer("mean", torch.zeros(shape) if mean is None else torch.from_numpy(mean.copy()))
        known = torch.zeros(3, 3) if covariance is None else torch.from_numpy(covariance)
        self.register_buffer("noise_directions", augment.colour_noise_directions(known))
        self._schedule_state: dict[str, Any] | None = None
        self.errors = nn.ModuleDict({"top1_error": MeanMetric(), "top5_error": MeanMetric()})

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 224, 224), 0-255 and mean-subtracted -> logits (N, classes)."""
        return self.net(images)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The loss of Section 5: multinomial logistic regression, averaged over the batch."""
        images = augment.subtract_mean(batch.patches, self.mean, batch.tops, batch.lefts, batch.mirror)
        if self.colour_noise:
            augment.add_colour_noise(images, self.noise_directions, batch.colour * self.colour_noise)
        self.net.dropout.draw_from(self.seed, self.global_step)
        loss = F.cross_entropy(self.net(images).float(), batch.labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.labels))
        self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def centred(self, images: Tensor) -> Tensor:
        """Stored images (N, size, size, 3) uint8 -> (N, 3, size, size) float32, the mean image subtracted."""
        return torch.sub(images, self.mean).permute(0, 3, 1, 2)

    def validation_step(self, batch: ValBatch, batch_idx: int) -> None:
        """Top-1 and top-5 error of the centre patch."""
        logits = self.net(augment.centre_crop(self.centred(batch.images), self.crop)).float()
        for k, metric in zip((1, 5), self.errors.values(), strict=True):
            metric.update(100 * top_k_misses(logits, batch.labels, k))  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log val/top1_error and val/top5_error (percent), and tell the schedule."""
        errors = {name: metric.compute() for name, metric in self.errors.items()}  # type: ignore[operator]
        for metric in self.errors.values():
            metric.reset()  # type: ignore[operator]
        self.log_dict({f"val/{name}": error for name, error in errors.items()}, prog_bar=True)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.schedule.after_epoch(float(errors["top1_error"]))

    def predict_step(self, batch: ValBatch, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax of the centre patch, mean softmax of the ten patches (N, classes), and labels."""
        crops = augment.ten_crop(self.centred(batch.images), self.crop)
        softmax = torch.stack([self.net(view).float().softmax(1) for view in crops.unbind(1)], 1)
        return softmax[:, 4], softmax.mean(1), batch.labels

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """PaperSGD. The schedule is stepped here and not by Lightning, which would do it after the epoch's checkpoint."""
        optimizer = PaperSGD(self.net.parameters(), **self.hparams["optim"])
        chance = 100 * (1 - 1 / self.classes)
        self.schedule = DivideWhenErrorStalls(optimizer, chance, **self.hparams["schedule"])
        if self._schedule_state:
            self.schedule.load_state_dict(self._schedule_state)
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the schedule's state."""
        if hasattr(self, "schedule"):
            checkpoint["schedule"] = self.schedule.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the schedule's state for configure_optimizers, which comes after this."""
        self._schedule_state = checkpoint.get("schedule")
