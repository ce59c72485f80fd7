"""Determine how many processes a run needs, and start them.

torch.distributed's launcher starts them on one machine. Under torchrun, Slurm or submitit, they are already running.
"""

import logging
import os
import sys
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from alexnet_repro.errors import ProcessDied, UserError
from alexnet_repro.net.placement import TOWERS


def world(cfg: DictConfig) -> int:
    """Return the number of processes that a run needs, over all machines.

    Raises UserError for invalid or inconsistent numbers of devices, replicas, machines and processes.
    """
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
                "remove trainer.devices, and set the number of replicas with placement.replicas=N",
            )
    if size % cfg.trainer.nodes:
        raise UserError(f"{size} processes can't be shared evenly between trainer.nodes={cfg.trainer.nodes} machines")
    if (running := os.environ.get("WORLD_SIZE")) is not None and int(running) != size:
        raise UserError(
            f"{running} processes are running, but placement={cfg.placement.name} placement.replicas={replicas} needs {size}",
            "two towers need an even number" if towers == TOWERS and int(running) % 2 else "set placement.replicas",
        )
    return size


def refuse_placement(cfg: DictConfig, net: DictConfig) -> None:
    """Raise UserError if ``cfg.placement`` does not support the net, precision or number of processes."""
    world(cfg)
    if cfg.placement.devices != TOWERS:
        return
    if str(cfg.trainer.precision).startswith("16"):
        raise UserError(
            f"trainer.precision={cfg.trainer.precision}: its loss scaling could skip an update on one tower only",
            "choose bf16-mixed or 32-true",
        )
    if net.name != "alexnet" or net.towers != TOWERS:
        choice = "+ablation=one_gpu" if net.name == "alexnet" else f"net={net.name}"
        raise UserError(
            f"placement=two_devices: {choice} has no second tower for the second device", "use placement=one_device"
        )


def launched() -> bool:
    """Return whether torchrun, Slurm or this module started this process as one of several."""
    return "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1


def ran_in_processes(cfg: DictConfig, command: str, arguments: Sequence[str]) -> bool:
    """Rerun a command in as many local processes as its placement needs, and wait for them.

    Returns False without starting any if one process is enough, or if this process is already one of several. Raises
    ProcessDied if a process dies, and SystemExit if the processes end with a user error or an interruption.
    """
    processes = world(cfg)
    if processes == 1 or launched():
        return False
    _launch(command, processes // cfg.trainer.nodes, arguments)
    return True


def _launch(command: str, processes: int, arguments: Sequence[str]) -> None:
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
        raise SystemExit(130) from None  # process 0 has reported what it saved
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode in (2, 130):  # user error or interruption, which the process has reported
            raise SystemExit(first.exitcode) from None
        raise ProcessDied(
            f"process {rank} of {processes} ended with {f'exit status {first.exitcode}' if first.exitcode > 0 else f'signal {-first.exitcode}'}, "
            "and so did the run\n  the same command with resume=true continues from the last checkpoint"
        ) from None
