"""Start a command with its config, and end it with an exit status.

Exit statuses: 0 success; 2 user error, reported in a line or two; 1 internal error, with traceback; 130 interrupted.
"""

import errno
import os
import re
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from alexnet_repro.configs import CONF, leaves
from alexnet_repro.errors import Interrupted, ProcessDied, UserError
from alexnet_repro.provenance import rank
from alexnet_repro.sweep import leave_outcome, sweeping

MODULES = {  # the module that defines each command's function
    "train": "training.run",
    "evaluate": "training.evaluation",
    "prepare": "data.preparation",
    "report": "page.report",
    "bench": "benchmarks.bench",
}


def command(name: str) -> None:
    """Compose conf/<name>.yaml with the command line, call the command's function, and exit.

    The function's module is imported just before the call, because that takes seconds and --help doesn't need it.
    """

    def guarded(cfg: DictConfig) -> None:
        # Catch errors inside hydra.main, which would print a traceback for each of these.
        try:
            task = getattr(import_module(f"alexnet_repro.{MODULES[name]}"), name)
            refuse_added_options()
            refuse_other_types(cfg, name)
            result = task(cfg)
            if sweeping():
                leave_outcome({"result": result})
        except (UserError, OmegaConfBaseException) as error:
            if not sweeping():
                _fail(str(error))
            print(f"error: {error}", file=sys.stderr)  # and continue with the next job
            leave_outcome({"error": str(error).splitlines()[0]})
        except ProcessDied as death:
            _fail(str(death), 1)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail(
                f"the disk is full: {error}\n  free some space (a checkpoint of the full net takes 490 MB), then continue with resume=true"
            )
        except RuntimeError as error:
            if "WORLD_SIZE" not in os.environ or not re.search(
                r"gloo|NCCL|connection (closed|reset)", str(error), re.I
            ):
                raise
            _fail(f"process {rank()} lost the connection to another process of this run", 1)
        except (Interrupted, KeyboardInterrupt) as stop:
            _interrupted(str(stop))
        except SystemExit as end:  # Lightning turns Ctrl-C into SystemExit
            if isinstance(end.__context__, KeyboardInterrupt):
                _interrupted(str(end.__context__))
            raise

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors pass through Hydra
    if rank() > 0:  # only process 0 prints
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    sys.argv[1:] = [_quoted(argument) for argument in sys.argv[1:]]
    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error))


def _quoted(argument: str) -> str:
    """Return key=value with quotes around a value that contains another =, as Hydra's grammar requires.

    Names of runs contain =. The items of a list are quoted one by one.
    """
    key, _, value = argument.partition("=")
    if argument.startswith("-") or "=" not in value or re.search(r"""['"({]""", value):
        return argument
    if value.startswith("[") and value.endswith("]"):
        items = [f"'{item.strip()}'" if "=" in item else item for item in value[1:-1].split(",")]
        return f"{key}=[{','.join(items)}]"
    return f"{key}='{value}'"


def _interrupted(message: str) -> None:
    if rank() == 0:
        print(f"\ninterrupted. {message}".rstrip(), file=sys.stderr)
    sys.exit(130)


def _fail(message: str, status: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _explain(error: Exception) -> str:
    """Return Hydra's message in a line or two: what is wrong, and what the choices are."""
    text = str(error)
    if missing := re.search(r"Could not find '(.+?)/(.+?)'\s+Available options in '.+?':\n((?:\t.+\n)*)", text):
        group, name, options = missing[1], missing[2], missing[3].split()
        near = get_close_matches(name, options, 1)
        return f"there is no {group}={name}\n  " + (
            (f"did you mean {near[0]}? " if near else "") + f"there are: {', '.join(options)}"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key", "object_type", "See https", "Config search"))]
    if unknown := re.match(r"Could not override '(.+?)'", lines[0]):
        return f"there is no option '{unknown[1]}'\n  " + (
            f"add a config group that is not in use yet with +{unknown[1]}=..."
            if (Path(CONF) / unknown[1]).is_dir()
            else "list the options with --cfg job"
        )
    return "\n  ".join([lines[0], " ".join(lines[1:])]).rstrip()


def refuse_other_types(cfg: DictConfig, config: str) -> None:
    """Raise UserError for a value of another type than in the config files, such as a word for a number."""
    if not GlobalHydra.instance().is_initialized():
        return  # a job that a launcher runs in a process of its own
    nullable = nullable_options()
    groups = [o for o in HydraConfig.get().overrides.task if (Path(CONF) / o.lstrip("+").split("=")[0]).is_dir()]
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a word"}
    given = dict(leaves(cfg))
    for key, default in leaves(hydra.compose(config, groups)):
        value = given.get(key)
        numbers = isinstance(value, int | float) and not isinstance(value, bool)
        fits = (
            numbers
            if type(default) in (int, float)
            else isinstance(value, type(default)) or (isinstance(default, str) and numbers)
        )
        if value is None and key.rpartition(".")[2] in nullable:
            continue
        if default is not None and type(default) in kinds and not fits:
            raise UserError(
                f"{key}={'null' if value is None else value}: this must be {kinds[type(default)]}, such as {default}"
            )


def nullable_options() -> set[str]:
    """Return the last part of the name of every option that may be null.

    An option may be null if some config file sets it to null.
    """
    text = "\n".join(file.read_text() for file in Path(CONF).rglob("*.yaml"))
    return set(re.findall(r"(\w+): null\b", text))


def task_overrides() -> list[str]:
    """Return the overrides on the command line, as Hydra parsed them."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def refuse_added_options() -> None:
    """Raise UserError for +option=value unless it names a config group.

    Hydra would add any option, and nothing would read it.
    """
    groups = sorted(folder.name for folder in Path(CONF).iterdir() if folder.is_dir())
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+").split("=")[0].split("@")[0]
        if override.startswith("+") and key not in groups:
            near = get_close_matches(key, groups, 1)
            raise UserError(
                f"there is no option '{key}'",
                (f"did you mean +{near[0]}=...? " if near else "")
                + "use + only to add config groups that are not in use yet, such as +ablation=no_lrn; see --help",
            )
