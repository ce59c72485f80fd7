"""The learning rate schedules of the paper and of the 2012 log."""

from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet_repro.training.optim import GROUPS, share_of_rate

RULES = ("when_error_stalls", "by_hand", "constant")


def make_schedule(
    optimizer: torch.optim.Optimizer,
    options: dict[str, Any],
    epochs: int,
    lr: float,
    classes: int,
    copied: dict[str, Any] | None = None,
) -> "DivideWhenErrorStalls | ByHand":
    """Create the schedule that ``options["rule"]`` names, with its own options (conf/recipe/paper.yaml).

    epochs: length of the run. lr: the weights' first learning rate. copied: as in ``parameter_groups``.

    Raises ValueError for an unknown rule or an unknown group of parameters.
    """
    if options["rule"] not in RULES:
        raise ValueError(f"schedule.rule={options['rule']}: this must be one of {', '.join(RULES)}")
    if options["rule"] == "when_error_stalls":
        return DivideWhenErrorStalls(optimizer, 100 * (1 - 1 / classes), **options["when_error_stalls"])
    if options["rule"] == "constant":
        return ByHand(optimizer, epochs, of_epochs=1, changes={}, lr=lr)
    by_hand = options["by_hand"]
    return ByHand(optimizer, epochs, by_hand["of_epochs"], by_hand["changes"], lr=lr, copied=copied)


class DivideWhenErrorStalls:
    """Divide the learning rate when the validation error stops improving (Section 5).

    The paper: "divide the learning rate by 10 when the validation error rate stopped improving with the current
    learning rate", "reduced three times prior to termination".

    The error has stopped improving after ``patience`` consecutive epochs that are not at least ``threshold``
    percentage points below the best one. The paper gives neither number, because the rate was changed by hand. Epochs
    with an error above 95% of ``chance`` (the error of guessing, in percent) do not count, because the printed
    initialisation can stay at chance for many epochs.
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
            patience=patience - 1,  # torch doesn't count the epoch at which the rate falls
            threshold=threshold,
            threshold_mode="abs",
            min_lr=[group["lr"] / factor**times for group in optimizer.param_groups],
            eps=0,
        )

    def after_epoch(self, val_top1_error: float | None) -> None:
        """Lower the learning rate if the validation top-1 error (percent) has stopped improving.

        An epoch without validation (None) does not count.
        """
        if val_top1_error is not None and val_top1_error < self.begun_below:
            self.plateau.step(val_top1_error)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rule as plain values. The optimizer's state holds the learning rates."""
        return {k: v for k, v in self.plateau.state_dict().items() if k in ("best", "num_bad_epochs", "last_epoch")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned."""
        self.plateau.load_state_dict(state)


class ByHand:
    """Change learning rates at given epochs, as in the log of the 2012 program.

    changes: for each group of ``parameter_groups``, {epoch: rate as a multiple of the weights' first rate}. A change
    takes effect after that number of epochs. A rate of 0 freezes the group.
    lr: the weights' first rate.
    copied: as in ``parameter_groups``. The changes of copied layers are multiplied by their share of the rate. Without
    changes of their own, they follow those of new layers.

    The epochs refer to a run of ``of_epochs`` epochs; for a run of another length, they are scaled and rounded. A
    negative epoch counts back from the end and is not scaled. The exception is a run so short that the first of the
    negative epochs would be in its first half: then they are scaled to fit its second half.

    Raises ValueError for an unknown group.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        of_epochs: int,
        changes: dict[str, dict[int, float]],
        lr: float,
        copied: dict[str, Any] | None = None,
    ) -> None:
        self.optimizer = optimizer  # not its param_groups, which loading a state replaces
        if unknown := set(changes) - set(GROUPS):
            raise ValueError(f"schedule.changes: there is no group {', '.join(sorted(unknown))}")
        tail = -min((epoch for at in changes.values() for epoch in at if epoch < 0), default=0)

        def scaled(epoch: int) -> int:
            if epoch >= 0:
                return scaled_epoch(epoch, epochs, of_epochs)
            return max(1, epochs + round(epoch * min(1, epochs / (2 * tail))))

        self.changes = {
            name: sorted((scaled(epoch), epoch, multiple) for epoch, multiple in at.items())
            for name, at in changes.items()
        }
        self.first_rate = lr
        shares = {} if copied is None else {"copied": copied["rate"]}
        if copied is not None and "conv1" in copied["layers"]:
            shares["conv1"] = copied["conv1_rate"]
        for layers, share in shares.items():
            for kind in ("weights", "biases"):
                followed = self.changes.get(f"{layers}_{kind}", self.changes.get(kind, []))
                factor = share_of_rate(share, kind == "biases")
                self.changes[f"{layers}_{kind}"] = [(at, epoch, multiple * factor) for at, epoch, multiple in followed]
        self.epochs_done = 0

    def after_epoch(self, val_top1_error: float | None) -> None:
        """Set the learning rates of the next epoch. The error is ignored."""
        self.epochs_done += 1
        for group in self.optimizer.param_groups:
            for epoch, _, multiple in self.changes.get(group["name"], []):
                if epoch <= self.epochs_done:
                    group["lr"] = self.first_rate * multiple

    def state_dict(self) -> dict[str, Any]:
        """Return the number of epochs done and the weights' first rate."""
        return {"epochs_done": self.epochs_done, "first_rate": self.first_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned. The optimizer's state holds the learning rates."""
        self.epochs_done, self.first_rate = state["epochs_done"], state["first_rate"]


def scaled_epoch(epoch: int, epochs: int, of_epochs: int) -> int:
    """Scale ``epoch`` from a run of ``of_epochs`` epochs to a run of ``epochs`` epochs. Only 0 becomes 0."""
    return max(1, round(epoch * epochs / of_epochs)) if epoch else 0
