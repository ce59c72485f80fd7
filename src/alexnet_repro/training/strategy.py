"""A Lightning strategy for replicas of the net (data parallelism) and the two towers of each replica.

Process ``rank`` holds tower ``rank % towers`` of replica ``rank // towers``.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from alexnet_repro.net.placement import TOWERS, Link, half_of, keep_tower, whole_of


class TowerStrategy(DDPStrategy):
    """A Lightning strategy for replicas x towers processes, one for each device.

    Gradients are averaged over the replicas of the same tower. Checkpoints hold the whole net and its whole optimizer
    state, whatever the number of processes.

    towers: 2 for one tower on each device, 1 for the whole net on each.
    """

    def __init__(self, towers: int) -> None:
        super().__init__(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.towers = towers

    def setup_environment(self) -> None:
        """Join the processes, then keep this process's tower of the net."""
        super().setup_environment()
        mesh = init_device_mesh(
            self.root_device.type, (self.world_size // self.towers, self.towers), mesh_dim_names=("replica", "tower")
        )
        self.replicas = mesh["replica"].get_group()
        if self.towers == TOWERS:
            self.link = Link(mesh["tower"].get_group(), mesh["tower"].get_local_rank())
            net: Any = self.lightning_module.net  # type: ignore[union-attr]
            if not hasattr(net, "whole_rows"):  # otherwise an earlier call split it
                keep_tower(net, self.link)
            self.rows: dict[str, int] = {f"net.{name}": rows for name, rows in net.whole_rows.items()}

    def _setup_model(self, model: torch.nn.Module) -> Any:
        if self.world_size == self.towers:  # one replica
            return model
        return DistributedDataParallel(
            model, device_ids=self.determine_ddp_device_ids(), process_group=self.replicas, **self._ddp_kwargs
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Replica of this process, and their number: both towers of a replica train on the same images."""
        return {"rank": self.global_rank // self.towers, "num_replicas": self.world_size // self.towers}

    def configure_ddp(self) -> None:
        """Average gradients over replicas, if there are several."""
        self.model = self._setup_model(self.model)  # type: ignore[arg-type]

    def setup(self, trainer: L.Trainer) -> None:
        """Set up as Lightning does, except when measuring with two towers.

        Lightning would then copy process 0's weights to the other processes, which may hold the other tower.
        """
        if trainer.state.fn == TrainerFn.FITTING or self.towers == 1:
            return super().setup(trainer)
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)  # type: ignore[arg-type]
        self.model_to_device()
        self.setup_precision_plugin()
        return None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the whole net. Every process must call this."""
        state = super().lightning_module_state_dict()
        if self.towers == 1:
            return state
        return {
            key: whole_of(value, self.link, self.rows[key]) if key in self.rows else value
            for key, value in state.items()
        }

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load this process's part of the whole net's state."""
        state = checkpoint["state_dict"]
        if self.towers == TOWERS:
            state = {
                key: half_of(value, self.link.tower) if key in self.rows else value for key, value in state.items()
            }
        self.lightning_module.load_state_dict(state, strict=strict)  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the optimizer state of the whole net. Every process must call this."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if self.towers == 1:
            return state
        rows = [self._rows_of(p) for group in optimizer.param_groups for p in group["params"]]

        def whole(index: int, value: Any) -> Any:
            return whole_of(value, self.link, rows[index]) if _is_split(value) else value

        return {**state, "state": {i: {k: whole(i, v) for k, v in s.items()} for i, s in state["state"].items()}}

    def _rows_of(self, parameter: Tensor) -> int:
        name = next(name for name, p in self.lightning_module.named_parameters() if p is parameter)  # type: ignore[union-attr]
        return self.rows[name]

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load this process's part of the whole net's optimizer state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if self.towers == TOWERS:
                halves = {
                    i: {k: half_of(v, self.link.tower) if _is_split(v) else v for k, v in s.items()}
                    for i, s in state["state"].items()
                }
                state = {**state, "state": halves}
            optimizer.load_state_dict(state)


def _is_split(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
