"""Compare the representations of nets that differ in their seed (linear CKA)."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_repro.sharing.features import features
from alexnet_repro.training.classifier import Classifier

LAYERS = ("pool1", "pool2", "conv3", "conv4", "pool5", "fc6", "fc7", "fc8")
FEWEST = 4  # images that the unbiased estimate needs


def gram(representation: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the scalar products (N, N) of the representations of N images, (N, ...).

    The mean of each feature is subtracted first, which changes no estimate but its rounding.
    """
    flat = representation.reshape(len(representation), -1)
    flat = flat - flat.mean(0)
    return (flat @ flat.T).astype(np.float64)


def cka(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the linear centred kernel alignment of two representations, from their ``gram`` matrices (N, N).

    1 for representations that are equal up to rotation and scale, and 0 on average for unrelated ones (Kornblith et
    al. 2019), with the unbiased estimate of HSIC (Song et al. 2012), since the plain one grows with the number of
    features: two random layers would look alike. The estimate may be a little below 0 or above 1. N is at least FEWEST.
    """
    between = _hsic(one, other)
    scale = _hsic(one, one) * _hsic(other, other)
    return float(between / scale**0.5) if scale > 0 else float("nan")


def _hsic(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    n = len(one)
    k, m = (matrix - np.diag(np.diag(matrix)) for matrix in (one, other))
    total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return float(total / (n * (n - 3)))


def similarity(nets: Sequence[Classifier], images: Any, batch_size: int = 64) -> tuple[list[str], NDArray[np.float64]]:
    """Return the names of L layers, and the linear CKA (pairs, L, L) of each layer of each pair of nets.

    Element [p, i, j] compares layer i of the first net of pair p with layer j of its second one. images: as for
    ``features``. Raises UserError as ``features`` does.
    """
    names = [name for name in LAYERS if name in nets[0].net.layer_names]
    grams = []
    for net in nets:
        grams.append([gram(values) for values in features(net, images, names, batch_size=batch_size).values()])
    pairs = [[[cka(k, m) for m in second] for k in first] for first, second in combinations(grams, 2)]
    return names, np.array(pairs)
