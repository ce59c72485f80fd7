"""Follow docs/CONTRIBUTING.md in a copy of the package: a net, an ablation and a data set of one's own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from alexnet_repro.configs import CONF
from tests.conftest import image_folder

ROOT = Path(CONF).parent
PAGE = (ROOT / "docs/CONTRIBUTING.md").read_text()


def blocks(section: str, language: str) -> list[str]:
    """Return the blocks of code of a section of the page."""
    text = PAGE[PAGE.index(f"## {section}") :].partition("\n## ")[0]
    return [dedent(block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package that has what the page tells to add."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("src", "conf"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (net,) = blocks("Add a net", "python")
    (options,) = blocks("Add a net", "yaml")
    (copy / "src/alexnet_repro/net/one_layer.py").write_text(net)
    (copy / "conf/net/one_layer.yaml").write_text(options)
    build = copy / "src/alexnet_repro/net/build.py"
    text = build.read_text().replace(
        "NETS: dict[str, type[nn.Module]] = {", 'NETS: dict[str, type[nn.Module]] = {\n    "one_layer": OneLayer,'
    )
    imported = "from alexnet_repro.net.one_layer import OneLayer\nfrom alexnet_repro.net.cifar"
    build.write_text(text.replace("from alexnet_repro.net.cifar", imported))
    low = "# @package _global_\nablation: {low_rate: null}\noptim: {lr: 0.0001}\n"
    (copy / "conf/ablation/low_rate.yaml").write_text(low)
    (data,) = blocks("Add a data set", "yaml")
    (copy / "conf/data/mine.yaml").write_text(
        data.replace("imagenette", "mine")
        .replace("classes: 10", "classes: 2")
        .replace("{train: 9469, val: 3925}", "{train: 12, val: 6}")
    )
    image_folder(copy / "images")
    return copy


def run(package: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.fspath(package / "src"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", f"alexnet_repro.{command}", *options]
    return subprocess.run(line, cwd=package, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_net_data_set_and_ablation_of_ones_own_train_and_are_measured(package: Path) -> None:
    done = run(package, "prepare", "data=mine", "source=images")
    assert done.returncode == 0, done.stderr
    options = (
        "data=mine",
        "net=one_layer",
        "+ablation=low_rate",
        "epochs=1",
        "batch_size=4",
        "trainer=cpu",
        "watch.every=1",
    )
    done = run(package, "train", *options, "net.maps=8")
    assert done.returncode == 0, done.stderr
    (path,) = package.glob("runs/*/seed-0/result.json")
    result = json.loads(path.read_text())
    assert (result["net"], result["ablation"], result["lr"], result["claim"]) == ("one_layer", "low_rate", 0.0001, None)
    assert result["parameters"] == 8 * 3 * 11 * 11 + 8 + 8 * 2 + 2
    done = run(package, "evaluate", f"run={path.parent}")
    assert done.returncode == 0, done.stderr
    (measured,) = path.parent.glob("evaluation-*.json")
    assert json.loads(measured.read_text())["centre"] == result["centre"]
    done = run(package, "report", f"runs={path.parent}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("net.maps=many", "net.maps=many: this must be a whole number"),
        ("+ablation=no_lrn", "net=one_layer has no option net.lrn"),
        ("net.width=2", "there is no option 'net.width'"),
        ("placement=two_devices", "net=one_layer has no second tower"),
    ],
)
def test_wrong_options_of_a_net_of_ones_own_are_told(option: str, told: str, package: Path) -> None:
    done = run(package, "train", "net=one_layer", option, "dry_run=true")
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2
