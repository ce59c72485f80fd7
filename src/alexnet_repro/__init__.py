"""Reproduction of AlexNet.

The paper is "ImageNet Classification with Deep Convolutional Neural Networks" (Krizhevsky, Sutskever, Hinton 2012).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_repro.data.augment import ten_crop
    from alexnet_repro.data.store import Store
    from alexnet_repro.net.alexnet import AlexNet
    from alexnet_repro.net.lrn import LocalResponseNorm
    from alexnet_repro.sharing.features import features, preprocess
    from alexnet_repro.sharing.nets import load_net
    from alexnet_repro.training.classifier import Classifier
    from alexnet_repro.training.optim import PaperSGD

__version__ = "0.1.0"
__all__ = [
    "AlexNet", "Classifier", "LocalResponseNorm", "PaperSGD", "Store", "StoreData", "features", "load_net", "preprocess",
    "ten_crop", "train",
]  # fmt: skip

_MODULES = {
    "AlexNet": "net.alexnet",
    "Classifier": "training.classifier",
    "LocalResponseNorm": "net.lrn",
    "PaperSGD": "training.optim",
    "Store": "data.store",
    "StoreData": "data.module",
    "features": "sharing.features",
    "load_net": "sharing.nets",
    "preprocess": "sharing.features",
    "ten_crop": "data.augment",
    "train": "training.python",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package takes no time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
