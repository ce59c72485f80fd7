"""The update rule of Section 5, and the groups of parameters that learn at different rates."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


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
            rate *= share_of_rate(copied["conv1_rate" if layer == "conv1" else "rate"], is_bias)
        group = {"name": group_name, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((group_name, decay), group)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: GROUPS.index(group["name"]))


def share_of_rate(rate: float, is_bias: bool) -> float:
    """Return the learning rate of copied parameters as a multiple of that of new ones. rate: that of weights."""
    return rate if not is_bias else float(rate > 0)
