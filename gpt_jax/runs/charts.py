"""The figures of a report: a run's curves and maps, thinned so that a page of them stays small."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.runs.analysis import TRAIN_WINDOW, trailing_mean
from gpt_jax.runs.content import Bars, Figure, HeatMap, Line, Lines, ReportBlock, Table, make_table
from gpt_jax.runs.formats import format_duration, format_number
from gpt_jax.runs.load import NORM, RunData, forward_order
from gpt_jax.runs.wall_time import wall_time

MOST_POINTS = 400  # of a line
MOST_COLUMNS = 120  # of a heat map
ROWS = 12  # of the table behind a line


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest of each stretch of a long line, so that no spike is lost."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), most // 2):
        kept |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    places = sorted(kept)
    return x[places], y[places]


class Series(NamedTuple):
    """A line before it is thinned. more_x: the same places on other scales."""

    name: str
    x: np.ndarray  # sorted
    y: np.ndarray  # finite
    look: str = "line"
    more_x: tuple[np.ndarray, ...] = ()


def line_figure(
    title: str,
    description: str,
    y_name: str,
    series: Iterable[Series],
    *,
    log: bool = False,
    x_names: tuple[str, ...] = ("step",),
) -> list[ReportBlock]:
    """A figure of the series that have points; none if no one has."""
    drawn = [each for each in series if len(each.x)]
    if not drawn:
        return []
    lines = []
    for each in drawn:
        places, values = thin(np.arange(len(each.x)), each.y)
        scales = tuple(_short(x[places]) for x in (each.x, *each.more_x))
        lines.append(Line(each.name, scales, _short(values), each.look))
    [table] = make_table((x_names[0], *(each.name for each in drawn)), _rows(drawn))
    return [Figure(title, description, Lines(x_names, y_name, tuple(lines), log), table)]


def loss(run: RunData) -> list[ReportBlock]:
    steps, values = run.series("train", "loss")
    means = trailing_mean(values)[TRAIN_WINDOW - 1 :]
    middle = steps[TRAIN_WINDOW // 2 :][: len(means)]  # of their windows: at their ends they would trail behind
    lines = [
        Series("training, each step", steps, values, "pale"),
        Series(f"training, mean of the {TRAIN_WINDOW} steps around", middle, means),
        Series("validation", *run.series("validation", "loss"), "points"),
    ]
    about = f"Training and validation loss by step.{_trend('Training', steps, values)}"
    return line_figure("Training and validation", about, "loss (nats a token)", lines)


def learning_rate(run: RunData) -> list[ReportBlock]:
    steps, values = run.series("train", "learning_rate")
    lines = [Series("learning rate", steps, values)]
    return line_figure(
        "Learning rate by step", f"Learning rate by step.{_trend('Rate', steps, values)}", "learning rate", lines
    )


def norms(run: RunData) -> list[ReportBlock]:
    names = {"grad_norm": "gradient, before the clip", "update_norm": "update", "param_norm": "parameters"}
    lines = [Series(called, *_positive(run.series("train", name))) for name, called in names.items()]
    steps, values = run.series("train", "grad_norm")
    about = f"Norms of gradient, update and parameters by step.{_trend('Gradient', steps, values)}"
    return line_figure("Norms of gradient, update and parameters", about, "norm", lines, log=True)


def layer_norms(run: RunData) -> list[ReportBlock]:
    """Heat map of the layers' gradient norms: the largest of each stretch of steps."""
    table, layers = run.tables.get("train", {}), run.layers
    if not layers:
        return []
    parts = np.array_split(np.arange(len(table["step"])), min(MOST_COLUMNS, len(table["step"])))
    values = []
    for layer in layers:
        norm = np.where(np.isfinite(table[NORM + layer]), table[NORM + layer], np.nan)
        values.append([_largest(norm[part]) for part in parts])
    chart = HeatMap(
        x_name="step",
        x=[f"{table['step'][part[-1]]:,}" for part in parts],
        y=layers,
        values=values,
        value_name="gradient norm",
        log=True,
    )
    about = "Gradient norm of each layer, the input at the bottom; each column has the largest of its steps."
    return [Figure("Gradient norm by layer", about, chart, _map_table(chart, "layer"))]


def attention(run: RunData) -> list[ReportBlock]:
    """Heat maps of each head's largest score and entropy."""
    table = run.tables.get("diagnostics", {})
    found: list[ReportBlock] = []
    for prefix, title, about in (
        ("attention_max", "Largest attention score", "before the soft cap; scores that only grow go before a spike"),
        ("attention_entropy", "Attention entropy", "in nats; a head at 0 looks at one token only"),
    ):
        names = [name for name in table if name.startswith(f"{prefix}/")]
        layers = forward_order(name.split("/")[1] for name in names)
        names.sort(key=lambda name: (layers.index(name.split("/")[1]), int(name.rpartition("_")[2])))
        if not names:
            continue
        places = sorted(
            {round(i) for i in np.linspace(0, len(table["step"]) - 1, min(MOST_COLUMNS, len(table["step"])))}
        )
        chart = HeatMap(
            x_name="step",
            x=[f"{table['step'][place]:,}" for place in places],
            y=[f"{name.split('/')[1]}, head {name.rpartition('_')[2]}" for name in names],
            values=[[_finite(table[name][place]) for place in places] for name in names],
            value_name=title.lower(),
        )
        found.append(
            Figure(f"{title} by head", f"{title} of each head by step, {about}.", chart, _map_table(chart, "head"))
        )
    return found


def throughput(run: RunData) -> list[ReportBlock]:
    """The first interval of each part, in which it compiles, is left out."""
    steps, tokens = run.series("train", "tokens_per_second")
    lines = [Series("tokens a second", steps[1:], tokens[1:])]
    about = f"Tokens a second by step, without the first.{_trend('Tokens a second', steps[1:], tokens[1:])}"
    return line_figure("Tokens a second", about, "tokens a second", lines)


def memory(run: RunData) -> list[ReportBlock]:
    lines = []
    for name, called in (("host_peak_bytes", "host"), ("device_peak_bytes", "device")):
        steps, count = run.series("train", name)
        lines.append(Series(called, steps, count / 1e6))
    about = "The most memory that was in use so far, on the host and on the device, by step."
    return line_figure("Memory in use at most", about, "MB", lines)


def wall_time_bar(run: RunData) -> list[ReportBlock]:
    parts = wall_time(run)
    if not parts:
        return []
    whole = sum(seconds for _, seconds in parts)
    rows = [(name, format_duration(seconds), f"{seconds / whole:.1%}") for name, seconds in parts]
    [table] = make_table(("part", "time", "share"), [*rows, ("all", format_duration(whole), "100.0%")])
    chart = Bars(("",), tuple((name, [round(seconds, 3)]) for name, seconds in parts), "seconds", stacked=True)
    largest, seconds = max(parts, key=lambda part: part[1])
    share = f"most of it, {seconds / whole:.0%}: {largest}"
    about = f"The wall time of all parts of the run, {format_duration(whole)}; {share}."
    return [Figure("Where the wall time went", about, chart, table)]


def _short(values: np.ndarray) -> list:
    """Numbers of five digits, whole ones as such; None for what is not finite."""
    return [
        None if not np.isfinite(value) else int(value) if value == int(value) else float(f"{value:.5g}")
        for value in values
    ]


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _largest(values: np.ndarray) -> float | None:
    return _finite(np.nanmax(values)) if np.isfinite(values).any() else None


def _positive(series: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The part of a series that a logarithmic scale can show."""
    steps, values = series
    return steps[values > 0], values[values > 0]


def _trend(name: str, steps: np.ndarray, values: np.ndarray) -> str:
    """Says in words what a line shows."""
    if not len(values):
        return ""
    first, last, low, high = map(format_number, (values[0], values[-1], values.min(), values.max()))
    return f" {name}: from {first} at step {steps[0]:,} to {last} at step {steps[-1]:,}; lowest {low}, highest {high}."


def _rows(series: Sequence[Series]) -> list[tuple]:
    """The last value of each line at or before some places of the longest one; of points only those that are there."""
    longest = max(series, key=lambda each: len(each.x)).x
    places = {float(longest[round(i)]) for i in np.linspace(0, len(longest) - 1, min(ROWS, len(longest)))}
    places |= {float(x) for each in series if each.look == "points" and len(each.x) <= 2 * ROWS for x in each.x}
    rows = []
    for place in sorted(places):
        cells = []
        for each in series:
            at = int(np.searchsorted(each.x, place, side="right")) - 1
            known = at >= 0 and (each.look != "points" or each.x[at] == place) and place <= each.x[-1]
            cells.append(format_number(each.y[at]) if known else "-")
        rows.append((int(place) if place.is_integer() else format_number(place), *cells))
    return rows


def _map_table(chart: HeatMap, row_name: str) -> Table:
    """First, largest and last value of each row of a map."""
    rows = []
    for name, values in zip(chart.y, chart.values, strict=True):
        known = [value for value in values if value is not None]
        rows.append((name, *(format_number(v) for v in ((known[0], max(known), known[-1]) if known else (None,) * 3))))
    return make_table((row_name, "first", "largest", "last"), rows)[0]
