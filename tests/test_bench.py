"""Test the files and ratios of the benchmark. Its speeds depend on the machine and are not tested."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alexnet_repro.benchmarks.step import AS_RUN
from alexnet_repro.composition import composed

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_ratios_equal_those_of_the_reported_speeds(cwd: Path, run_command: Run) -> None:
    status, out, err = run_command("bench", "only=loader", "repeats=1", "out=b.json")
    assert status == 0, err
    result = json.loads(Path("b.json").read_text())
    assert {"machine", "versions", "ratios", "images_per_s"} <= set(result)
    speed, ratios = result["images_per_s"], result["ratios"]
    assert ratios["loader_per_core"] == pytest.approx(speed["loader, one core: ours"])
    expected = speed["loader, one core: ours"] / speed["loader, one core: ImageFolder"]
    assert ratios["loader_vs_imagefolder"] == pytest.approx(expected)
    assert ratios["loader_vs_imagefolder"] > 1  # even on a busy machine
    assert "loader_vs_imagefolder" in out


def test_unknown_benchmark_is_refused(cwd: Path, run_command: Run) -> None:
    status, _, err = run_command("bench", "only=everything")
    assert status == 2
    assert "this must be one of prepare, loader, step, eval, placement, memory" in err


@pytest.mark.slow
def test_two_processes_exchange_the_computed_number_of_bytes(cwd: Path, run_command: Run) -> None:
    status, out, err = run_command("bench", "only=placement", "repeats=3", "batch_size=4", "out=b.json")
    assert status == 0, err  # the command itself compares the numbers of bytes
    assert "conv3" in out
    assert json.loads(Path("b.json").read_text())["ratios"]["two_process_efficiency"] > 0


def test_the_net_of_the_2012_recipe_is_the_one_that_is_timed() -> None:
    paper, as_run = (composed("train", [f"recipe={recipe}"]).net for recipe in ("paper", "as_run"))
    assert {key: value for key, value in as_run.items() if value != paper[key]} == AS_RUN
