"""The model card of an exported net."""

from typing import Any

from alexnet_repro.claims.scores import VIEW_NAMES
from alexnet_repro.sharing.nets import TrainedNet


def model_card(trained: TrainedNet, content: dict[str, Any]) -> str:
    """Return the card as Markdown: what the net is, how it was trained, its errors, how to use it, and its limits.

    content: what ``described`` says of the net.
    """
    facts = trained.facts
    net = trained.model.hparams["net"]
    training = {
        "recipe": facts.get("recipe"),
        "ablation": facts.get("ablation"),
        "scale": facts.get("scale"),
        "data": facts.get("data"),
        "seed": None if "converted" in facts else facts.get("seed"),
        "epochs": facts.get("epochs"),
        "precision": facts.get("precision"),
        "converted from": facts.get("converted"),
        "commit": facts.get("commit"),
        "command": f"`{facts['command']}`" if facts.get("command") else None,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in training.items() if value not in (None, "none"))
    options = ", ".join(f"{key}={value}" for key, value in net.items() if key not in ("name", "classes"))
    origin = "converted" if "converted" in facts else "trained"
    return f"""---
library_name: alexnet_repro
tags: [image-classification, alexnet]
---

# AlexNet (2012), reproduced

The network of "ImageNet Classification with Deep Convolutional Neural Networks" (Krizhevsky, Sutskever, Hinton 2012), with
{content["parameters"]:,} parameters and {len(content["classes"])} classes, {origin} by `alexnet_repro`.

## Training

| | |
|---|---|
{rows}
| net | {options} |

## Errors

{_errors(facts)}

## Input

{content["preprocessing"][0].upper()}{content["preprocessing"][1:]}. The mean image is in the file. Its central patch has the
mean RGB value {", ".join(f"{value:.1f}" for value in content["mean_rgb"])}.

## Use

```python
from alexnet_repro import features, load_net

net = load_net("model.safetensors")
fc7 = features(net, "FOLDER", ["fc7"])["fc7"]
```

## Limits

The classes are those of the training images: {_some(content["classes"])}. The network inherits what is unbalanced in them.
`config.json` has all options, and the checksum of the checkpoint that the weights came from.
"""


def _errors(facts: dict[str, Any]) -> str:
    measured = [
        f"| {words} | {pair['top1_error']:.1f} | {pair['top5_error']:.1f} | {f'{nats:.3f}' if nats is not None else ''} |"
        for view, words in VIEW_NAMES.items()
        if (pair := facts.get(view))
        for nats in [pair.get("log_loss")]
    ]
    if measured:
        of = f"{facts['split']} ({facts['images']:,} images)" if {"split", "images"} <= set(facts) else "not recorded"
        head = f"Split: {of}. Errors in percent, log-loss in nats:"
        return "\n".join([head, "", "| view | top-1 error | top-5 error | log-loss |", "|---|---|---|---|", *measured])
    if facts.get("validation_error") is not None:
        return f"Top-1 error on the validation images, one view: {facts['validation_error']:.1f}%."
    return "Not measured."


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])} and {len(names) - 10} more"
