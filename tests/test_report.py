"""Test the report page from the committed results and from a new run, and in a real browser."""

import errno
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from alexnet_repro.claims.paper import read_claims
from alexnet_repro.claims.results import Result, read_results
from alexnet_repro.configs import CONF
from alexnet_repro.errors import UserError
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.page import figures, retrieval
from alexnet_repro.page.content import content
from alexnet_repro.page.drawings import distinct, to_25
from alexnet_repro.page.markdown import readme_blocks
from alexnet_repro.page.report import pictures_of, report

Run = Callable[..., tuple[int, str, str]]
RESULTS = Path(CONF).parent / "results"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module", autouse=True)
def short_training_of_autoencoders() -> Iterator[None]:
    """Train the autoencoders of the binary codes for two steps: those of pixels have 100 million weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "train_autoencoder", partial(retrieval.train_autoencoder, steps=2))
        yield


@pytest.fixture(scope="module")
def page(small_alexnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report of the committed results and of the trained run, and return its index.html."""
    out = tmp_path_factory.mktemp("report")
    shutil.copytree(RESULTS, out / "results")
    run = shutil.copytree(small_alexnet, out / "runs" / "seed-0")
    mean_of_two = json.loads((run / "result.json").read_text()) | {"members": 2, "seeds": [0, 1], "history": []}
    (run.parent / "ensemble-2-abcdef-last-val-ten_crop.json").write_text(json.dumps(mean_of_two))
    other = json.loads((run / "result.json").read_text()) | {"ablation": "no_lrn"}  # two runs that can be compared
    (out / "results" / "no_lrn.json").write_text(json.dumps(other))
    with initialize_config_dir(CONF, version_base="1.3"):
        report(compose("report", [f"runs=[{run}]", f"results={out}/results", f"out={out}", "trainer=cpu"]))
    return out / "index.html"


def cells(text: str, claim: str) -> list[str]:
    """Return the cells of a claim's row (claim, the paper, here, verdict) without their small print."""
    row = re.search(rf'<tr id="{claim}">(.*?)</tr>', text, re.DOTALL)
    assert row, claim
    plain = (
        re.sub(r"<small>.*?</small>|<[^>]+>", " ", cell, flags=re.DOTALL)
        for cell in re.findall(r"<td.*?>(.*?)</td>", row[1], re.DOTALL)
    )
    return [html.unescape(re.sub(r"\s+", " ", cell)).strip() for cell in plain]


def test_each_claim_has_a_row_with_the_papers_numbers(page: Path) -> None:
    text = page.read_text()
    for claim in read_claims():
        assert len(cells(text, claim)) == 4
    typed = {  # from the paper
        "one_cnn": "40.7 / 18.2", "no_lrn": "+1.4 / +1.2", "figure_1": "6 times", "parameters": "60,000,000",
        "share_of_each_convolution": "at most 1 %", "no_dropout": "more", "table2_sift_fvs": "26.2",
    }  # fmt: skip
    assert {claim: cells(text, claim)[1] for claim in typed} == typed
    assert cells(text, "one_cnn")[2:] == ["", "not comparable"]
    assert cells(text, "no_lrn")[2:] == ["", "proxy only"]
    assert cells(text, "fall_2009")[2:] == ["", "not run"]
    assert cells(text, "parameters")[2:] == ["60,965,224", "counted: equal"]
    assert cells(text, "share_of_each_convolution")[2:] == ["0.0573 0.504 1.45 1.09 0.726 %", "counted: differs"]


def test_list_of_results_includes_runs_and_ensembles(page: Path) -> None:
    sources = re.search(r'<section id="sources">(.*?)</section>', page.read_text(), re.DOTALL)
    assert sources
    assert "as_run, folder, seed 0" in sources[1]
    assert "as_run, folder, mean of 2 nets" in sources[1]


def test_figure_1_reports_epochs_and_updates_to_25_percent() -> None:
    def run_with_errors(activation: str, seed: int, *errors: float) -> dict[str, Any]:
        history = [{"epoch": i + 1, "steps": 391 * (i + 1), "train_error": error} for i, error in enumerate(errors)]
        return {"net": "four_layer", "activation": activation, "seed": seed, "history": history}

    figure_1_runs = [
        run_with_errors("tanh", 0, 60, 50, 40),
        run_with_errors("relu", 1, 40, 30, 24.9),
        run_with_errors("relu", 0, 40, 25),
    ]
    assert to_25(figure_1_runs) == "four_layer, relu 2, 3 (782, 1173); four_layer, tanh never (never)"


def test_page_is_self_contained(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r'(?:href|src)="([^"#][^"]*)"', text)
    assert [link for link in links if not link.startswith("data:")] == []
    assert "@import" not in text
    for name in ("figure-2", "figure-3", "figure-4-left", "figure-4-right"):
        assert f'<figure id="{name}"' in text
        assert Image.open(page.parent / "figures" / f"{name}.png").width > 500
        assert f"figures/{name}.png" in (page.parent / "report.md").read_text()


def test_retrieval_quality_of_a_run_is_measured(page: Path) -> None:
    quality = json.loads((page.parent / "runs" / "seed-0" / "retrieval.json").read_text())
    assert (quality["queries"], quality["images"], quality["nearest"]) == (6, 12, 6)
    assert quality["same_class"]["guessing"] == 50
    assert f"{quality['same_class']['fc7']:.1f} %" in page.read_text()


def test_readme_matches_the_committed_results() -> None:
    written = "".join((Path(CONF).parent / page).read_text() for page in ("README.md", "docs/numbers.md"))
    for block in readme_blocks(content(read_results(RESULTS))).values():
        assert block in written, "call python -m alexnet_repro.report readme=true in the checkout"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["runs=[nowhere]"], "nowhere holds no finished run"),
        (["runs=2012"], "2012 holds no finished run"),
        (["results=nowhere"], "there is no folder nowhere"),
        (["out=taken"], "taken is not a folder"),
        (["images=0"], "at least 1"),
        (["placement=two_devices"], "works on one device"),
    ],
)
def test_unusable_options_are_refused(options: list[str], problem: str, cwd: Path, run_command: Run) -> None:
    Path("taken").write_text("")
    status, _, err = run_command("report", *options)
    assert status == 2
    assert problem in err
    assert "Traceback" not in err


def test_page_is_written_without_results(cwd: Path, run_command: Run) -> None:
    Path("empty").mkdir()
    status, out, _ = run_command("report", "results=empty")
    assert status == 0
    assert "not run" in out
    assert "Figures 3 and 4 need a run" in Path("report/index.html").read_text()


def test_runs_with_a_damaged_checkpoint_or_no_config_are_reported_without_figures(
    small_alexnet: Path, cwd: Path, run_command: Run
) -> None:
    Path("empty").mkdir()
    cut, bare = (shutil.copytree(small_alexnet, cwd / "runs" / name) for name in ("cut", "bare"))
    (cut / "checkpoints" / "last.ckpt").write_bytes((cut / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    (bare / "config.yaml").unlink()
    for shown in (cut, bare):
        (shown / "result.json").touch()  # figures are those of the latest run
        status, out, err = run_command("report", "results=empty", "trainer=cpu")
        assert status == 0, err
        assert "no Figures 3 and 4: " in out
        assert "not in the index: " in out
        assert "training error. Dashed" in Path("report/index.html").read_text()


def test_retrieval_from_fewer_images_does_not_replace_a_better_one(
    small_alexnet: Path, cwd: Path, run_command: Run
) -> None:
    Path("empty").mkdir()
    run = shutil.copytree(small_alexnet, cwd / "runs" / "seed-0")
    for options, images in (([], 12), (["images=6"], 12)):
        assert run_command("report", "results=empty", "trainer=cpu", *options)[0] == 0
        assert json.loads((run / "retrieval.json").read_text())["images"] == images


def test_run_that_cannot_be_written_has_its_figures(
    small_alexnet: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(path: Path, content: dict[str, Any]) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("alexnet_repro.page.report.retrieval_quality", lambda *_: {"images": 12})  # it takes long
    monkeypatch.setattr("alexnet_repro.page.report.write_json", read_only)
    found = cast(Result, {})
    with initialize_config_dir(CONF, version_base="1.3"):
        drawn = pictures_of(compose("report", ["trainer=cpu"]), small_alexnet, found)
    assert f"{small_alexnet / 'retrieval.json'} was not written: Permission denied" in capsys.readouterr().out
    assert (set(drawn), found) == ({"figure-3", "figure-4-left", "figure-4-right"}, {"retrieval": {"images": 12}})


def test_runs_with_equal_names_have_their_own_curves() -> None:
    results = read_results(RESULTS)
    alike = [r | {"file": f"results/{i}.json"} for i, r in enumerate([results[0], results[0], results[-1]])]
    names = distinct(cast(list[Result], alike))
    assert len(set(names)) == 3
    assert [name.endswith(".json") for name in names] == [True, True, False]


def test_damaged_result_is_named(cwd: Path) -> None:
    Path("results").mkdir()
    Path("results/a.json").write_text("[")
    with initialize_config_dir(CONF, version_base="1.3"), pytest.raises(UserError, match=r"results/a\.json is damaged"):
        report(compose("report", ["results=results"]))
    Path("results/a.json").unlink()
    Path("results/run").mkdir()
    Path("results/run/config.yaml").touch()
    Path("results/run/result.json").write_text("{}")
    with pytest.raises(UserError, match=r"run/result\.json lacks"):
        read_results(Path("results"))


def browser(text: str, width: int, tmp_path: Path) -> dict[str, Any]:
    """Return measurements of the page by headless Chromium in a frame of ``width`` pixels."""
    ask = """<script>addEventListener("load", () => { parent.document.title = JSON.stringify({
        wide: document.documentElement.scrollWidth, room: innerWidth,
        rows: document.querySelectorAll("#claims tbody tr").length,
        pictures: [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 50).length,
        broken: [...document.querySelectorAll("svg image")].filter(i => !i.getBoundingClientRect().width).length }) })</script>"""
    frame = f'<!doctype html><iframe style="width:{width}px;height:3000px;border:0" srcdoc="{html.escape(text + ask)}"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    line += ["--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    return json.loads(html.unescape(title[1]))


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_page_renders_in_a_browser(page: Path, width: int, tmp_path: Path) -> None:
    seen = browser(page.read_text(), width, tmp_path)
    assert seen["room"] == width
    assert seen["wide"] <= width, "it must be scrolled sideways"
    assert seen["rows"] == len(read_claims())
    assert seen["pictures"] >= 6
    assert seen["broken"] == 0


def test_figure_2_shows_the_output_of_each_layer() -> None:
    from alexnet_repro.page.report import svg

    text = svg("figure-2", figures.figure_2(AlexNet(lrn=False)))
    for word in (
        "conv1",
        "fc8",
        "60,965,224",
        "55x55",
        "192",
        "2048",
        "173 kB",
    ):  # 2 x 128 x 169 x 4 bytes into conv3
        assert word in text
    assert "tower 1" not in svg("figure-2", figures.figure_2(AlexNet(towers=1, lrn=False)))
    assert "#111213" not in text
    assert len(set(re.findall(r'\bid="([^"]+)"', text))) == len(re.findall(r'\bid="', text))


def test_figure_3_draws_grey_kernels_in_grey() -> None:
    grey = torch.randn(4, 1, 5, 5).expand(-1, 3, -1, -1)
    mosaic = figures._mosaic(grey)
    drawn = mosaic[mosaic[..., 3] == 1][:, :3]
    assert np.ptp(drawn, axis=1).max() == 0
    assert drawn.min() >= 0
    assert drawn.max() <= 1
