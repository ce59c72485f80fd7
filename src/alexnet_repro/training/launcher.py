"""Determine how many processes a run needs, and start them.

torch.distributed's launcher starts them on one machine. Under torchrun, Slurm or submitit, they are already running.
"""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig
from torch.distributed import TCPStore, init_process_group
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from alexnet_repro.errors import IN_USE, USER_ERROR, InUse, ProcessDied, UserError
from alexnet_repro.net.placement import TOWERS
from alexnet_repro.processes import OWN_LAUNCH, number, rank, tasks
from alexnet_repro.sweep import sweeping

LARGEST_PORT = 2**16 - 1
PATIENCE = timedelta(seconds=45)  # how long the processes of a Slurm job wait for each other


def world(cfg: DictConfig) -> int:
    """Return the number of processes that a run needs, over all machines.

    Raises UserError for inconsistent numbers of devices, replicas and machines, and if torchrun or Slurm started another
    number of processes.
    """
    towers, replicas, devices = cfg.placement.devices, cfg.placement.replicas, cfg.trainer.devices
    size, nodes = towers * replicas, machines(cfg)
    if devices is not None and devices * nodes != size:
        if replicas == 1 and devices * nodes % towers == 0:
            size = devices * nodes
        else:
            raise UserError(
                f"placement={cfg.placement.name} with {replicas} replica{'s' * (replicas > 1)} needs {size} devices, "
                f"not trainer.devices={devices} on {nodes} machine{'s' * (nodes > 1)}",
                "remove trainer.devices, and set the number of replicas with placement.replicas=N",
            )
    if launched() and tasks() != size:
        raise UserError(
            f"{tasks()} processes are running, but placement={cfg.placement.name} placement.replicas={replicas} needs {size}",
            _how_to_start(size, towers),
        )
    if size % nodes:
        raise UserError(f"{size} processes can't be shared evenly between {nodes} machines")
    return size


def _how_to_start(size: int, towers: int) -> str:
    if "WORLD_SIZE" in os.environ:
        odd = towers == TOWERS and tasks() % TOWERS
        return "two towers need an even number" if odd else f"set placement.replicas, or start {size} with torchrun"
    return (
        f"use srun --ntasks={size}, or set placement.replicas; "
        "for one run per task, set SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 before each command (docs/clusters.md)"
    )


def machines(cfg: DictConfig) -> int:
    """Return the number of machines: what torchrun or Slurm says, or else ``cfg.trainer.nodes``.

    Raises UserError if the two disagree, or if Slurm's machines have different numbers of processes.
    """
    given: int = cfg.trainer.nodes
    if tasks() == 1:
        return given
    if "WORLD_SIZE" in os.environ:
        local = number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else max(1, tasks() // given)
        found = max(1, tasks() // local)
    else:
        name = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in os.environ else "SLURM_NNODES"
        found = number(name, 1) if name in os.environ else given
        if "," in os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""):
            raise UserError(
                f"Slurm's machines have different numbers of processes: {os.environ['SLURM_STEP_TASKS_PER_NODE']}",
                f"use srun --ntasks-per-node={max(1, tasks() // found)}",
            )
    if given not in (1, found):
        raise UserError(f"trainer.nodes={given}, but the processes run on {found} machines", "remove trainer.nodes")
    return found


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
    if net.get("lrn_across_towers"):
        raise UserError(
            "placement=two_devices: with net.lrn_across_towers=true, normalisation needs the maps of both towers",
            "use placement=one_device",
        )


def launched() -> bool:
    """Return whether torchrun, Slurm or this module started this process as one of several."""
    return "WORLD_SIZE" in os.environ or tasks() > 1


def meet(cfg: DictConfig, cuda: bool) -> None:
    """Join the processes that Slurm started. Do nothing in a process that is alone, or that torchrun started.

    Afterwards the environment has torchrun's variables. Raises UserError if one of these is missing or wrong, or if the
    processes do not meet within PATIENCE; torch would wait for half an hour.
    """
    if tasks() == 1:
        return
    if "MASTER_PORT" in os.environ and number("MASTER_PORT", 1) > LARGEST_PORT:
        raise UserError(f"the environment has MASTER_PORT={os.environ['MASTER_PORT']}, above {LARGEST_PORT}")
    if "WORLD_SIZE" in os.environ:
        if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(
                f"the environment has WORLD_SIZE={tasks()}, but not {', '.join(missing)}",
                "start the processes with torchrun, which sets them, or run: unset WORLD_SIZE",
            )
        return
    slurm = {name.removeprefix("SLURM_"): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    nodes = slurm.get("STEP_NODELIST", slurm.get("NODELIST", "127.0.0.1"))
    host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    port = 15_000 + (101 * number("SLURM_JOB_ID", 0) + number("SLURM_STEP_ID", 0)) % 10_000
    port = number("MASTER_PORT", 1) if "MASTER_PORT" in os.environ else port
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        raise UserError(
            f"the name of the first machine, {host}, does not resolve on {socket.gethostname()}",
            "set MASTER_ADDR to its address before srun",
        ) from None
    try:
        store = TCPStore(host, port, tasks(), rank() == 0, timeout=PATIENCE)
        init_process_group("nccl" if cuda else "gloo", store=store, rank=rank(), world_size=tasks())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"the {tasks()} processes did not meet at {host}:{port} within {PATIENCE.seconds} seconds: "
            f"{str(error).splitlines()[0][:100]}",
            "start them with srun, all at once; if the machines have no route to that address, set MASTER_ADDR",
        ) from None
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(rank()),
        "LOCAL_RANK": slurm.get("LOCALID", "0"),
        "GROUP_RANK": slurm.get("NODEID", "0"),
        "LOCAL_WORLD_SIZE": str(tasks() // machines(cfg)),
        "WORLD_SIZE": str(tasks()),
    }


def ran_in_processes(cfg: DictConfig, command: str, arguments: Sequence[str]) -> bool:
    """Rerun a command in as many local processes as its placement needs, and wait for them.

    Returns False without starting any if one process is enough, or if this process is already one of several. Raises
    UserError if this machine has too few GPUs, ProcessDied if a process dies, and SystemExit if the processes end with a
    user error or an interruption.
    """
    size = world(cfg)
    if size == 1 or launched():
        return False
    processes, gpus, device = size // machines(cfg), torch.cuda.device_count(), cfg.trainer.accelerator
    if gpus < processes and (device in ("gpu", "cuda") or (device == "auto" and gpus)):
        raise UserError(
            f"placement={cfg.placement.name} with placement.replicas={cfg.placement.replicas} needs {processes} GPUs, "
            f"but this machine has {gpus or 'none'}",
            "choose another placement, or add trainer=cpu",
        )
    _launch(command, processes, arguments)
    return True


def _launch(command: str, processes: int, arguments: Sequence[str]) -> None:
    own_threads = "OMP_NUM_THREADS" not in os.environ
    if own_threads:
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"{OWN_LAUNCH}{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", f"alexnet_repro.{command}", *arguments)
    except SignalException:
        raise SystemExit(130) from None  # process 0 has reported what it saved
    except ChildFailedError as failure:
        failed, first = failure.get_first_failure()
        if first.exitcode in (USER_ERROR, IN_USE):  # which the process has reported
            if sweeping():  # the next job may do better
                kind = InUse if first.exitcode == IN_USE else UserError
                raise kind("the processes of this job ended with the error above") from None
            raise SystemExit(USER_ERROR) from None
        if first.exitcode == 130:  # an interruption, which it has reported, too
            raise SystemExit(130) from None
        raise ProcessDied(
            f"process {failed} of {processes} ended with {f'exit status {first.exitcode}' if first.exitcode > 0 else f'signal {-first.exitcode}'}, "
            "and so did the run\n  the same command with resume=true continues from the last checkpoint"
        ) from None
    finally:
        if own_threads:
            del os.environ["OMP_NUM_THREADS"]  # the next job of a sweep may have another number of processes
