"""The processes of one run: replicas of the net (data parallelism), and the two towers of each replica.

torch.distributed's own launcher starts them on one machine; under torchrun, Slurm or submitit they exist already. Process
``rank`` works for tower ``rank % towers`` of replica ``rank // towers``.
"""

import logging
import os
import sys
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from alexnet_repro.cli import ProcessDied, UserError
from alexnet_repro.placement import TOWERS, Link, half_of, keep_tower, whole_of


class TowerStrategy(DDPStrategy):
    """Lightning's strategy for world = replicas x towers processes, one for each device.

    towers: 2 for one tower on each device, 1 for the whole net on each. Gradients are averaged over the replicas of the same
    tower, checkpoints hold the whole net and its whole optimizer state, whatever the number of processes.
    """

    def __init__(self, towers: int) -> None:
        super().__init__(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.towers = towers

    def setup_environment(self) -> None:
        """Join the processes; then keep this process's tower of the net."""
        super().setup_environment()
        mesh = init_device_mesh(
            self.root_device.type, (self.world_size // self.towers, self.towers), mesh_dim_names=("replica", "tower")
        )
        self.replicas = mesh["replica"].get_group()
        self.replica = (mesh["replica"].get_local_rank(), mesh["replica"].size())
        if self.towers == TOWERS:
            self.link = Link(mesh["tower"].get_group(), mesh["tower"].get_local_rank())
            net: Any = self.lightning_module.net  # type: ignore[union-attr]
            if not hasattr(net, "whole_rows"):  # else it was done in an earlier call
                keep_tower(net, self.link)
            self.rows: dict[str, int] = {f"net.{name}": rows for name, rows in net.whole_rows.items()}

    def _setup_model(self, model: torch.nn.Module) -> Any:
        if self.replica[1] == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=self.determine_ddp_device_ids(), process_group=self.replicas, **self._ddp_kwargs
        )

    def configure_ddp(self) -> None:
        """Average gradients over replicas, where there are several."""
        self.model = self._setup_model(self.model)  # type: ignore[arg-type]

    def setup(self, trainer: L.Trainer) -> None:
        """As Lightning's; but measuring must not copy process 0's weights to the others, whose tower is another one."""
        if trainer.state.fn == TrainerFn.FITTING or self.towers == 1:
            return super().setup(trainer)
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)  # type: ignore[arg-type]
        self.model_to_device()
        self.setup_precision_plugin()
        return None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole net's. Every process must call this."""
        state = super().lightning_module_state_dict()
        if self.towers == 1:
            return state
        return {
            key: whole_of(value, self.link, self.rows[key]) if key in self.rows else value
            for key, value in state.items()
        }

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Take this process's part of the whole net's."""
        state = checkpoint["state_dict"]
        if self.towers == TOWERS:
            state = {
                key: half_of(value, self.link.tower) if key in self.rows else value for key, value in state.items()
            }
        self.lightning_module.load_state_dict(state, strict=strict)  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole net's. Every process must call this."""
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
        """Take this process's part of the whole net's."""
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


def world(cfg: DictConfig) -> int:
    """How many processes the run needs, on all its machines. Raises UserError for numbers that don't go together."""
    towers, replicas, devices = cfg.placement.devices, cfg.placement.replicas, cfg.trainer.devices
    for key, value in {
        "placement.replicas": replicas,
        "trainer.devices": devices,
        "trainer.nodes": cfg.trainer.nodes,
    }.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{key}={value}: this must be a whole number above 0")
    size = towers * replicas
    if devices is not None and devices * cfg.trainer.nodes != size:
        if replicas == 1 and devices * cfg.trainer.nodes % towers == 0:
            size = devices * cfg.trainer.nodes
        else:
            raise UserError(
                f"placement={cfg.placement.name} with {replicas} replica{'s' * (replicas > 1)} needs {size} devices, "
                f"not trainer.devices={devices} on {cfg.trainer.nodes} machine{'s' * (cfg.trainer.nodes > 1)}",
                "leave trainer.devices out, and say how many replicas with placement.replicas=N",
            )
    if size % cfg.trainer.nodes:
        raise UserError(f"{size} processes can't be shared evenly by trainer.nodes={cfg.trainer.nodes} machines")
    if (there := os.environ.get("WORLD_SIZE")) is not None and int(there) != size:
        raise UserError(
            f"there are {there} processes, and placement={cfg.placement.name} placement.replicas={replicas} needs {size}",
            "two towers need an even number" if towers == TOWERS and int(there) % 2 else "give placement.replicas",
        )
    return size


def refuse_placement(cfg: DictConfig, net: DictConfig) -> None:
    """Raise UserError for a net, a precision or a number of processes that ``cfg.placement`` can't do with."""
    world(cfg)
    if cfg.placement.devices != TOWERS:
        return
    if str(cfg.trainer.precision).startswith("16"):
        raise UserError(
            f"trainer.precision={cfg.trainer.precision}: its loss scaling could skip an update on one tower only",
            "choose bf16-mixed or 32-true",
        )
    if net.name != "alexnet" or net.towers != TOWERS:
        what = "+ablation=one_gpu" if net.name == "alexnet" else f"net={net.name}"
        raise UserError(f"placement=two_devices: {what} has no second tower to put there", "use placement=one_device")


def launched() -> bool:
    """Whether this is one of several processes already: of torchrun's, of Slurm's, or of our own ``launch``."""
    return "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1


def launch(command: str, processes: int, *extra: str) -> None:
    """Do this very command in so many processes on this machine, with ``extra`` options, and wait for them.

    Raises ProcessDied if one of them dies, and SystemExit if they ended by the user's mistake or wish.
    """
    arguments = [*HydraConfig.get().overrides.task, *extra]
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"alexnet_repro-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", f"alexnet_repro.{command}", *arguments)
    except SignalException:
        raise SystemExit(130) from None  # process 0 has said what it saved
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode in (2, 130):  # the user's mistake, or interrupted: it has said so
            raise SystemExit(first.exitcode) from None
        raise ProcessDied(
            f"process {rank} of {processes} ended with {f'exit status {first.exitcode}' if first.exitcode > 0 else f'signal {-first.exitcode}'}, "
            "and so did the run\n  the same command with resume=true goes on from the last checkpoint"
        ) from None
