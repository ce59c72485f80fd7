"""Create Lightning's Trainer: device, precision and strategy."""

import ctypes
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from alexnet_repro.errors import UserError
from alexnet_repro.processes import tasks
from alexnet_repro.training.checkpoints import OneFile
from alexnet_repro.training.classifier import LOG_EVERY
from alexnet_repro.training.launcher import machines, world
from alexnet_repro.training.progress import Progress
from alexnet_repro.training.strategy import TowerStrategy


def fast_bfloat16(gpu: bool = False) -> bool:
    """Return whether the processor (AVX512-BF16 or AMX) or the GPU (Ampere or later) multiplies bfloat16 in hardware."""
    if gpu:
        return torch.cuda.get_device_capability() >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system, on Linux.

    A training step on a CPU frees and reallocates gigabytes, and fresh pages for them cost a quarter of its time.
    However, the alignment of heap memory depends on earlier allocations, and some kernels round differently for another
    alignment. A resumed run then equals an uninterrupted one only up to rounding.
    """
    if sys.platform == "linux":
        no_mmap, no_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for option in (no_mmap, no_trim) if mallopt else ():
            mallopt(*option)  # type: ignore[misc]


def on_gpu(cfg: DictConfig) -> bool:
    """Return whether ``cfg.trainer`` selects a GPU."""
    return cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


class StopAtOnce(L.Callback):
    """End a measurement at once on a signal. Lightning's handler would wait until all images are measured."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the handler that Lightning installed."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler)


def set_up_gpu_options(cfg: DictConfig, gpu: bool) -> None:
    """Set TF32 explicitly. Raise UserError for an option that needs a GPU, or for compiling without a compiler."""
    for option, value in (("tf32", True), ("compile", "graphs")):
        if not gpu and cfg.trainer[option] == value:
            raise UserError(
                f"trainer.{option}={str(value).lower()} is for GPUs, and this run is not on one", "leave it out"
            )
    compilers = os.environ.get("CXX", "g++"), "clang++"
    if cfg.trainer.compile != "off" and not gpu and not any(map(shutil.which, compilers)):
        raise UserError(f"trainer.compile={cfg.trainer.compile} needs a C++ compiler on a CPU", "install g++")
    # cuDNN would otherwise use TF32 for convolutions in "32-true", unlike PyTorch's matrix products
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.trainer.tf32
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is written before it is read


def make_trainer(cfg: DictConfig, folder: Path | None = None, **options: Any) -> L.Trainer:
    """Create Lightning's Trainer for ``cfg.trainer`` and ``cfg.placement``, and pass ``options`` on to it.

    folder: where Lightning may write, which is the run's folder.

    Raises UserError for a device or a precision that is not available.
    """
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")
    # data/sampler.py resumes within an epoch
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings(
        "ignore", "The schedule is for .* epochs"
    )  # of a run that stop_at ended, when it is measured
    # run_folder.py keeps the logs
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    # logged values are already synchronised
    warnings.filterwarnings("ignore", "It is recommended to use `self.log.*sync_dist=True")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # without a replacement yet
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.. is deprecated")  # Lightning's own call
    if "SLURM_NTASKS" in os.environ:  # Lightning insists on it, though launcher.py decides about Slurm
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", "1")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # launcher.py decides about Slurm
    if cfg.trainer.keep_memory:
        keep_freed_memory()
    accelerator, precision, processes = cfg.trainer.accelerator, cfg.trainer.precision, world(cfg)
    gpu = on_gpu(cfg)
    if precision == "auto":
        on_mps = accelerator in ("auto", "mps") and not gpu and torch.backends.mps.is_available()
        precision = "bf16-mixed" if not on_mps and fast_bfloat16(gpu) else "32-true"
    if precision == "16-mixed" and not gpu and accelerator != "mps":
        raise UserError("trainer.precision=16-mixed needs a GPU", "choose bf16-mixed or 32-true")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: PyTorch finds no GPU on this machine", "use trainer=cpu")
    set_up_gpu_options(cfg, gpu)
    usual = {
        "callbacks": [],
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": LOG_EVERY,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "benchmark": gpu and not cfg.trainer.deterministic,  # cuDNN tries its algorithms for each shape
    }
    options = {**usual, **options}
    shown = [Progress(every=LOG_EVERY if gpu else 1)] if options.get("enable_progress_bar", True) else []
    options["callbacks"] = [*options["callbacks"], StopAtOnce(), *shown]
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=processes // machines(cfg),
            num_nodes=machines(cfg),
            strategy=TowerStrategy(cfg.placement.devices) if processes > 1 else "auto",
            precision=precision,
            deterministic=gpu and cfg.trainer.deterministic,
            use_distributed_sampler=False,
            # Lightning would otherwise detect Slurm, save hpc_ckpt_1.ckpt on its signals, and load that file later
            plugins=[TorchElasticEnvironment() if tasks() > 1 else LightningEnvironment(), OneFile()],
            default_root_dir=folder,
            **options,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(
            f"trainer: {str(error).splitlines()[0]}", "see the options trainer.*; --help lists them"
        ) from None
