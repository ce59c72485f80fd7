"""The options of a recipe, for a Classifier that is made in Python.

The constants are the defaults of Classifier: the printed recipe, as in conf/recipe/paper.yaml, which gives the reasons.
"""

from collections.abc import Mapping
from typing import Any

from alexnet_repro.composition import composed
from alexnet_repro.configs import plain

RECIPES = ("paper", "as_run")
NET = {"name": "alexnet"}
OPTIM = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0005, "bias_rate": 1, "bias_decay": True}
AUGMENT = {
    "crop": 224,
    "random_crops": True,
    "mirror": True,
    "share": 1,
    "mean": "patch",
    "colour_noise": 0.1,
    "colour_unit": "eigenvalue",
    "colour_divisor": 1,
    "colour_noise_epochs": None,
    "jitter": 0,
}
SCHEDULE = {
    "rule": "when_error_stalls",
    "when_error_stalls": {"factor": 10, "times": 3, "patience": 5, "threshold": 0.1},
    "by_hand": {"of_epochs": 1, "colour_noise_epochs": None, "val_joins_after": None, "changes": {}},
}


def with_changes(options: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options with the changes, which may name a part of ``when_error_stalls`` or ``by_hand``."""
    groups = ("when_error_stalls", "by_hand")
    changed = {
        key: with_changes(options.get(key, {}), value) if key in groups and value else value
        for key, value in (changes or {}).items()
    }
    return {**options, **changed}


def recipe_options(recipe: str) -> dict[str, Any]:
    """Return the options net, optim, schedule, augment and epochs of a recipe with the data of the paper (conf/recipe).

    Raises ValueError for a recipe that is not one of RECIPES.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe}: this must be one of {', '.join(RECIPES)}")
    options = plain(composed("train", [f"recipe={recipe}", "data=ilsvrc2012"]))
    return {key: options[key] for key in ("net", "optim", "schedule", "augment", "epochs")}
