"""A LightningModule that measures a net: validation, test and prediction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanMetric

from alexnet_repro.claims.scores import MEASURED, VIEWS, score
from alexnet_repro.data.augment import centre_crop, colour_noise_directions, nine_crop, ten_crop
from alexnet_repro.data.batches import TrainBatch, ValBatch
from alexnet_repro.errors import UserError
from alexnet_repro.net.build import build
from alexnet_repro.net.lrn import at_least_float32


class ForeignBatch(NamedTuple):
    """Images and labels of a data module of one's own."""

    images: Tensor  # (N, 3, crop, crop) float, mean-subtracted on the 0-255 scale
    labels: Tensor  # (N,) int64


TESTED = {f"{view}_{name}" if view != "centre" else name: (view, name) for view in VIEWS[:2] for name in MEASURED}


class MeasuredNet(L.LightningModule):
    """A net, the mean image of its training images, and the errors of its predictions.

    net: name of the net and its keyword arguments. augment, image_size, mean, covariance: as of Classifier.

    Raises ValueError for invalid values.
    """

    mean: Tensor
    noise_directions: Tensor

    def __init__(
        self,
        net: Mapping[str, Any],
        augment: Mapping[str, Any],
        image_size: int,
        mean: NDArray[np.float32] | None,
        covariance: NDArray[np.float64] | None,
    ) -> None:
        super().__init__()
        self.net = build(**net).to(memory_format=torch.channels_last)
        self.augment, self.crop, self.image_size = augment, augment["crop"], image_size
        self.predicted_views = VIEWS[:2]  # the views that predict_step predicts, in this order
        self.predicts_scores = False  # what predict_step returns of each view: its scores, or its softmax
        if not 0 < self.crop <= image_size:
            raise ValueError(f"augment.crop={self.crop}: the images are {image_size}x{image_size}")
        self.register_buffer("mean", torch.zeros(image_size, image_size, 3))
        self.register_buffer("noise_directions", torch.zeros(3, 3))
        self.take_statistics(mean, covariance)
        self.errors = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in MEASURED})
        self.test_errors = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in TESTED})

    def take_statistics(self, mean: NDArray[np.float32] | None, covariance: NDArray[np.float64] | None) -> None:
        """Store the mean image and the directions of colour noise of the training images."""
        if mean is not None:
            self.mean = torch.from_numpy(mean.copy()).to(self.mean)
        if covariance is not None:
            directions = colour_noise_directions(torch.from_numpy(covariance), self.augment["colour_unit"])
            self.noise_directions = directions.to(self.noise_directions)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of mean-subtracted images (N, 3, 224, 224) on the 0-255 scale."""
        return self.net(images)

    def understood(self, batch: Any) -> Any:
        """Return the batch. Raise UserError unless it is one of StoreData or (images, labels) as Classifier explains."""
        if isinstance(batch, TrainBatch | ValBatch):
            return batch
        parts = batch if isinstance(batch, list | tuple) else [batch]
        found = [f"{type(part).__name__} {tuple(getattr(part, 'shape', ()))}" for part in parts]
        if len(parts) != 2 or not isinstance(parts[0], Tensor) or not parts[0].is_floating_point():
            problem = f"a batch is {', '.join(found)}, not (images, labels) with float images"
        elif parts[0].shape[1:] != (3, self.crop, self.crop):
            problem = f"the images of a batch are {tuple(parts[0].shape)}, not (N, 3, {self.crop}, {self.crop})"
        else:
            return ForeignBatch(*parts)
        raise UserError(
            problem,
            f"give images (N, 3, {self.crop}, {self.crop}), float, RGB, mean-subtracted on the 0-255 scale, and labels (N,); "
            "or use StoreData",
        )

    def mean_centre(self) -> Tensor:
        """Return the centre patch of the mean image, (crop, crop, 3)."""
        return centre_crop(self.mean.permute(2, 0, 1), self.crop).permute(1, 2, 0)

    def views(self, batch: ValBatch, cut: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return mean-subtracted patches of whole images.

        cut: ``centre_crop`` for (N, 3, s, s); ``nine_crop`` or ``ten_crop`` for (N, crops, 3, s, s).
        """
        if self.augment["mean"] == "patch":
            return cut(torch.sub(batch.images, self.mean).permute(0, 3, 1, 2), self.crop)
        return cut(batch.images.permute(0, 3, 1, 2), self.crop) - self.mean_centre().permute(2, 0, 1)

    def validation_step(self, batch: ValBatch | ForeignBatch, batch_idx: int) -> None:
        """Measure top-1 error, top-5 error and log-loss on the centre patch."""
        batch = self.understood(batch)
        (softmax,) = self._softmax_by_view(batch, VIEWS[:1])
        self._measure(self.errors, MEASURED, softmax, batch.labels)

    def test_step(self, batch: ValBatch | ForeignBatch, batch_idx: int) -> None:
        """Measure the centre patch and, with the whole images of StoreData, ten crops (Section 4.1)."""
        batch = self.understood(batch)
        views = VIEWS[:2] if isinstance(batch, ValBatch) else VIEWS[:1]
        for view, softmax in zip(views, self._softmax_by_view(batch, views), strict=True):
            keys = [key for key, (of_view, _) in TESTED.items() if of_view == view]
            self._measure(self.test_errors, keys, softmax, batch.labels)

    @staticmethod
    def _measure(metrics: nn.ModuleDict, keys: Sequence[str], softmax: Tensor, labels: Tensor) -> None:
        for key, values in zip(keys, score(softmax, labels).T, strict=True):
            metrics[key].update(100 * values if key.endswith("error") else values)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log val/top1_error and val/top5_error (percent) and val/log_loss (nats)."""
        self.log_dict({f"val/{name}": value for name, value in self.validated().items()}, prog_bar=True)

    def validated(self) -> dict[str, Tensor]:
        """Return the errors of the validation that just ended, by the names of MEASURED, and forget them."""
        return _computed(self.errors)

    def on_test_epoch_end(self) -> None:
        """Log test/top1_error, test/top5_error and test/log_loss, and the same of ten crops: test/ten_crop_top1_error."""
        self.log_dict({f"test/{name}": value for name, value in _computed(self.test_errors).items()})

    def predict_step(self, batch: ValBatch | ForeignBatch, batch_idx: int) -> tuple[Tensor, ...]:
        """Return the softmax (N, classes) of each of ``predicted_views``, which is the mean over the view's patches.

        With ``predicts_scores``, return the scores (N, 3) instead, as from ``scores.score``: the softmax of millions
        of images does not fit in memory.
        """
        batch = self.understood(batch)
        views = self.predicted_views if isinstance(batch, ValBatch) else VIEWS[:1]
        softmax_by_view = self._softmax_by_view(batch, views)
        return tuple(score(softmax, batch.labels) if self.predicts_scores else softmax for softmax in softmax_by_view)

    def _softmax_by_view(self, batch: ValBatch | ForeignBatch, wanted: tuple[str, ...]) -> list[Tensor]:
        """Return the softmax (N, classes) of each of the wanted views."""
        if not isinstance(batch, ValBatch):
            return [at_least_float32(self.net(batch.images)).softmax(1)]
        if wanted == ("centre",):
            return [at_least_float32(self.net(self.views(batch, centre_crop))).softmax(1)]
        parts = []
        for images in batch.images.split(16):  # limits the memory for ten patches per image
            part = ValBatch(images, batch.labels)
            softmax = self._softmax_of(self.views(part, ten_crop))
            views = {"centre": softmax[:, 4], "ten_crop": softmax.mean(1)}
            if "nine_crop" in wanted:
                views["nine_crop"] = self._softmax_of(self.views(part, nine_crop)).mean(1)
            parts.append([views[view] for view in wanted])
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def _softmax_of(self, crops: Tensor) -> Tensor:
        """Return the softmax (N, crops, classes) of crops (N, crops, 3, s, s)."""
        return at_least_float32(self.net(crops.flatten(0, 1))).softmax(1).unflatten(0, crops.shape[:2])


def _computed(metrics: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the mean of each metric that was measured, and reset them all."""
    values = {
        name: metric.compute()  # type: ignore[operator]
        for name, metric in metrics.items()
        if metric.update_called
    }
    for metric in metrics.values():
        metric.reset()  # type: ignore[operator]
    return values
