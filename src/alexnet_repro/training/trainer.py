"""Create Lightning's Trainer: device, precision and strategy."""

import ctypes
import logging
import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from alexnet_repro.errors import UserError
from alexnet_repro.training.launcher import world
from alexnet_repro.training.strategy import TowerStrategy


def fast_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX).

    Training is then about 3 times as fast.
    """
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


def make_trainer(cfg: DictConfig, **options: Any) -> L.Trainer:
    """Create Lightning's Trainer for ``cfg.trainer`` and ``cfg.placement``, and pass ``options`` on to it.

    Raises UserError for a device or a precision that is not available.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")
    # data/module.py resumes within an epoch
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    # run_folder.py keeps the logs
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    # logged values are already synchronised
    warnings.filterwarnings("ignore", "It is recommended to use `self.log.*sync_dist=True")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # without a replacement yet
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.. is deprecated")  # Lightning's own call
    if cfg.trainer.keep_memory:
        keep_freed_memory()
    accelerator, precision, processes = cfg.trainer.accelerator, cfg.trainer.precision, world(cfg)
    if precision == "auto":
        on_cpu = accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        precision = "bf16-mixed" if on_cpu and fast_bfloat16() else "32-true"
    options = {"callbacks": [], "logger": False, "enable_checkpointing": False, **options}
    options["callbacks"] = [*options["callbacks"], TQDMProgressBar(leave=True)]
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=processes // cfg.trainer.nodes,
            num_nodes=cfg.trainer.nodes,
            strategy=TowerStrategy(cfg.placement.devices) if processes > 1 else "auto",
            precision=precision,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(
            f"trainer: {str(error).splitlines()[0]}", "see the options trainer.accelerator, .devices, .precision"
        ) from None
