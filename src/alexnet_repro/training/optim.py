"""The update rule of Section 5, and the learning rate schedules of the paper and of the 2012 log."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


class PaperSGD(torch.optim.SGD):
    """Stochastic gradient descent with the momentum of Section 5:

        v <- momentum v - weight_decay lr w - lr g
        w <- w + v

    torch.optim.SGD keeps the learning rate outside its buffer (w <- w - lr buffer). The two rules agree while the
    learning rate is constant. When it falls, torch.optim.SGD shrinks the velocity at once, whereas the paper's velocity
    decays over about ten steps. To follow the paper, this class multiplies the buffer by old rate / new rate at each
    change, and leaves the rest to torch's fused kernel.

    A learning rate of exactly 0 leaves a group's parameters and velocity unchanged (2012 code: "freezing" conv1).

    Gradients must have the memory layout of their parameters, as those of ``backward`` do.

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options as of ``torch.optim.SGD``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["fused"] = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"])
        group["velocity_lr"] = group["lr"]  # momentum buffer * velocity_lr = -v

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state.

        The buffers are copied, because the fused kernel assumes that they have the memory layout of their parameters.
        """
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if (buffer := state.get("momentum_buffer")) is not None:
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one update from the parameters' gradients."""
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


GROUPS = ("weights", "biases", "copied_weights", "copied_biases", "conv1_weights", "conv1_biases")


def parameter_groups(
    net: nn.Module,
    lr: float,
    weight_decay: float,
    bias_rate: float,
    bias_decay: bool,
    decay_multiples: dict[str, float] | None = None,
    copied: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return groups for PaperSGD: weights and biases, apart for conv1 and for layers copied from another net.

    Parameters of one name that differ in weight decay are in separate groups.

    bias_rate: learning rate of the biases as a multiple of the weights'. bias_decay: whether weight decay applies to
    biases. The paper gives one learning rate and one decay; the 2012 code had twice the rate for biases and no decay on
    them.
    decay_multiples: {layer: its weight decay as a multiple of ``weight_decay``}, for layers where this is not 1.
    copied: {"layers": copied layers, "rate": the learning rate of their weights as a multiple of lr, "conv1_rate": that
    of conv1's}. Their biases learn as other biases, as in the 2012 log, unless the multiple is 0.

    Raises ValueError for a negative number, or for a layer that the net does not have.
    """
    multiples = decay_multiples or {}
    for name, value in {"weight_decay": weight_decay, "bias_rate": bias_rate, **multiples}.items():
        if value < 0:
            raise ValueError(f"Invalid {name}: {value}; this must not be negative")
    layers = {name.rpartition(".")[0] for name, _ in net.named_parameters()}
    if unknown := set(multiples) - layers:
        raise ValueError(f"optim.decay_multiples: the net has no layer {', '.join(sorted(unknown))}")
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        layer, _, kind = name.rpartition(".")
        is_bias = kind == "bias"
        decay = 0.0 if is_bias and not bias_decay else weight_decay * multiples.get(layer, 1)
        is_copied = copied is not None and layer in copied["layers"]
        kind_of_layer = "conv1_" if layer == "conv1" else "copied_" if is_copied else ""
        group_name = kind_of_layer + ("biases" if is_bias else "weights")
        rate = lr * bias_rate if is_bias else lr
        if copied is not None and is_copied:
            rate *= _share(copied["conv1_rate" if layer == "conv1" else "rate"], is_bias)
        group = {"name": group_name, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((group_name, decay), group)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: GROUPS.index(group["name"]))


def _share(rate: float, is_bias: bool) -> float:
    """Return the learning rate of copied parameters as a multiple of that of new ones. rate: that of weights."""
    return rate if not is_bias else float(rate > 0)


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

    def after_epoch(self, val_top1_error: float) -> None:
        """Lower the learning rate if the validation top-1 error (percent) has stopped improving."""
        if val_top1_error < self.begun_below:
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
                factor = _share(share, kind == "biases")
                self.changes[f"{layers}_{kind}"] = [(at, epoch, multiple * factor) for at, epoch, multiple in followed]
        self.epochs_done = 0

    def after_epoch(self, val_top1_error: float) -> None:
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
