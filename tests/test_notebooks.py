"""The notebooks, executed."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from hydra import compose, initialize_config_dir
from nbclient import NotebookClient

from alexnet_repro.cli import CONF
from alexnet_repro.train import train

NOTEBOOKS = sorted((Path(CONF).parent / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path) -> None:
    shutil.copytree(path.parents[1] / "results", folder / "results")
    (folder / "notebooks").mkdir()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "notebooks")}}).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "figures_3_and_4" in path.name:
        with initialize_config_dir(CONF, version_base="1.3"):
            options = [
                "data=folder",
                f"data.store={small_store}",
                "epochs=1",
                "batch_size=6",
                "trainer=cpu",
                f"run={tmp_path}/r",
            ]
            train(compose("train", options))
        monkeypatch.setenv("RUN", f"{tmp_path}/r")
        monkeypatch.setenv("STORE", str(small_store))
    execute(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_kept_and_small_and_name_no_folder_of_ours(path: Path) -> None:
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)
    assert len(text) < 1_000_000
    assert not [line for line in ("/tmp/", "/home/", "/root/", "Traceback") if line in text]
    assert not any("def " in "".join(cell["source"]) for cell in cells)
