"""Execute the notebooks and check their committed outputs."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from alexnet_repro.configs import CONF

NOTEBOOKS = sorted((Path(CONF).parent / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path) -> None:
    shutil.copytree(path.parents[1] / "results", folder / "results")
    (folder / "notebooks").mkdir()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "notebooks")}}).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, small_store: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN", str(trained))
    monkeypatch.setenv("STORE", str(small_store))
    execute(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_small_and_contain_no_local_paths(path: Path) -> None:
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)
    assert len(text) < 1_000_000
    assert not [line for line in ("/tmp/", "/home/", "/root/", "Traceback") if line in text]
    assert not any("def " in "".join(cell["source"]) for cell in cells)
