"""Runs every notebook from top to bottom, as a reader would, on data small enough for a test."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run
from vulkan_devices import SELECTOR, needs_vulkan
from waiting import PATIENCE

from gpt_jax.runs.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A run of one layer with two heads, whose only checkpoint is of its first step."""
    from untrained_run import write_untrained_run  # here: it imports jax, and every selection of tests this file

    shape = {"model__num_heads": 2, "model__block_size": 64, "log__diagnostics_every": 0}
    workdir = write_untrained_run(tmp_path_factory.mktemp("started") / "run", steps=1, **shape)
    with MetricsWriter(workdir, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 5.6, "grad_norm": 1.0})
        writer.write(
            1, "diagnostics", {f"attention_{name}/h_0/head_{i}": 1.0 for name in ("max", "entropy") for i in (0, 1)}
        )
        for prompt in ("moon?", "sun?"):
            writer.sample(1, prompt, "yes", tokens=1, seconds=0.1)
    return workdir


def run_cells(name: str, monkeypatch: pytest.MonkeyPatch, **variables: object) -> tuple[list[Any], dict[str, Any]]:
    """Runs the code cells in this process, which has imported jax already; returns their values, and all names."""
    import nbformat

    monkeypatch.chdir(NOTEBOOKS)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    values, names = [], {}
    for cell in nbformat.read(name, as_version=4).cells:
        if cell.cell_type == "code":
            *body, last = ast.parse(cell.source).body
            exec(compile(ast.Module(body, []), name, "exec"), names)
            assert isinstance(last, ast.Expr), "a cell shows nothing"
            values.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
    return values, names


def test_loss_curves(tmp_path, monkeypatch):
    """In a kernel of its own, as Jupyter runs it."""
    import matplotlib.font_manager  # noqa: F401 its cache of fonts is there then: a kernel that takes long to make it warns
    import nbformat  # here: these take seconds, and every selection of tests imports this file
    from nbclient import NotebookClient

    workdirs = [
        write_run(tmp_path / "first"),
        write_run(tmp_path / "second", steps=250, seed=1, status="interrupted"),
    ]
    monkeypatch.setenv("GPT_JAX_RUNS", os.pathsep.join(map(str, workdirs)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel starts in notebooks/
    notebook = nbformat.read(NOTEBOOKS / "loss_curves.ipynb", as_version=4)
    limits = {"timeout": 2 * PATIENCE, "startup_timeout": 2 * PATIENCE}
    NotebookClient(notebook, **limits, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.outputs for cell in cells), "a cell shows nothing"
    assert not [output for output in outputs if output.get("name") == "stderr"], "a cell warns"
    drawn = [cell for cell in cells if ".plot_" in cell.source]
    assert all("image/png" in output.data for cell in drawn for output in cell.outputs)


@pytest.mark.slow
def test_finetune(started, corpus, monkeypatch, tmp_path):
    run = tmp_path / "run"
    run.symlink_to(started)
    values, names = run_cells("finetune.ipynb", monkeypatch, GPT_JAX_RUNS=run, GPT_JAX_CHATS=corpus, GPT_JAX_STEPS=4)
    assert values[0] == names["TUNED"] == tmp_path / "run_tuned"
    assert "complete" in values
    log = (names["TUNED"] / "log.txt").read_text()
    assert "initialised from" in log
    assert "0 dropped, 0 mismatched and kept fresh, 0 new" in log
    answers = values[-1].data
    assert list(answers.columns) == ["run", "run_tuned"]
    assert list(answers.index) == ["moon?", "sun?"]


@pytest.mark.slow
def test_attention(started, monkeypatch):
    values, names = run_cells("attention.ipynb", monkeypatch, GPT_JAX_RUNS=started)
    count = len(names["tokens"])
    assert "".join(names["tokens"]) == names["SENTENCE"]
    assert values[0] == {"h_0": (2, count, count)}
    for weights in names["weights"].values():
        assert weights.sum(axis=-1) == pytest.approx(1, abs=1e-5)
        assert abs(weights[:, 0, 1:]).max() == 0  # nothing comes before the first token
    assert [ax.get_title() for ax in values[1].axes[:2]] == ["head 0", "head 1"]


@needs_vulkan
@pytest.mark.slow
def test_kernels(monkeypatch, capsys):
    values, names = run_cells("kernels.ipynb", monkeypatch, VK_KERNELS_DEVICE=SELECTOR, EXAMINE_SIZE="tiny")
    _, histogram, times, _ = values
    found = names["found"]
    assert set(found.errors) == {"Vulkan", "XLA"}
    assert 0 < abs(found.errors["Vulkan"]).max() < 1e-5
    assert [text.get_text() for text in histogram.axes[0].get_legend().get_texts()] == ["Vulkan", "XLA"]
    assert (times["ms"] > 0).all()
    assert (times["floor, ms"] > 0).all()
    assert "dispatch" in capsys.readouterr().out


def test_every_notebook_is_run_and_stored_without_output():
    import nbformat

    stored = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert [f"test_{path.stem}" in globals() for path in stored] == [True] * 4
    for path in stored:
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), f"{path.name}: run `jupyter nbconvert --clear-output --inplace` on it"
            assert cell.get("execution_count") is None
