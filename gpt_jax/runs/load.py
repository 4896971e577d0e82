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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_jax.config import UserError
from gpt_jax.runs.metrics import INFO_FILE, METRICS_FILE, SAMPLES_FILE, read_config, read_info, read_lines

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNS_VARIABLE = "GPT_JAX_RUNS"  # run folders for the notebooks, separated as the system separates those of PATH
SPIKE = 10.0  # a gradient norm above this is a spike: a healthy run of the reference model stays near 1
NORM = "grad_norm/"  # what the names of the layers' gradient norms begin with

Table = dict[str, np.ndarray]  # columns of equal length, one row a line of the split; NaN where a line has no value


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder: its name, the step that the name ends in, and its bytes on disk."""

    name: str
    step: int
    size: int


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run folder says but the parameters themselves. What is not there yet is empty."""

    workdir: Path
    info: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.json
    tables: dict[str, Table]  # by split: train, validation, diagnostics; columns step (int), time and the scalars
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


def load_run(workdir: str | Path) -> Run:
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
    return Run(
        workdir=workdir,
        info=read_info(workdir),
        config=read_config(workdir),
        tables=tables,
        events=events,
        samples=list(read_lines(workdir / SAMPLES_FILE)),
        checkpoints=_list_checkpoints(workdir / "checkpoints"),
    )


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
    pd = _import("pandas")
    frames = []
    for label, workdir in zip(_labels(workdirs), workdirs, strict=True):
        for split, table in load_run(workdir).tables.items():
            frames.append(pd.DataFrame({"run": label, "split": split, **table}))
    if not frames:
        raise UserError(f"no metrics yet in {', '.join(map(str, workdirs))}")
    return pd.concat(frames, ignore_index=True)


def load_samples(*workdirs: str | Path) -> "pd.DataFrame":
    """All samples of the runs: columns run, step, prompt, text, tokens, seconds, ended."""
    pd = _import("pandas")
    frames = []
    for label, workdir in zip(_labels(workdirs), workdirs, strict=True):
        samples = pd.DataFrame(load_run(workdir).samples, columns=_SAMPLE_COLUMNS)
        samples.insert(0, "run", label)
        frames.append(samples)
    return pd.concat(frames, ignore_index=True)


_SAMPLE_COLUMNS = ["step", "prompt", "text", "tokens", "seconds", "ended"]


def smooth(series: "pd.Series", half_life: float) -> "pd.Series":
    """Exponential moving average in which a value counts half as much `half_life` steps later.

    Free of a start-up bias. Non-finite values are left out, not spread. A half-life of 0 changes nothing.
    """
    if half_life == 0:
        return series
    finite = series.where(np.isfinite(series))
    return finite.ewm(halflife=half_life, ignore_na=True).mean()


def spikes(df: "pd.DataFrame", threshold: float = SPIKE) -> "pd.DataFrame":
    """Training steps with a gradient norm above `threshold` or not finite, the worst first.

    Columns run, step, loss, grad_norm, layer (the one with the largest norm) and layer_norm.
    """
    train = df[(df["split"] == "train") & ((df["grad_norm"] > threshold) | ~np.isfinite(df["grad_norm"]))]
    norms = train[_norm_columns(df)].astype(float).fillna(np.inf)
    for label, every in _by_run(df, "train"):  # a run has no norm of the layers that only a deeper one has
        known = every[norms.columns].notna().any()
        if known.any():
            norms.loc[train["run"] == label, known.index[~known]] = -np.inf
    found = train[["run", "step", "loss", "grad_norm"]].copy()
    found["layer"] = norms.idxmax(axis=1).str.removeprefix(NORM) if len(norms) and norms.shape[1] else None
    found["layer_norm"] = norms.max(axis=1)
    return found.sort_values("grad_norm", ascending=False, na_position="first", ignore_index=True)


def compare(
    df: "pd.DataFrame",
    steps: Sequence[int] = (1, 100, 500, 1000, 2500, 5000, 10_000, 50_000),
    half_life: float = 20,
) -> "pd.DataFrame":
    """The runs side by side, one a column: smoothed training loss at some steps, and how far each came."""
    pd = _import("pandas")
    columns = {}
    for label, train in _by_run(df, "train"):
        loss = smooth(train.set_index("step")["loss"], half_life)
        column = {f"loss at {step:,}": loss.get(step, np.nan) for step in steps if step <= df["step"].max()}
        column |= {"last step": train["step"].max(), "last loss": loss.iloc[-1]}
        validation = df[(df["run"] == label) & (df["split"] == "validation")]
        validation = validation[np.isfinite(validation["loss"].astype(float))]
        if len(validation):
            best = validation.loc[validation["loss"].idxmin()]
            column |= {"best validation loss": best["loss"], "at step": best["step"]}
        column["median gradient norm"] = train["grad_norm"].median()
        column["largest gradient norm"] = train["grad_norm"].max()
        if "step_ms" in train:
            column["median step, ms"] = train["step_ms"].median()
        columns[label] = column
    return pd.DataFrame(columns)


def validation_gap(df: "pd.DataFrame", half_life: float = 20) -> "pd.DataFrame":
    """Each evaluation beside the smoothed training loss of its step: run, step, train, validation, gap.

    Dropout is on in training and off in validation, so a young model's gap is often negative.
    """
    pd = _import("pandas")
    frames = []
    for label, validation in _by_run(df, "validation"):
        train = df[(df["run"] == label) & (df["split"] == "train")].set_index("step")["loss"]
        frame = validation[["run", "step"]].reset_index(drop=True)
        frame["train"] = smooth(train, half_life).reindex(frame["step"]).to_numpy()
        frame["validation"] = validation["loss"].to_numpy()
        frames.append(frame.assign(gap=frame["validation"] - frame["train"]))
    if not frames:
        return pd.DataFrame(columns=["run", "step", "train", "validation", "gap"])
    return pd.concat(frames, ignore_index=True)


def plot_loss(df: "pd.DataFrame", half_life: float = 20) -> "Figure":
    """Training loss, raw (pale) and smoothed, with the validation losses as points."""
    figure, axes = _figure(1)
    for color, (label, train) in _colored(_by_run(df, "train")):
        axes[0].plot(train["step"], train["loss"], color=color, alpha=0.25, linewidth=0.8)
        axes[0].plot(train["step"], smooth(train["loss"], half_life), color=color, label=label)
        validation = df[(df["run"] == label) & (df["split"] == "validation")]
        axes[0].plot(validation["step"], validation["loss"], "o", color=color, markeredgecolor="black")
    axes[0].set(xlabel="step", ylabel="loss (nats a token)", title="Training loss; dots: validation")
    axes[0].legend()
    return figure


def plot_validation_gap(df: "pd.DataFrame", half_life: float = 20) -> "Figure":
    """Validation loss less training loss at each evaluation."""
    figure, axes = _figure(1, height=3)
    for color, (label, gap) in _colored(validation_gap(df, half_life).groupby("run", sort=False)):
        axes[0].plot(gap["step"], gap["gap"], "o-", color=color, label=label)
    axes[0].axhline(0, color="gray", linewidth=0.8)
    axes[0].set(xlabel="step", ylabel="validation - training loss", title="Generalisation gap")
    return figure


def plot_learning_rate(df: "pd.DataFrame") -> "Figure":
    """Learning rate of every update."""
    figure, axes = _figure(1, height=3)
    for color, (label, train) in _colored(_by_run(df, "train")):
        axes[0].plot(train["step"], train["learning_rate"], color=color, label=label)
    axes[0].set(xlabel="step", ylabel="learning rate", title="Learning rate")
    axes[0].legend()
    return figure


def plot_grad_norm(df: "pd.DataFrame", threshold: float = SPIKE, window: int = 50) -> "Figure":
    """Gradient norm before the clip; spikes are crosses. Below, the `window` steps around the worst step."""
    figure, axes = _figure(2)
    worst = spikes(df, threshold=-np.inf).iloc[0]
    found = spikes(df, threshold)
    for ax in axes:
        for color, (label, train) in _colored(_by_run(df, "train")):
            ax.plot(train["step"], train["grad_norm"], color=color, linewidth=0.8, label=label)
            marked = found[found["run"] == label]
            ax.plot(marked["step"], marked["grad_norm"], "x", color=color)
        ax.set(yscale="log", ylabel="gradient norm")
    axes[0].set_title(f"Gradient norm, {len(found):,} spikes above {threshold:g}")
    axes[0].legend()
    axes[1].set(
        xlim=(max(worst["step"] - window, df["step"].min()), worst["step"] + window),
        xlabel="step",
        title=f"Around the worst step: {worst['step']} of {worst['run']}, most of it in {worst['layer']}",
    )
    return figure


def plot_layer_grad_norms(df: "pd.DataFrame", run: str | None = None, bins: int = 200) -> "Figure":
    """Heat map of the layers' gradient norms (rows, input at the bottom): the largest of each of `bins` stretches."""
    train = _one_run(df, run, "train")
    columns = [name for name in _norm_columns(df) if train[name].notna().any()]
    stretch = np.arange(len(train)) * min(bins, len(train)) // len(train)
    largest = train[columns].clip(lower=1e-12).groupby(stretch).max().to_numpy().T  # (layers, stretches)
    figure, axes = _figure(1)
    extent = (train["step"].min() - 0.5, train["step"].max() + 0.5, -0.5, len(columns) - 0.5)
    image = axes[0].imshow(np.log10(largest), aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    axes[0].set_yticks(range(len(columns)), [name.removeprefix(NORM) for name in columns])
    axes[0].set(xlabel="step", title=f"Gradient norm by layer, {train['run'].iloc[0]}")
    figure.colorbar(image, label="log10 of the norm")
    return figure


def plot_attention(df: "pd.DataFrame", run: str | None = None) -> "Figure":
    """Largest attention score before the soft cap, and mean entropy of the weights: a line a head, a color a layer.

    A head whose entropy falls to 0 looks at one token only; scores that only grow go before a spike.
    """
    diagnostics = _one_run(df, run, "diagnostics")
    figure, axes = _figure(2)
    titles = {"attention_max": "Largest score", "attention_entropy": "Entropy (nats)"}
    for ax, (prefix, title) in zip(axes, titles.items(), strict=True):
        heads = [name for name in diagnostics if name.startswith(f"{prefix}/") and diagnostics[name].notna().any()]
        layers = forward_order(name.split("/")[1] for name in heads)
        for name in sorted(heads, key=lambda head: layers.index(head.split("/")[1])):
            layer, head = name.split("/")[1:]
            label = layer if head == "head_0" else None
            ax.plot(diagnostics["step"], diagnostics[name], color=f"C{layers.index(layer) % 10}", label=label)
        ax.set(ylabel=title, title=f"{title} of each attention head, {diagnostics['run'].iloc[0]}")
    axes[1].set_xlabel("step")
    axes[0].legend(title="layer", ncols=2, fontsize="small")
    return figure


def _read_tables(path: Path) -> tuple[dict[str, Table], list[dict[str, Any]]]:
    """Lines of numbers as one table a split, and events as they are."""
    columns: dict[str, dict[str, array.array]] = {}
    events = []
    for record in read_lines(path):
        split = record.pop("split", None)
        if split == "event":
            events.append(record)
            continue
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


def _list_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    found = []
    for child in folder.iterdir() if folder.is_dir() else ():
        step = re.fullmatch(r"\D*(\d+)", child.name)  # one that is still being written has a longer name
        if step and child.is_dir():
            with contextlib.suppress(FileNotFoundError):  # a running run may just be removing it
                size = sum(file.stat().st_size for file in child.rglob("*") if file.is_file())
                found.append(SavedCheckpoint(child.name, int(step[1]), size))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _import(name: str) -> types.ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: install the `notebook` extra (uv sync --extra notebook)") from None


def _labels(workdirs: Sequence[str | Path]) -> list[str]:
    names = [Path(workdir).resolve().name for workdir in workdirs]
    return [name if names.count(name) == 1 else str(workdir) for name, workdir in zip(names, workdirs, strict=True)]


def _norm_columns(df: "pd.DataFrame") -> list[str]:
    return [NORM + layer for layer in forward_order(name[len(NORM) :] for name in df if name.startswith(NORM))]


def _by_run(df: "pd.DataFrame", split: str) -> "Mapping[str, pd.DataFrame]":
    return df[df["split"] == split].groupby("run", sort=False)


def _one_run(df: "pd.DataFrame", run: str | None, split: str) -> "pd.DataFrame":
    """The rows of a split of one run: the first, if none is named."""
    label = df["run"].iloc[0] if run is None else run
    rows = df[(df["run"] == label) & (df["split"] == split)]
    if rows.empty:
        raise UserError(f"run {label!r} has no {split} metrics; there are {', '.join(df['run'].unique())}")
    return rows


def _colored(groups: Any) -> Any:
    return ((f"C{i % 10}", group) for i, group in enumerate(groups))


def _figure(rows: int, height: float = 4) -> "tuple[Figure, Sequence[Axes]]":
    # Not through pyplot, which would keep each figure and have a notebook show it twice.
    figure = _import("matplotlib.figure").Figure(figsize=(10, height * rows), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False)[:, 0]
