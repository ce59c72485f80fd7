"""Check the names, links, commands and numbers in the README and the pages of docs/."""

import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from alexnet_repro.configs import CONF

ROOT = Path(CONF).parent
RESULTS = ROOT / "results"
PAGES = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"))}
README = PAGES[ROOT / "README.md"]
ALL = "\n".join(PAGES.values())


@pytest.mark.parametrize("group", ["data", "ablation", "schedule", "experiment"])
def test_every_config_is_documented(group: str) -> None:
    rates = "figure_1_rates"  # documented in figure_1
    for file in Path(CONF, group).glob("*.yaml"):
        assert file.stem in (rates, "log") or re.search(rf"[`=]{file.stem}\b", ALL), file


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"^python -m alexnet_repro\.train +(.*?)(?: +#.*)?$", ALL, re.MULTILINE)))
)
def test_train_commands_compose(command: str) -> None:
    arguments = [a for a in shlex.split(command) if a != "-m" and not a.startswith("hydra")]
    # the first job of a sweep
    single = [re.sub(r"interval\((.*?),.*\)", r"\1", a).split(",")[0] if "[" not in a else a for a in arguments]
    with initialize_config_dir(CONF, version_base="1.3"):
        assert compose("train", single).recipe in ("paper", "as_run", "cuda_convnet")


def test_documented_speeds_equal_the_results() -> None:
    ratios = json.loads((RESULTS / "bench/epyc-2-cores.json").read_text())["ratios"]
    rows = dict(re.findall(r"^\| .* \| `(\w+)` \| ([\d.,]+) \|$", ALL, re.MULTILINE))
    assert set(rows) <= set(ratios)
    assert len(rows) >= 10
    for key, shown in rows.items():
        digits = len(shown.partition(".")[2])
        assert shown.replace(",", "") == f"{ratios[key]:.{digits}f}", key


def test_documented_speeds_of_a_gpu_equal_the_results() -> None:
    bench = json.loads((RESULTS / "bench/h100.json").read_text())
    rows = re.findall(r"^\| (.*) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) h \|$", ALL, re.MULTILINE)
    graphs = "bf16: paper, compile=graphs"
    keys = {
        "bfloat16, `trainer.compile=graphs`": graphs,
        "the same without normalisation": "bf16: paper, no_lrn, compile=graphs",
        "bfloat16, `trainer.compile=default`": "bf16: paper, compile=default",
        "bfloat16": "bf16: paper",
        "float32 (`trainer.precision=32-true`)": "fp32: paper",
    }
    assert [name for name, *_ in rows] == list(keys)
    speeds = {name: bench["images_per_s"][f"step {key}"] for name, key in keys.items()}
    for name, ms, images, hours in rows:
        shown = f"{128000 / speeds[name]:.2f}", f"{speeds[name]:,.0f}", f"{90 * 1_281_167 / speeds[name] / 3600:.1f}"
        assert (ms, images, hours) == shown, name
    ratios = {key: f"{ratio:.2f}" for key, ratio in bench["ratios"].items()}
    ratios["graphs"] = f"{speeds['bfloat16, `trainer.compile=graphs`'] / speeds['the same without normalisation']:.2f}"
    shown = re.findall(r"^\| [^|]* \| (0\.\d\d) \| (0\.\d\d)? ?\|$", ALL, re.MULTILINE)
    pairs = [
        (ratios[f"{key}_bf16"], ratios[f"{key}_fp32"])
        for key in ("lrn_step", "torch_lrn_step", "as_run_lrn_step", "vs_torchvision")
    ]
    assert shown == [(ratios["graphs"], ""), *pairs]
