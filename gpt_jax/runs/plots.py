"""Runs side by side, as tables and figures, from the data frames of `load_metrics`.

The tables need pandas and the figures matplotlib, both in the `notebook` extra. A figure is returned, not shown: it is
the value of a notebook's cell, or yours to `savefig`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.runs.load import NORM, SPIKE, forward_order, import_extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def default_half_life(df: "pd.DataFrame") -> float:
    """The half-life of a smoothed loss: 20 steps, or a fiftieth of the shortest run where that is less.

    Over a run of a few dozen steps, 20 would show its beginning at its end. All runs have the same one, to be compared.
    """
    lengths = df[df["split"] == "train"].groupby("run")["step"].agg(lambda steps: steps.max() - steps.min() + 1)
    return min(20.0, lengths.min() / 50) if len(lengths) else 20.0


def smooth(series: "pd.Series", half_life: float) -> "pd.Series":
    """Exponential moving average in which a value counts half as much `half_life` steps later.

    Free of a start-up bias. Non-finite values are left out, not spread. A half-life of 0 changes nothing.
    """
    if half_life == 0:
        return series
    finite = series.where(np.isfinite(series))
    return finite.ewm(halflife=half_life, ignore_na=True).mean()


def smooth_around(series: "pd.Series", half_life: float) -> "pd.Series":
    """Mean of the values on both sides, in which one counts half as much `half_life` steps away.

    It does not lag behind a loss that falls. Near an end it reaches as far as to that end, on both sides, so that the
    first and the last value are as they are. Non-finite values are left out.
    """
    if half_life == 0:
        return series
    values = series.to_numpy(float)
    known = np.isfinite(values).astype(float)
    values = np.where(known > 0, values, 0.0)
    total, weight = values.copy(), known.copy()
    for away in range(1, min(int(10 * half_life), (len(values) - 1) // 2) + 1):  # 2^-10 and less is left out
        factor = 0.5 ** (away / half_life)
        total[away:-away] += factor * (values[: -2 * away] + values[2 * away :])
        weight[away:-away] += factor * (known[: -2 * away] + known[2 * away :])
    means = np.full(len(values), np.nan)
    return type(series)(np.divide(total, weight, out=means, where=weight > 0), index=series.index, name=series.name)


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
    half_life: float | None = None,
) -> "pd.DataFrame":
    """The runs side by side, one a column: smoothed training loss at some steps, and how far each came."""
    pd = import_extra("pandas")
    half_life = default_half_life(df) if half_life is None else half_life
    columns = {}
    for label, train in _by_run(df, "train"):
        loss = train.set_index("step")["loss"]
        around = smooth_around(loss, half_life)
        column = {f"loss at {step:,}": around.get(step, np.nan) for step in steps if step <= df["step"].max()}
        column |= {"last step": train["step"].max(), "last loss": smooth(loss, half_life).iloc[-1]}
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


def validation_gap(df: "pd.DataFrame", half_life: float | None = None) -> "pd.DataFrame":
    """Each evaluation beside the smoothed training loss of its step: run, step, train, validation, gap.

    Dropout is on in training and off in validation, so a young model's gap is often negative.
    """
    pd = import_extra("pandas")
    half_life = default_half_life(df) if half_life is None else half_life
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


def plot_loss(df: "pd.DataFrame", half_life: float | None = None) -> "Figure":
    """Training loss, raw (pale) and smoothed, with the validation losses as points."""
    half_life = default_half_life(df) if half_life is None else half_life
    figure, axes = _figure(1)
    for color, (label, train) in _colored(_by_run(df, "train")):
        axes[0].plot(train["step"], train["loss"], color=color, alpha=0.25, linewidth=0.8)
        axes[0].plot(train["step"], smooth_around(train["loss"], half_life), color=color, label=label)
        validation = df[(df["run"] == label) & (df["split"] == "validation")]
        axes[0].plot(validation["step"], validation["loss"], "o", color=color, markeredgecolor="black")
    axes[0].set(
        xlabel="step",
        ylabel="loss (nats a token)",
        title=f"Training loss, half-life {half_life:g} steps; dots: validation",
    )
    axes[0].legend()
    return figure


def plot_validation_gap(df: "pd.DataFrame", half_life: float | None = None) -> "Figure":
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


def plot_heads(tokens: Sequence[str], weights: np.ndarray, title: str = "") -> "Figure":
    """Attention of each token, a row, to those before it: a panel a head, from weights (H, T, T)."""
    shown = [token.replace(" ", "·") for token in tokens]
    columns = min(4, len(weights))
    rows = -(-len(weights) // columns)
    side = max(2.6, 0.19 * len(tokens))
    figure = import_extra("matplotlib.figure").Figure(figsize=(side * columns, side * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for head, ax in enumerate(panels[: len(weights)]):
        image = ax.imshow(weights[head], vmin=0, vmax=1, cmap="Blues")
        ax.set_xticks(range(len(shown)), shown, rotation=90, fontsize="x-small")
        ax.set_yticks(range(len(shown)), shown, fontsize="x-small")
        ax.set_title(f"head {head}")
    for ax in panels[len(weights) :]:
        ax.remove()
    figure.colorbar(image, ax=panels[: len(weights)].tolist(), label="weight", shrink=0.6)
    figure.suptitle(title)
    return figure


def plot_errors(errors: Mapping[str, np.ndarray]) -> "Figure":
    """Histogram of errors by implementation, the larger ones visible: counts are on a logarithmic scale."""
    figure, axes = _figure(1)
    largest = max(np.abs(values).max() for values in errors.values()) or 1.0
    for color, (name, values) in _colored(errors.items()):
        axes[0].hist(values, bins=np.linspace(-largest, largest, 60), histtype="step", color=color, label=name)
    axes[0].set(yscale="log", xlabel="error, in units of the largest result", ylabel="elements", title="Errors")
    axes[0].legend()
    return figure


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
    figure = import_extra("matplotlib.figure").Figure(figsize=(10, height * rows), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False)[:, 0]
