"""Tell the place of this process among those of its run, as torchrun or Slurm started them, and its cores."""

import os

from alexnet_repro.errors import UserError


def tasks() -> int:
    """Return the number of processes of this run that torchrun or Slurm started, or 1 for a process on its own.

    Raises UserError if the environment holds something other than a number.
    """
    if "WORLD_SIZE" in os.environ:
        return number("WORLD_SIZE", 1)
    if "SLURM_PROCID" in os.environ:  # a task of a job step, which may have fewer tasks than its job
        return number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS", 1)
    return 1


def rank() -> int:
    """Return the rank that torchrun or Slurm gave this process, or 0 if there is only one process.

    Raises UserError if the environment holds something other than a number from 0 to ``tasks() - 1``.
    """
    if tasks() == 1:
        return 0
    name = "RANK" if "WORLD_SIZE" in os.environ else "SLURM_PROCID"
    if (own := number(name, 0)) >= tasks():
        raise UserError(f"the environment has {name}={own}, but only {tasks()} processes")
    return own


OWN_LAUNCH = "alexnet_repro-"  # how the id of a launch begins when this package starts the processes


def launched_by_us() -> bool:
    """Return whether this package, and not torchrun, started this process as one of several."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OWN_LAUNCH)


def number(name: str, least: int) -> int:
    """Return a whole number from the environment, ``least`` if it is not set. Raise UserError if it is no such number."""
    value = os.environ.get(name, str(least))
    if not value.isdecimal() or int(value) < least:
        raise UserError(
            f"the environment has {name}={value}, which is not a whole number from {least}",
            f"start the processes with torchrun or srun, or run: unset {name}",
        )
    return int(value)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
