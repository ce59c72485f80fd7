"""Nets for torch.hub: torch.hub.load(PATH, "alexnet", recipe="as_run", source="local")."""

dependencies = ["torch", "numpy"]

import sys as _sys  # noqa: E402
from pathlib import Path as _Path  # noqa: E402
from typing import Any as _Any  # noqa: E402

_source = str(_Path(__file__).resolve().parent / "src")
if _source not in _sys.path:
    _sys.path.insert(0, _source)

_RECIPES: dict[str, dict[str, _Any]] = {
    "paper": {},
    "as_run": {"init": "as_run", "lrn_alpha": 2e-5, "layer1_order": "norm_pool_relu", "same_map_norm": True},
}


def alexnet(recipe: str = "paper", classes: int = 1000, **options: _Any) -> _Any:
    """Return the two-tower net with initial weights of a recipe, "paper" or "as_run". No trained weights are distributed.

    Images are float (N, 3, 224, 224), RGB on the 0-255 scale, with the mean image subtracted. options: of AlexNet.

    Raises ValueError for an unknown recipe or option.
    """
    from alexnet_repro import AlexNet

    if recipe not in _RECIPES:
        raise ValueError(f"recipe={recipe}: this must be one of {', '.join(_RECIPES)}")
    return AlexNet(classes, **{**_RECIPES[recipe], **options})
