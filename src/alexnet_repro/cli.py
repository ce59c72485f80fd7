"""Start a command with its config, and end it with an exit status.

Exit statuses: 0 success; 2 user error, reported in a line or two; 1 internal error, with traceback; 130 interrupted.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexnet_repro.configs import CONF, groups, leaves
from alexnet_repro.error_messages import about_choices, about_files, about_memory, about_overrides
from alexnet_repro.errors import IN_USE, USER_ERROR, Interrupted, InUse, ProcessDied, UserError
from alexnet_repro.processes import rank
from alexnet_repro.sweep import leave_outcome, sweeping

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

    def guarded(cfg: DictConfig) -> None:
        # Catch errors inside hydra.main, which would print a traceback for each of these.
        nonlocal started
        started = True
        sys.argv[1:] = arguments  # as typed, for the command that results record
        try:
            task = getattr(import_module(f"alexnet_repro.{MODULES[name]}"), name)
            refuse_added_options()
            check(cfg, name)
            result = task(cfg)
            if sweeping():
                leave_outcome({"result": result if isinstance(result, dict) else None})
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
    sweep = "-m" in arguments or "--multirun" in arguments
    sys.argv[1:] = [_quoted(argument, sweep) for argument in arguments]
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
    except (ValueError, TypeError, AttributeError) as error:
        if started:
            raise
        # Hydra raises these for overrides that it cannot use, such as ablation=3
        _fail(about_choices(arguments) or str(error).splitlines()[0])


# Options whose values are paths.
PATHS = (
    "run", "runs", "of", "pretrained", "pretrained.run", "mistakes", "source", "data.store", "store", "results", "out", "classes",
)  # fmt: skip
FLAGS = re.compile(
    r"-(m|h|c|p|r|i|cp|cn|cd|sc)|--(multirun|help|hydra-help|version|cfg|package|resolve|info|run|config-path|config-name|"
    r"config-dir|shell-completion|experimental-rerun)(=.*)?"
)


def _quoted(argument: str, sweep: bool) -> str:
    """Return key=value with quotes around a value that Hydra's grammar does not take as it is.

    Names of runs contain = and commas, and paths may contain anything, and begin with ~/. The items of a list are quoted one by one. A comma
    separates the values of a sweep with -m, and the runs of runs=, unless it is part of a path that exists.
    """
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals or value in ("", "null") or value[0] in "'\"":
        return argument
    is_list = re.fullmatch(r"\[[^][\"']*\]", value) is not None  # one list, not the values of a sweep over lists
    if is_list and (key in PATHS or "=" in value):
        paths = [
            f"'{path}'" if key in PATHS or "=" in path else path for path in _paths(value[1:-1].split(",")) if path
        ]
        return f"{key}=[{','.join(paths)}]"
    if key in PATHS and value.startswith("~/"):  # not every shell expands it after a =
        value = str(Path(value).expanduser())
        argument = f"{key}={value}"
    several = "," in value and (sweep or key == "runs")
    if key in PATHS and (os.access(value, os.F_OK) if several else value[0] != "["):
        return f"{key}={in_quotes(value)}"
    try:
        OverridesParser.create().parse_override(argument)
        return argument
    except HydraException:
        return argument if value[0] in "[{" else f"{key}={in_quotes(value)}"


def _paths(parts: list[str]) -> list[str]:
    """Return the items of a list that was split at each comma, with the paths that exist and contain commas whole."""
    items = []
    while parts:
        last = next((n for n in range(len(parts), 1, -1) if os.access(",".join(parts[:n]).strip(), os.F_OK)), 1)
        items.append(",".join(parts[:last]).strip())
        parts = parts[last:]
    return items


def in_quotes(value: str) -> str:
    """Return a value in quotes, as Hydra's grammar wants it."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"


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

    overrides = HydraConfig.get().overrides.task
    chosen = [o for o in overrides if o.lstrip("+").split("=")[0] in groups()]

    def default(key: str) -> Any:
        if not GlobalHydra.instance().is_initialized():
            return None  # a job that a launcher runs in a process of its own
        return OmegaConf.select(hydra.compose(name, chosen), key)

    check_options(cfg, name, list(overrides), default)


def composed(name: str, options: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """Return the config of a command with these options; with_hydra: and Hydra's own, under the key hydra."""
    if GlobalHydra.instance().is_initialized():  # in a command
        return hydra.compose(name, list(options), return_hydra_config=with_hydra)
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(name, list(options), return_hydra_config=with_hydra)


def task_overrides() -> list[str]:
    """Return the overrides on the command line, as Hydra parsed them."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def refuse_added_options() -> None:
    """Raise UserError for +option=value unless it names a config group.

    Hydra would add any option, and nothing would read it.
    """
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+").split("=")[0].split("@")[0]
        if override.startswith("+") and key not in groups():
            near = get_close_matches(key, groups(), 1)
            raise UserError(
                f"there is no option '{key}'",
                (f"did you mean +{near[0]}=...? " if near else "")
                + "use + only to add config groups that are not in use yet, such as +ablation=no_lrn; see --help",
            )
