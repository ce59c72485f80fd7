"""The update rule of Section 5, and "divide by 10 when the validation error stops improving"."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau


class PaperSGD(torch.optim.SGD):
    """Stochastic gradient descent with the momentum of Section 5:

        v <- momentum v - weight_decay lr w - lr g
        w <- w + v

    torch.optim.SGD keeps the rate outside of its buffer (w <- w - lr buffer). The two agree while the rate stands still;
    when it falls, torch shrinks the velocity at once, and the paper's rule lets it run out over about ten steps. So here
    the buffer is multiplied by old rate / new rate at each change, and torch's fused kernel does the rest.

    A rate of exactly 0 leaves a group's parameters and velocity as they are (2012 code: "freezing" conv1).

    lr: learning rate, epsilon in the paper. Raises ValueError for a negative lr, momentum or weight_decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0005,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for group in self.param_groups:
            group["fused"] = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"])
            group["velocity_lr"] = group["lr"]  # the rate by which the buffers are to be multiplied to get -v

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the parameters' gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = [(group, group["params"]) for group in self.param_groups if group["lr"] == 0]
        for group in self.param_groups:
            if group["lr"] == 0:
                group["params"] = []
            elif group["lr"] != group["velocity_lr"]:
                for p in group["params"]:
                    buffer = self.state[p].get("momentum_buffer")
                    if buffer is not None:
                        buffer.mul_(group["velocity_lr"] / group["lr"])
                group["velocity_lr"] = group["lr"]
        super().step()
        for group, params in frozen:
            group["params"] = params
        return loss


class DivideWhenErrorStalls:
    """ "Divide the learning rate by 10 when the validation error rate stopped improving with the current learning rate",
    "reduced three times prior to termination" (Section 5).

    The error has stopped improving when ``patience`` epochs in a row were not at least ``threshold`` percentage points
    below the best one. The paper says neither number: it was done by hand. An error that has not begun to improve can't
    stop: epochs above 95% of ``chance`` (the error of guessing, percent) don't count, since the printed initialisation can
    sit at chance for many epochs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        chance: float,
        factor: float = 10,
        times: int = 3,
        patience: int = 5,
        threshold: float = 0.1,
    ) -> None:
        self.begun_below = 0.95 * chance
        self.plateau = ReduceLROnPlateau(
            optimizer,
            mode="min",
            factor=1 / factor,
            patience=patience - 1,  # torch counts the epochs that are borne, we the one at which the rate falls
            threshold=threshold,
            threshold_mode="abs",
            min_lr=[group["lr"] / factor**times for group in optimizer.param_groups],
            eps=0,
        )

    def after_epoch(self, val_top1_error: float) -> None:
        """Take an epoch's validation top-1 error (percent) and lower the rate if it's time."""
        if val_top1_error < self.begun_below:
            self.plateau.step(val_top1_error)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what the rule remembers between epochs."""
        return {k: v for k, v in self.plateau.state_dict().items() if k in ("best", "num_bad_epochs", "last_epoch")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave. The rates themselves are in the optimizer's state."""
        self.plateau.load_state_dict(state)
