"""Measure what usual mistakes would do to the outputs of a trained net."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_repro.claims.scores import score
from alexnet_repro.data.augment import centre_crop
from alexnet_repro.data.batches import ValBatch
from alexnet_repro.errors import UserError
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.original.layer_files import Layer
from alexnet_repro.original.plain_net import MISTAKES
from alexnet_repro.original.translation import plain_copy, relative
from alexnet_repro.training.measurement import fitting_store, load_run

IMAGES, BATCH = 200, 20
EQUAL = 1e-9  # greatest relative difference of equal nets' logits in float64


def mistakes_of(layers: list[Layer], run: Path) -> list[dict[str, Any]]:
    """Return what each of MISTAKES does to a run's net: {what, top1_error in percent, change}, without a mistake first.

    change: of the logits, which are taken relative to their mean over the images, as a share of their norm. They are
    those of up to IMAGES test images, one view.

    Raises UserError if the run's net is not that of the layers.
    """
    model, trained = load_run(run)
    net = model.net
    layers = with_classes(layers, model.classes)
    remedy = "choose a run of the whole net with recipe=as_run, and layers=145"
    if not isinstance(net, AlexNet) or trained.recipe != "as_run" or trained.ablation:
        raise UserError(f"{run} has another net than the layer file", remedy)
    try:
        plain = plain_copy(net.double(), layers)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{run} has another net than the layer file: {error}", remedy) from None
    store = fitting_store(str(trained.data.store), model, run)
    split = store.split(store.measured_split)
    chosen = np.unique(np.linspace(0, len(split) - 1, min(IMAGES, len(split))).astype(int)).tolist()
    pixels, labels = torch.from_numpy(np.stack([split[i] for i in chosen])), torch.from_numpy(split.labels[chosen])
    with torch.inference_mode():
        images = model.views(ValBatch(pixels, labels), centre_crop).double()
        found = {}
        for mistake in (None, *MISTAKES):
            plain.mistake = mistake
            found[mistake] = torch.cat([plain.logits(part) for part in images.split(BATCH)])
        own = net.eval()(images[:BATCH])
    right = found[None]
    if relative(right[:BATCH], own) > EQUAL:
        raise UserError(f"{run} has another net than the layer file: its logits differ", remedy)
    return [
        {
            "what": "no mistake" if mistake is None else MISTAKES[mistake],
            "top1_error": 100 * float(score(logits.softmax(1), labels)[:, 0].mean()),
            "change": relative(logits - logits.mean(0), right - right.mean(0)),
            "images": len(images),
        }
        for mistake, logits in found.items()
    ]


def with_classes(layers: list[Layer], classes: int) -> list[Layer]:
    """Return the layers with another number of outputs in the last fully connected one."""
    last = [layer for layer in layers if layer.kind == "fc"][-1]
    own = replace(last, options={**last.options, "outputs": str(classes)})
    return [own if layer is last else layer for layer in layers]
