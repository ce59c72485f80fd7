"""Compute errors and log-loss of predictions, and save and read the scores of each image.

Errors are in percent and log-loss in nats, as in the 2012 log. A prediction is the softmax output for one view of an
image, or the mean over several views (Section 4.1).
"""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_repro.data.module import replica_of
from alexnet_repro.files import written_whole

MEASURED = ("top1_error", "top5_error", "log_loss")
KERNELS = "conv1/kernels"
VIEW_NAMES = {"centre": "one view", "ten_crop": "ten crops", "nine_crop": "nine crops"}
VIEWS = tuple(VIEW_NAMES)
Errors = dict[str, float]


def top_k_misses(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return 1 for each label that is not among the k highest scores, otherwise 0.

    scores: (N, classes). labels: (N,). Returns (N,).

    A label tied for the k-th place counts fractionally, as in the 2012 code. A label with a NaN score is a miss.
    """
    own = scores.gather(1, labels[:, None])
    higher, equal = (scores > own).sum(1), (scores == own).sum(1)
    return 1 - ((k - higher) / equal.clamp(min=1)).clamp(0, 1) * own.isfinite().squeeze(1)


def score(softmax: Tensor, labels: Tensor) -> Tensor:
    """Score each image: (N, classes), (N,) -> (N, 3) float32.

    The columns follow MEASURED: top-1 miss and top-5 miss (0 to 1), and log-loss in nats.
    """
    softmax = softmax.float()
    own = softmax.gather(1, labels[:, None]).squeeze(1)
    nats = -own.clamp(min=torch.finfo(torch.float32).tiny).log()
    return torch.stack([top_k_misses(softmax, labels, 1), top_k_misses(softmax, labels, 5), nats], 1)


def errors(scores: Tensor) -> Errors:
    """Average the scores (N, 3) over images: errors in percent and log-loss in nats, keyed by MEASURED."""
    means = (scores.double().mean(0) * torch.tensor([100.0, 100.0, 1.0], dtype=torch.float64)).tolist()
    return {name: round(mean, 4) for name, mean in zip(MEASURED, means, strict=True)}


def gathered(scores: Tensor, trainer: L.Trainer) -> Tensor:
    """Gather the scores of all images from all replicas, in the order of the split.

    scores: (n, 3), for images r, r + R, r + 2R, ... on replica r of R. Every process must call this function.
    """
    strategy: Any = trainer.strategy
    _, replicas = replica_of(trainer)
    if replicas == 1:
        return scores
    towers = strategy.world_size // replicas
    count = torch.tensor(len(scores), device=strategy.root_device)
    counts = strategy.all_gather(count)[::towers].tolist()
    padded = scores.new_zeros(max(counts), scores.shape[1])
    padded[: len(scores)] = scores
    parts = strategy.all_gather(padded.to(strategy.root_device))[::towers].cpu()
    whole = scores.new_empty(sum(counts), scores.shape[1])
    for number, (part, size) in enumerate(zip(parts, counts, strict=True)):
        whole[number::replicas] = part[:size]
    return whole


def save_scores(path: Path, by_view: dict[str, Tensor], kernels: Tensor | None = None) -> None:
    """Write the scores of each view, {"ten_crop": (N, 3), ...}, to a compressed .npz file.

    kernels: the first layer's, (maps, 3, h, w), which are written beside them for Figure 3.
    """
    arrays: dict[str, Any] = {} if kernels is None else {KERNELS: kernels.numpy().astype(np.float16)}
    for view, scores in by_view.items():
        # float16 is exact for 0, 1 and two-way ties
        arrays[f"{view}/misses"] = scores[:, :2].numpy().astype(np.float16)
        arrays[f"{view}/log_loss"] = scores[:, 2].numpy().astype(np.float32)
    with written_whole(path) as file:
        np.savez_compressed(file, **arrays)


def read_kernels(path: Path) -> NDArray[np.float32] | None:
    """Read the first layer's kernels written by ``save_scores``, (maps, 3, h, w), or return None if it has none.

    Raises OSError or ValueError if the file is damaged.
    """
    with np.load(path) as arrays:
        return arrays[KERNELS].astype(np.float32) if KERNELS in arrays else None


def read_scores(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read the scores written by ``save_scores``: an (N, 3) array for each view.

    Raises OSError, ValueError or KeyError if the file is damaged.
    """
    with np.load(path) as arrays:
        return {
            view: np.column_stack([arrays[f"{view}/misses"], arrays[f"{view}/log_loss"]]).astype(np.float64)
            for view in VIEWS
            if f"{view}/misses" in arrays
        }
