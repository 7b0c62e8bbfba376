"""Every notebook runs from top to bottom; what it claims it asserts itself."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "keep notebooks without outputs"
    assert any("assert " in cell.source for cell in code)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    plots = sum("plt.show()" in cell.source for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == plots > 0


def test_there_are_notebooks():
    assert NOTEBOOKS
