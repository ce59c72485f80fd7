"""Retrieve nearest images by the last hidden layer or by binary codes (Section 6.1, Figure 4 right)."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_repro.data.augment import centre_crop
from alexnet_repro.data.batches import ValBatch, ValImages
from alexnet_repro.data.loader import make_loader
from alexnet_repro.data.split import Split
from alexnet_repro.net.lrn import at_least_float32
from alexnet_repro.training.classifier import Classifier

NEAREST = 6  # as in Figure 4
BITS = 64  # ours: the paper says "short"
PIXELS = 32  # ours: pixels are compared on 32x32 copies of the images


@dataclass(frozen=True)
class Seen:
    """A net's outputs for N images, with the images' pixels and labels.

    fc7: (N, 4096) float16. softmax: (N, classes). pixels: (N, 3072) float16, from 32x32 RGB copies. labels: (N,).
    indices: (N,), positions in the split.
    """

    fc7: Tensor
    softmax: Tensor
    pixels: Tensor
    labels: Tensor
    indices: NDArray[np.int64]


class _Look(L.LightningModule):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: ValBatch, batch_idx: int) -> tuple[Tensor, ...]:
        images = self.model.views(batch, centre_crop)
        maps = self.model.net.activations(images)
        small = F.adaptive_avg_pool2d(images.float(), PIXELS).flatten(1)
        return maps["fc7"].half(), at_least_float32(maps["fc8"]).softmax(1), small.half(), batch.labels


def look(trainer: L.Trainer, model: Classifier, images: Split, at_most: int | None, batch_size: int = 128) -> Seen:
    """Run the net on the central patches of a split's images.

    at_most: the maximum number of images, evenly spaced in the split; None: all images.
    """
    count = len(images) if at_most is None else min(at_most, len(images))
    indices = np.linspace(0, len(images) - 1, count).astype(np.int64)
    loader = make_loader(ValImages(images), batch_size, sampler=indices.tolist())
    columns: Any = zip(*trainer.predict(_Look(model.eval()), loader) or (), strict=True)
    fc7, softmax, pixels, labels = (torch.cat(column) for column in columns)
    return Seen(fc7, softmax, pixels, labels, indices)


def nearest(queries: Tensor, images: Tensor, k: int = NEAREST) -> Tensor:
    """Return the indices of the k nearest images to each query by Euclidean distance, nearest first.

    queries: (Q, d). images: (N, d). Returns (Q, min(k, N)).
    """
    best: Tensor | None = None
    places: Tensor | None = None
    wanted = queries.float()
    # in parts, to limit memory
    for first, part in zip(range(0, len(images), 4096), images.split(4096), strict=True):
        part = part.float()
        distances = part.square().sum(1) - 2 * wanted @ part.T  # squared, up to a constant for each query
        if best is not None and places is not None:
            distances = torch.cat([best, distances], 1)
            indices = torch.cat([places, torch.arange(first, first + len(part)).expand(len(wanted), -1)], 1)
        else:
            indices = torch.arange(len(part)).expand(len(wanted), -1)
        best, order = distances.topk(min(k, distances.shape[1]), largest=False)
        places = indices.gather(1, order)
    assert places is not None
    return places


class Autoencoder(nn.Module):
    """An autoencoder with a binary code, after Krizhevsky and Hinton 2011 (the paper's [14]).

    They pre-trained their autoencoder as restricted Boltzmann machines. This one is trained end to end. Noise on the
    inputs of the code units drives their outputs to 0 and 1.
    """

    def __init__(self, features: Tensor, bits: int = BITS, hidden: int = 256) -> None:
        super().__init__()
        self.mean, self.scale = features.float().mean(0), features.float().std().clamp(min=1e-6)
        width = features.shape[1]
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, bits))
        self.decoder = nn.Sequential(nn.Linear(bits, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """Reconstruct standardised features (N, d) from their codes.

        noise: the standard deviation of the noise on the inputs of the code units.
        """
        logits = self.encoder(x)
        return self.decoder(torch.sigmoid(logits + noise * torch.randn_like(logits)))

    def standardised(self, features: Tensor) -> Tensor:
        """Subtract the mean of each feature and divide by the overall standard deviation."""
        return (features.float() - self.mean) / self.scale

    @torch.inference_mode()
    def codes(self, features: Tensor) -> Tensor:
        """Return the binary codes of features: (N, d) -> (N, bits) of 0 and 1.

        The squared Euclidean distance of two codes is their Hamming distance.
        """
        return torch.cat([(self.encoder(self.standardised(part)) > 0).float() for part in features.split(4096)])


def train_autoencoder(features: Tensor, seed: int = 0, steps: int = 200, batch_size: int = 256) -> Autoencoder:
    """Train an autoencoder on features (N, d) with Adam and squared error.

    The noise on the inputs of the code units has a standard deviation of 2. The global random state is restored.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Autoencoder(features)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            x = model.standardised(features[torch.randint(len(features), (batch_size,))])
            loss = F.mse_loss(model(x, noise=2.0), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def same_class(places: Tensor, images: Tensor, queries: Tensor) -> float:
    """Return the percentage of retrieved images that have the query's label.

    places: (Q, k), indices of images. images: (N,) labels. queries: (Q,) labels.
    """
    return round(100 * float((images[places] == queries[:, None]).float().mean()), 4)


def retrieval_quality(queries: Seen, images: Seen, seed: int = 0) -> dict[str, Any]:
    """Return the percentage of the six nearest images that have the query's class.

    Distances are measured in fc7, in pixels, and in binary codes of each.
    """
    shares = {}
    for name, query_features, image_features in (
        ("fc7", queries.fc7, images.fc7),
        ("pixels", queries.pixels, images.pixels),
    ):
        shares[name] = same_class(nearest(query_features, image_features), images.labels, queries.labels)
        coder = train_autoencoder(image_features, seed)
        found = nearest(coder.codes(query_features), coder.codes(image_features))
        shares[f"codes of {name}"] = same_class(found, images.labels, queries.labels)
    guess = torch.stack([(images.labels == label).float().mean() for label in queries.labels]).mean()
    return {
        "queries": len(queries.labels),
        "images": len(images.labels),
        "nearest": NEAREST,
        "bits": BITS,
        "same_class": shares | {"guessing": round(100 * float(guess), 4)},
    }
