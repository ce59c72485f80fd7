"""Say in a line or two what is wrong with a command line, a path, a disk or memory when a library raises an error."""

import errno
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from alexnet_repro.configs import groups, members

UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip


PATH_OPTIONS = ("run=FOLDER", "data.store=FOLDER", "out=FILE")


def about_files(error: Exception) -> str:
    """Return what is wrong with a path or a disk in a line or two, or nothing for other errors."""
    if not isinstance(error, OSError):  # pathlib's before Python 3.13
        return f"{error}\n  choose another path, or remove the link" if str(error).startswith("Symlink loop") else ""
    name = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {name}{error.strerror or error}\n"
            "  free some space (each of the two checkpoints of the full net takes 490 MB), then run the command again; "
            "train continues with resume=true"
        )
    if error.errno in UNUSABLE and error.filename:
        return f"{name}{error.strerror}\n  choose a path that exists and can be written: {' or '.join(PATH_OPTIONS)}"
    return ""


def about_memory(error: Exception) -> str:
    """Return what to do about too little memory, or nothing for other errors."""
    first = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or re.search(r"out of memory|(can't|cannot) allocate memory", first, re.I):
        return f"there is too little memory: {first[:200]}\n  choose a smaller batch_size, or a device with more memory"
    return ""


def about_choices(arguments: list[str]) -> str:
    """Return which argument gives a config group something else than a name, in two lines, or nothing."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key in groups():
            names = members(key)
            if not set(value.strip("[]").split(",")) <= {*names, "null"}:
                return _no_such_choice(key, value, names)
    return ""


def _no_such_choice(group: str, name: str, choices: list[str]) -> str:
    near = get_close_matches(name, choices, 1)
    return f"there is no {group}={name}\n  " + (
        (f"did you mean {near[0]}? " if near else "") + f"there are: {', '.join(choices)}"
    )


# What other programs call some options.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "model": "net",
    "dataset": "data",
    "datamodule": "data",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "devices": "trainer.devices",
    "gpus": "trainer.devices",
    "num_workers": "trainer.workers",
}


def about_overrides(error: Exception, defaults: Callable[[], dict[str, Any]]) -> str:
    """Return Hydra's message in a line or two: what is wrong, and what the choices are.

    defaults: returns the options of the command by dotted name.
    """
    text = str(error)
    if missing := re.search(r"Could not find '(.+?)/(.+?)'\s+Available options in '.+?':\n((?:\t.+\n)*)", text):
        return _no_such_choice(missing[1], missing[2], missing[3].split())
    if missing := re.search(r"Could not load '(\w+)/(.+?)'", text):
        return _no_such_choice(missing[1], missing[2], members(missing[1]))
    if twice := re.match(r"Multiple values for (\w+)\.", text):
        chosen = [a.partition("=")[2] for a in sys.argv if a.lstrip("+").startswith(f"{twice[1]}=")]
        together = f"combine them as '+{twice[1]}=[{','.join(chosen)}]'" if twice[1] == "ablation" else "choose one"
        return f"there is more than one {twice[1]}=NAME\n  {together}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key", "object_type", "See https", "Config search"))]
    if unknown := re.match(r"Could not override '(.+?)'", lines[0]):
        key = unknown[1]
        if key in groups():
            given = next((a for a in sys.argv[1:] if a.startswith(f"{key}=")), f"{key}=...")
            return f"there is no option '{key}'\n  did you mean +{given}? A config group that is not in use yet is added with +"
        known = defaults()
        if inner := next((name for name in known if name.startswith(f"{key}.")), None):
            return (
                f"{key} is a group of options, and can't be set to this\n  set one of its options, such as {inner}=..."
            )
        if key in known and not key.startswith("schedule.by_hand.changes"):
            return (
                f"there is no option '{key}' with the data, net and recipe chosen here\n  list the options with --help"
            )
        if key in known:
            return f"{key} can't be changed on the command line\n  copy a schedule of conf/schedule and change it there"
        ours = OTHER_NAMES.get(key, key)
        if ours in groups():
            return f"there is no option '{key}'\n  did you mean {ours}=NAME? There are: {', '.join(members(ours))}"
        near = get_close_matches(ours, known, 1, 0.75) or [
            name for name in known if get_close_matches(ours.rpartition(".")[2], [name.rpartition(".")[2]], 1, 0.85)
        ]
        return f"there is no option '{key}'\n  " + (
            f"did you mean {near[0]}?" if near else "list the options with --help"
        )
    if (opened := next((a for a in sys.argv[1:] if "=[" in a and "]" not in a), None)) and "input" in lines[0]:
        return f"{opened} has no closing bracket\n  write a list without blanks, or in quotes: '{opened.partition('[')[0]}[a, b]'"
    if swept := re.search(r"does not support sweep type : (\w+)", text):
        return f"{swept[1].lower()} is for another sweeper\n  give the values themselves: seed=0,1,2 or range(0,3)"
    if "ambiguous value" in lines[0].lower():
        if named := next((a for a in sys.argv[1:] if a.lstrip("+").startswith("ablation=")), None):
            names = named.partition("=")[2]
            return f"{named} names several ablations\n  combine them as '+ablation=[{names}]', or add -m to train one net with each"
        return (
            f"{lines[0]}\n  use -m to run the command once for each of these values; "
            "an option that takes several at once takes a list: runs=[FOLDER,FOLDER]"
        )
    return "\n  ".join([lines[0], " ".join(lines[1:])[:200]]).rstrip()
