from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda p: p.stem)
def test_notebook_runs(path, tiny_run, monkeypatch):
    monkeypatch.setenv("RUN", str(tiny_run))
    notebook = jupytext.read(path)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS.parent}}).execute()
    assert any(output.get("data", {}).get("image/png") for cell in notebook.cells for output in cell.get("outputs", []))
