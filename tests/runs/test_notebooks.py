"""Runs every notebook from top to bottom, as a reader would, on data small enough for a test."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import write_run

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"


def two_runs(folder: Path) -> dict[str, str]:
    """Environment of a notebook that reads runs."""
    workdirs = [
        write_run(folder / "first"),
        write_run(folder / "second", steps=250, seed=1, status="interrupted"),
    ]
    return {"GPT_JAX_RUNS": os.pathsep.join(map(str, workdirs))}


# Notebook, and what makes the data it needs and returns the environment variables that lead to it.
CASES: dict[str, Callable[[Path], dict[str, str]]] = {"loss_curves.ipynb": two_runs}


@pytest.mark.parametrize("name", CASES)
def test_notebook_runs(name, tmp_path, monkeypatch):
    import nbformat  # here: it takes seconds, and every selection of tests imports this file
    from nbclient import NotebookClient

    for variable, value in CASES[name](tmp_path).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel starts in notebooks/
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.outputs for cell in cells), "a cell shows nothing"
    assert not [output for output in outputs if output.get("name") == "stderr"], "a cell warns"
    drawn = [cell for cell in cells if ".plot_" in cell.source]
    assert all("image/png" in output.data for cell in drawn for output in cell.outputs)


def test_every_notebook_is_run_and_stored_without_output():
    import nbformat

    stored = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert [path.name for path in stored] == sorted(CASES)
    for path in stored:
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), f"{path.name}: run `jupyter nbconvert --clear-output --inplace` on it"
            assert cell.get("execution_count") is None
