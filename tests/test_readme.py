"""What the README says, done."""

import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from alexnet_repro.configs import CONF

README = (Path(CONF).parent / "README.md").read_text()
RESULTS = Path(CONF).parent / "results"


def test_every_data_config_is_named() -> None:
    for file in Path(CONF, "data").glob("*.yaml"):
        assert f"`{file.stem}`" in README


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    for target in targets:
        assert (Path(CONF).parent / target).exists(), target


def test_it_can_be_read_in_one_sitting() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize(
    "command", re.findall(r"^python -m alexnet_repro\.train +(.*?)(?: +#.*)?$", README, re.MULTILINE)
)
def test_train_commands_compose(command: str) -> None:
    arguments = [a for a in shlex.split(command) if a != "-m" and not a.startswith("hydra")]
    single = [a.split(",")[0] if "[" not in a else a for a in arguments]  # of a sweep, its first job
    with initialize_config_dir(CONF, version_base="1.3"):
        assert compose("train", single).recipe in ("paper", "as_run", "cuda_convnet")


def test_its_speeds_are_those_of_the_results() -> None:
    ratios = json.loads((RESULTS / "bench/epyc-2-cores.json").read_text())["ratios"]
    rows = dict(re.findall(r"^\| .* \| `(\w+)` \| ([\d.,]+) \|$", README, re.MULTILINE))
    assert set(rows) <= set(ratios)
    assert len(rows) >= 10
    for key, shown in rows.items():
        digits = len(shown.partition(".")[2])
        assert shown.replace(",", "") == f"{ratios[key]:.{digits}f}", key
