"""Start a command with its config, and end it with an exit status.

Exit statuses: 0 success; 2 user error, reported in a line or two; 1 internal error, with traceback; 130 interrupted.
"""

import os
import re
import shlex
import signal
import sys
import time
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from alexnet_repro.command_line import FLAGS, FLAGS_WITH_VALUE, SWEEP, quoted, with_plus
from alexnet_repro.composition import composed, given_overrides, search_config_dir, task_overrides
from alexnet_repro.configs import CONF, config_file, groups, leaves
from alexnet_repro.error_messages import about_choices, about_files, about_memory, about_overrides
from alexnet_repro.errors import IN_USE, USER_ERROR, Interrupted, InUse, ProcessDied, UserError
from alexnet_repro.processes import launched_by_us, rank
from alexnet_repro.provenance import TYPED
from alexnet_repro.sweep import before_first_job, leave_outcome, sweeping

# Seconds for which a process waits before it reports a user error. If process 0 has the same error, and reports it, the
# launcher ends the others before.
ALONE = 3
MODULES = {  # the module that defines each command's function
    "train": "training.run",
    "evaluate": "training.evaluation",
    "prepare": "data.preparation",
    "report": "page.report",
    "bench": "benchmarks.bench",
    "features": "sharing.feature_file",
    "export": "sharing.exporting",
    "convert": "sharing.conversion",
    "compare_2012": "original.comparison",
}


def command(name: str) -> None:
    """Compose conf/<name>.yaml with the command line, call the command's function, and exit.

    The function's module is imported just before the call, because that takes seconds and --help doesn't need it.
    """

    started = False

    def guarded(cfg: DictConfig) -> float | None:
        # Catch errors inside hydra.main, which would print a traceback for each of these.
        nonlocal started
        started = True
        sys.argv[1:] = arguments
        os.environ[TYPED] = typed  # also in a job's own process
        search_config_dir()
        try:
            check(cfg, name)  # before the import, which takes seconds
            module = import_module(f"alexnet_repro.{MODULES[name]}")
            if cfg.get("dry_run"):
                print(_plans(name).plan(cfg))
                return None
            result = getattr(module, name)(cfg)
            if sweeping():
                leave_outcome({"result": result if isinstance(result, dict) else None})
            return objective(result)
        except (UserError, OmegaConfBaseException) as error:
            told = str(error).rpartition("UserError: ")[2].strip()  # a loader's process adds its traceback before
            if rank() > 0:
                time.sleep(ALONE)
            if isinstance(error, InUse) and sweeping():  # another sweep does this job
                first = told.splitlines()[0]
                print(f"skipped: {first}")
                leave_outcome({"in_use": first})
            else:
                _report(told, IN_USE if isinstance(error, InUse) and "WORLD_SIZE" in os.environ else USER_ERROR)
        except ProcessDied as death:
            _fail(str(death), 1)
        except BrokenPipeError:  # train | head
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
            _fail("the output was closed: nothing reads it any more", 1)
        except (OSError, MemoryError, RuntimeError) as error:
            if told := about_memory(error) or about_files(error):
                _report(told)
            elif "WORLD_SIZE" in os.environ and re.search(r"gloo|NCCL|connection (closed|reset)", str(error), re.I):
                _fail(f"process {rank()} lost the connection to another process of this run", 1)
            else:
                raise
        except (Interrupted, KeyboardInterrupt) as stop:
            _interrupted(str(stop))
        except SystemExit as end:  # Lightning turns Ctrl-C into SystemExit
            if isinstance(end.__context__, KeyboardInterrupt):
                _interrupted(str(end.__context__))
            raise
        return None

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack traces of sockets that have to try again
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors pass through Hydra
    try:
        own_rank = rank()
    except UserError as error:
        _fail(str(error))
    for number in (signal.SIGTERM, signal.SIGUSR1):  # end a command as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    if own_rank > 0 or sys.stdout is None:  # only process 0 prints; train >&- closes the output
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:  # prepare 2>&-
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    arguments = sys.argv[1:]
    if unknown := [a for a in arguments if a.startswith("-") and not FLAGS.fullmatch(a)]:
        _fail(f"there is no flag {unknown[0]}\n  options have no dashes: epochs=3; see --help")
    if arguments and arguments[-1] in FLAGS_WITH_VALUE:
        _fail(f"{arguments[-1]} needs a value, such as {FLAGS_WITH_VALUE[arguments[-1]]}")
    typed = shlex.join(["python", "-m", f"alexnet_repro.{name}", *arguments])
    if launched_by_us():
        typed = os.environ.get(TYPED, typed)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        nodes, processes = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        typed = typed.replace("python", f"torchrun --nnodes={nodes} --nproc-per-node={processes}", 1)
    sweep = any(argument in SWEEP for argument in arguments)
    flags, others = [a for a in arguments if a in SWEEP], [a for a in arguments if a not in SWEEP]
    sys.argv[1:] = [*flags, *(quoted(with_plus(argument), sweep) for argument in others)]  # argparse wants -m first
    before_first_job(lambda jobs: _planned(name, jobs))
    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=name)(guarded)()
        sys.stdout.flush()
    except BrokenPipeError:  # train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(about_overrides(error, lambda: dict(leaves(composed(name)))))
    except KeyboardInterrupt:  # in a launcher that waits for its jobs
        _interrupted(
            "the jobs that were running have ended; add resume=true to continue them from their last checkpoints"
        )
    except OSError as error:
        if started or not (told := about_files(error)):
            raise
        _fail(told)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        if not started and "srun" in str(error):
            _fail(
                "there is no Slurm on this machine: hydra/launcher=submitit_slurm needs srun\n  use hydra/launcher=joblib"
            )
        if started or isinstance(error, RuntimeError):
            raise
        # Hydra raises these for overrides that it cannot use, such as ablation=3
        _fail(about_choices(arguments) or str(error).splitlines()[0])


def objective(result: Any) -> float | None:
    """Return what a sweeper minimises: the last validation error of a run, or the measured top-1 error, in percent.

    The test images of a store must not choose options, so that a run's own validation images come first.
    """
    if not isinstance(result, dict):
        return None
    history = result.get("history") or [{}]
    errors = [
        history[-1].get("val_error"),
        *(result.get(view, {}).get("top1_error") for view in ("centre", "ten_crop")),
    ]
    return next((error for error in errors if error is not None), None)


def _planned(name: str, jobs: list[list[str]]) -> str | None:
    """Check the options of all jobs of a sweep. Return what the jobs would do if it is a dry run, otherwise None.

    Raises UserError with each mistake once.
    """
    module, plans = _plans(name), []
    mistakes: dict[str, list[str]] = {}
    dry = False
    for job in jobs:
        cfg = composed(name, job)
        dry = dry or bool(cfg.get("dry_run"))
        try:
            with given_overrides(job):
                check(cfg, name)
                if module:
                    plans.append(module.plan(cfg))
        except UserError as error:
            mistakes.setdefault(str(error), []).append(" ".join(job))
    if mistakes:
        count = len(jobs)
        told = [
            text if len(those) == count else f"{text}\n  in {len(those)} of {count} jobs, such as: {those[0]}"
            for text, those in mistakes.items()
        ]
        raise UserError("\nerror: ".join(told) + "\nno job was started")
    if module:
        module.refuse_shared_folders(plans)
    return module.summary(plans) if dry else None


def _plans(name: str) -> Any:
    """Return the module that says what a command would do, or None."""
    return import_module("alexnet_repro.training.plan") if name == "train" else None


def _interrupted(message: str) -> None:
    if rank() == 0:
        print(f"\ninterrupted. {message}".rstrip(), file=sys.stderr)
    sys.exit(130)


def _report(message: str, status: int = USER_ERROR) -> None:
    """Print an error and end the command or, in a sweep, go on with the next job."""
    if not sweeping():
        _fail(message, status)
    print(f"error: {message}", file=sys.stderr)
    leave_outcome({"error": message.splitlines()[0]})


def _fail(message: str, status: int = USER_ERROR) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def check(cfg: DictConfig, name: str) -> None:
    """Raise UserError for an option that is unknown, invalid or without effect."""
    from alexnet_repro.option_errors import check_options  # imported here because pydantic takes 0.2 s

    refuse_added_options()
    if name == "train":
        drop_options_of_alexnet(cfg)
        follow_chosen_schedule(cfg)
    overrides = task_overrides()
    chosen = [o for o in overrides if o.lstrip("+").split("=")[0] in groups()]

    def default(key: str) -> Any:
        return OmegaConf.select(composed(name, chosen), key)

    check_options(cfg, name, overrides, default)


def drop_options_of_alexnet(cfg: DictConfig) -> None:
    """Remove the options that the recipes set for AlexNet from the config of a net of one's own."""
    from alexnet_repro.options import NETS

    if cfg.net.get("name") in NETS:
        return
    typed = {override.lstrip("+").partition("=")[0] for override in task_overrides()}
    with open_dict(cfg):
        for key in OmegaConf.load(config_file("recipe", "paper")).net:
            if f"net.{key}" not in typed:
                cfg.net.pop(key, None)


def follow_chosen_schedule(cfg: DictConfig) -> None:
    """Let schedule=NAME on the command line set the rule, too, which the recipe would otherwise choose."""
    typed = dict(override.partition("=")[::2] for override in task_overrides())
    if typed.get("schedule", "log") != "log" and "schedule.rule" not in typed:
        cfg.schedule.rule = "by_hand"


def refuse_added_options() -> None:
    """Raise UserError for +option=value unless it names a config group.

    Hydra would add any option, and nothing would read it.
    """
    for override in task_overrides():
        key = override.lstrip("+").split("=")[0].split("@")[0]
        if override.startswith("+") and key not in groups() and not key.startswith("trainer."):
            near = get_close_matches(key, groups(), 1)
            raise UserError(
                f"there is no option '{key}'",
                (f"did you mean +{near[0]}=...? " if near else "")
                + "use + only to add config groups that are not in use yet, such as +ablation=no_lrn; see --help",
            )
