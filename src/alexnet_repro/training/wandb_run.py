"""Log a run to Weights & Biases. Without a connection it is logged offline, and goes on."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig

from alexnet_repro.errors import UserError
from alexnet_repro.training.run_folder import plain

PATIENCE = 30  # seconds to wait for the service at the start and at the end of a run


def wandb_logger(cfg: DictConfig, run: Path, ablation: str) -> WandbLogger:
    """Return a logger that has begun a run: online if that needs no prompt, otherwise offline with a hint.

    If the service cannot be reached, the run is logged offline. Raises UserError for settings that W&B refuses.
    """
    import wandb

    try:
        return _logger(cfg, run, ablation)
    except (wandb.Error, ValueError) as error:  # pydantic's ValidationError is a ValueError
        lines = [line.strip() for line in str(error).splitlines() if "further information" not in line]
        raise UserError(
            f"W&B refuses its settings: {' '.join(lines)[:300]}",
            "correct the environment variables WANDB_* or the options logger.*, or train without W&B: logger=csv",
        ) from None


def _logger(cfg: DictConfig, run: Path, ablation: str) -> WandbLogger:
    import wandb

    mode = cfg.logger.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    reason = "by choice or without an API key"
    if mode == "online" and (problem := _unreachable(wandb.setup().settings.base_url)):
        mode, reason = "offline", problem
    if mode != "online":
        if mode == "offline":
            print(f"W&B: offline, {reason}; upload later with: wandb sync {run}/wandb/offline-run-*")
        return _begun(cfg, run, ablation, mode)
    try:
        return _begun(cfg, run, ablation, mode)
    except (wandb.Error, OSError) as error:
        wandb.teardown()  # otherwise its service believes that the run's id is in use
        print(
            f"W&B: offline, {str(error).splitlines()[0][:100]}; upload later with: wandb sync {run}/wandb/offline-run-*"
        )
        return _begun(cfg, run, ablation, "offline")


def _unreachable(url: str) -> str | None:
    """Return why there is no connection to the service, or None if there is one or a proxy leads to it."""
    if any(name in os.environ for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy")):
        return None
    address = urlsplit(url)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError as error:
        return f"since {address.hostname} cannot be reached ({error.strerror or error})"
    return None


def _begun(cfg: DictConfig, run: Path, ablation: str, mode: str) -> WandbLogger:
    import wandb

    id_file = run / "wandb-id"  # so that a resumed run continues in the same W&B run
    if not id_file.is_file() or not id_file.read_text().strip():
        id_file.write_text(uuid4().hex[:8])
    logger = WandbLogger(
        id=id_file.read_text().strip(),
        resume="allow",
        name=str(run),
        save_dir=run,
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        config={**plain(cfg), "ablation": ablation},
        log_model=False,
        mode=mode,  # not offline=, which sets an environment variable that wandb has already read
        settings=wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE),
    )
    _ = logger.experiment  # begins the run
    return logger


def finish_wandb(loggers: Sequence[Logger]) -> None:
    """End the W&B run; otherwise the next run of a sweep would continue in it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
