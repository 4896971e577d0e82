"""Finished or running training runs, read back from their folders: as arrays, data frames and figures.

    from gpt_jax import runs
    df = runs.load_metrics("../runs/chat", "../runs/chat_bf16")
    runs.plot_loss(df)

The data frames need pandas and the figures matplotlib, both in the `notebook` extra. A figure is returned, not shown:
it is the value of a notebook's cell, or yours to `savefig`.
"""

import array
import contextlib
import dataclasses
import math
import os
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.runs.info import INFO_FILE, read_config
from gpt_jax.runs.metrics import METRICS_FILE, SAMPLES_FILE, read_lines
from gpt_jax.runs.status import CRASHED, read_status

if TYPE_CHECKING:
    import pandas as pd

RUNS_VARIABLE = "GPT_JAX_RUNS"  # run folders for the notebooks, separated as the system separates those of PATH
SPIKE = 10.0  # a gradient norm above this is a spike: a healthy run of the reference model stays near 1
NORM = "grad_norm/"  # what the names of the layers' gradient norms begin with

Columns = dict[str, np.ndarray]  # columns of equal length, one row a line of the split; NaN where a line has no value


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder: its name, the step that the name ends in, and its bytes on disk."""

    name: str
    step: int
    size: int


@dataclasses.dataclass(frozen=True)
class RunData:
    """All that a run folder says but the parameters themselves. What is not there yet is empty."""

    workdir: Path
    info: dict[str, Any]  # run.json; status is 'crashed' where it says 'running' and nobody trains
    config: dict[str, Any]  # config.json
    tables: dict[str, Columns]  # by split: train, validation, diagnostics; columns step (int), time and the scalars
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    checkpoints: list[SavedCheckpoint]  # by step

    def series(self, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, int (N,), and values, f64 (N,), of one scalar, where it is finite."""
        table = self.tables.get(split, {})
        if name not in table:
            return np.empty(0, int), np.empty(0)
        finite = np.isfinite(table[name])
        return table["step"][finite], table[name][finite]

    @property
    def last_step(self) -> int:
        """The newest training step; 0 before the first."""
        steps = self.tables.get("train", {}).get("step", ())
        return int(steps[-1]) if len(steps) else 0

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose gradient norms were recorded, in the order of the forward pass."""
        return forward_order(name.removeprefix(NORM) for name in self.tables.get("train", {}) if name.startswith(NORM))


def load_run(workdir: str | Path) -> RunData:
    """Reads a run folder, of a run that may still be going on.

    Raises:
      UserError: there is no run in the folder, or a file of it is damaged.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no run at {workdir}: there is no such folder")
    if not (workdir / INFO_FILE).exists() and not (workdir / METRICS_FILE).exists():
        raise UserError(f"no run at {workdir}: the folder has neither {INFO_FILE} nor {METRICS_FILE}")
    tables, events = _read_tables(workdir / METRICS_FILE)
    status, info = read_status(workdir)
    return RunData(
        workdir=workdir,
        info=_without_nulls(info) | ({"status": status} if status == CRASHED else {}),
        config=_without_nulls(read_config(workdir)),
        tables=tables,
        events=events,
        samples=_read_samples(workdir / SAMPLES_FILE),
        checkpoints=_list_checkpoints(workdir / "checkpoints"),
    )


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is null: it is as good as absent."""
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }


def forward_order(layers: Iterable[str]) -> list[str]:
    """The different ones of some layer names, as the forward pass meets them: wte, wpe, h_0, h_1, ..., ln_f, head."""
    places = {"wte": -2, "wpe": -1, "ln_f": math.inf, "head": math.inf}

    def place(layer: str) -> tuple[float, bool]:
        number = layer.rpartition("_")[2]
        return places.get(layer, int(number) if number.isdecimal() else math.inf), layer == "head"

    return sorted(dict.fromkeys(layers), key=place)


def find_runs(root: str | Path, newest: int = 4) -> list[Path]:
    """The folders that the environment variable GPT_JAX_RUNS lists; without it the newest runs below `root`.

    Raises:
      UserError: there are none.
    """
    listed = os.environ.get(RUNS_VARIABLE)
    if listed:
        return [Path(folder) for folder in listed.split(os.pathsep)]
    found = sorted(Path(root).glob(f"*/{METRICS_FILE}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"no runs below {Path(root).resolve()}: train one first, or set {RUNS_VARIABLE}")
    return [file.parent for file in found[-newest:]]


def load_metrics(*workdirs: str | Path) -> "pd.DataFrame":
    """All metrics of the runs: one row a line of metrics.jsonl, columns run, split, step, time and every scalar.

    A run is called by its folder's name, or by the whole path where two folders have the same name.
    """
    pd = import_extra("pandas")
    frames = []
    for label, workdir in zip(run_labels(workdirs), workdirs, strict=True):
        for split, table in load_run(workdir).tables.items():
            frames.append(pd.DataFrame({"run": label, "split": split, **table}))
    if not frames:
        raise UserError(f"no metrics yet in {', '.join(map(str, workdirs))}")
    return pd.concat(frames, ignore_index=True)


def load_samples(*workdirs: str | Path) -> "pd.DataFrame":
    """All samples of the runs: columns run, step, prompt, text, tokens, seconds, ended."""
    pd = import_extra("pandas")
    frames = []
    for label, workdir in zip(run_labels(workdirs), workdirs, strict=True):
        samples = pd.DataFrame(load_run(workdir).samples, columns=_SAMPLE_COLUMNS)
        samples.insert(0, "run", label)
        frames.append(samples)
    return pd.concat(frames, ignore_index=True)


def last_samples(*workdirs: str | Path) -> "pd.DataFrame":
    """The last answer of each run to each prompt: a row a prompt, a column a run."""
    samples = load_samples(*workdirs)
    last = samples[samples["step"] == samples.groupby("run")["step"].transform("max")]
    return last.pivot_table(index="prompt", columns="run", values="text", aggfunc="last", sort=False)


_SAMPLE_COLUMNS = ["step", "prompt", "text", "tokens", "seconds", "ended"]


def _read_tables(path: Path) -> tuple[dict[str, Columns], list[dict[str, Any]]]:
    """Lines of numbers as one table a split, and events as they are."""
    columns: dict[str, dict[str, array.array]] = {}
    events = []
    for record in read_lines(path):
        split = record.pop("split", None)
        if split == "event":
            events.append(record)
            continue
        if not isinstance(split, str):
            raise UserError(f"{path}: step {record['step']}: split is no text: {split!r}; remove the line")
        table = columns.setdefault(split, {"step": array.array("q"), "time": array.array("d")})
        rows = len(table["step"])
        try:
            for name, value in record.items():
                if name not in table:
                    table[name] = array.array("d", [np.nan]) * rows
                table[name].append(value if name == "step" else float(value))
        except (TypeError, ValueError):
            raise UserError(f"{path}: step {record['step']}: {name} is no number: {value!r}") from None
        for column in table.values():
            if len(column) == rows:
                column.append(np.nan)
    return {split: {k: np.array(v) for k, v in table.items()} for split, table in columns.items()}, events


def _read_samples(path: Path) -> list[dict[str, Any]]:
    samples = list(read_lines(path))
    for sample in samples:
        for name, kind in (("prompt", str), ("text", str), ("tokens", (int, float)), ("seconds", (int, float))):
            if not isinstance(sample.get(name), kind):
                what = "text" if kind is str else "number"
                raise UserError(
                    f"{path}: step {sample['step']}: {name} is no {what}: {sample.get(name)!r}; remove the line"
                )
    return samples


def _list_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    found = []
    for child in folder.iterdir() if folder.is_dir() else ():
        step = re.fullmatch(r"\D*(\d+)", child.name)  # one that is still being written has a longer name
        if step and child.is_dir():
            with contextlib.suppress(FileNotFoundError):  # a running run may just be removing it
                size = sum(file.stat().st_size for file in child.rglob("*") if file.is_file())
                found.append(SavedCheckpoint(child.name, int(step[1]), size))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def import_extra(name: str) -> types.ModuleType:
    """A module of the extra `notebook`. Raises UserError if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: install the `notebook` extra (uv sync --extra notebook)") from None


def run_labels(workdirs: Sequence[str | Path]) -> list[str]:
    """The names of the runs' folders, and the whole path where two have the same name."""
    names = [Path(workdir).resolve().name for workdir in workdirs]
    return [name if names.count(name) == 1 else str(workdir) for name, workdir in zip(names, workdirs, strict=True)]
