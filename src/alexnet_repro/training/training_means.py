"""The running training error and loss, as the 2012 program printed them."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from alexnet_repro.claims.scores import top_k_misses


class TrainingMeans(Metric):
    """Mean training error and loss of the current epoch, for each stored batch file and for all images.

    Each image is measured in training mode, in the forward pass of its own update.
    """

    full_state_update = False
    sums: Tensor  # (files, 3): misses, nats, images

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(1, 3), dist_reduce_fx="sum")

    def update(self, file: int, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add a batch: its file number, logits (N, classes), labels (N,) and losses (N,)."""
        if file >= len(self.sums):
            self.sums = F.pad(self.sums, (0, 0, 0, file + 1 - len(self.sums)))
        self.sums[file] += torch.stack(
            [top_k_misses(logits, labels, 1).sum(), losses.sum(), losses.new_full((), len(losses))]
        )

    def compute(self) -> Tensor:
        """Return error (percent) and loss (nats), (files + 1, 2): one row per file, then one for all images."""
        sums = torch.cat([self.sums, self.sums.sum(0, keepdim=True)])
        return sums[:, :2] / sums[:, 2:] * sums.new_tensor([100.0, 1.0])
