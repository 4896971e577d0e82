"""Several runs on one page: curves over steps, tokens and time, what differs in their configs, figures, samples."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt_jax.config import leaves
from gpt_jax.runs.analysis import TRAIN_WINDOW, peak_memory, trailing_mean
from gpt_jax.runs.charts import Series, line_figure
from gpt_jax.runs.content import Report, ReportBlock, Section, Text, make_table
from gpt_jax.runs.formats import format_duration, format_number, format_size
from gpt_jax.runs.load import RunData, run_labels
from gpt_jax.runs.sections import final_figures
from gpt_jax.runs.wall_time import elapsed_seconds, measured, running_seconds, step_times, wall_time

X_NAMES = ("step", "tokens", "minutes")
SAMPLE_STEPS = 3  # of a prompt: the first, one in the middle, the last

Runs = Sequence[tuple[str, RunData]]


def compare_runs(runs: Sequence[RunData]) -> Report:
    labels = run_labels([run.workdir for run in runs])
    labelled = list(zip(labels, runs, strict=True))
    sections = {
        "Figures": figures(labelled),
        "Loss": losses(labelled),
        "What differs in the configs": differences(labelled),
        "Gradient norm": _curves(labelled, "grad_norm", "Gradient norm", "norm before the clip", log=True),
        "Learning rate": _curves(labelled, "learning_rate", "Learning rate over the run", "learning rate"),
        "Throughput": _curves(labelled, "tokens_per_second", "Tokens a second", "tokens a second"),
        "Where the wall time went": times(labelled),
        "Samples": samples(labelled),
    }
    return Report(
        f"{len(runs)} runs: {', '.join(labels)}", tuple(Section(name, tuple(b)) for name, b in sections.items())
    )


def figures(runs: Runs) -> list[ReportBlock]:
    """Says what each run is and what it came to, a run a column."""
    facts: dict[str, Callable[[RunData], Any]] = {
        "status": lambda run: run.info.get("status"),
        "steps": lambda run: f"{run.last_step:,}",
        "best validation loss": lambda run: dict(final_figures(run)).get("best validation loss"),
        "last training loss": lambda run: _mean_of_last(run),
        "median gradient norm": lambda run: _median(run.series("train", "grad_norm")[1]),
        "median step, ms": lambda run: _median(step_times(run)),
        "tokens a second": lambda run: _median(measured(run, "tokens_per_second"), ",.0f"),
        "MFU": lambda run: _median(measured(run, "mfu"), ".1%"),
        "time": lambda run: format_duration(elapsed_seconds(run)),
        "parameters": lambda run: f"{run.info['parameters']:,}" if run.info.get("parameters") else None,
        "device memory": lambda run: format_size(peak_memory(run, "device")),
        "backend": lambda run: run.info.get("backend"),
    }
    rows = [(name, *(fact(run) or "-" for _, run in runs)) for name, fact in facts.items()]
    return make_table(("figure", *(label for label, _ in runs)), rows)


def losses(runs: Runs) -> list[ReportBlock]:
    series = []
    for label, run in runs:
        steps, loss = run.series("train", "loss")
        means = trailing_mean(loss)[TRAIN_WINDOW - 1 :]
        middle = steps[TRAIN_WINDOW // 2 :][: len(means)]
        series.append(_series(run, f"{label}: training", middle, means))
        series.append(_series(run, f"{label}: validation", *run.series("validation", "loss"), look="points"))
    about = f"Training loss, mean of the {TRAIN_WINDOW} steps around, and validation loss of each run."
    return line_figure("Training and validation", about, "loss (nats a token)", series, x_names=X_NAMES)


def differences(runs: Runs) -> list[ReportBlock]:
    """The settings in which not all runs are alike."""
    values = [dict(leaves(run.config)) for _, run in runs]
    names = list(dict.fromkeys(itertools.chain(*values)))
    missing = object()
    rows = [
        (name, *(str(each.get(name, "-")) for each in values))
        for name in names
        if any(each.get(name, missing) != values[0].get(name, missing) for each in values)
    ]
    return make_table(("setting", *(label for label, _ in runs)), rows) or [Text("All settings are the same.")]


def times(runs: Runs) -> list[ReportBlock]:
    spent = [dict(wall_time(run)) for _, run in runs]
    names = list(dict.fromkeys(itertools.chain(*spent)))
    rows = [(name, *(format_duration(each.get(name)) or "-" for each in spent)) for name in names]
    return make_table(("part", *(label for label, _ in runs)), rows)


def samples(runs: Runs) -> list[ReportBlock]:
    """Answers to the prompts that more than one run has, side by side."""
    answers = [{(s["prompt"], s["step"]): s["text"] for s in run.samples} for _, run in runs]
    asked = [list(dict.fromkeys(prompt for prompt, _ in each)) for each in answers]
    blocks: list[ReportBlock] = []
    for prompt in dict.fromkeys(itertools.chain(*asked)):
        if sum(prompt in each for each in asked) < 2:
            continue
        shown = sorted({step for each in answers for step in _spread([step for at, step in each if at == prompt])})
        rows = [(step, *(each.get((prompt, step), "-") for each in answers)) for step in shown]
        blocks += [Text(prompt), *make_table(("step", *(label for label, _ in runs)), rows)]
    return blocks or [Text("No prompt was asked in two of the runs.")]


def _spread(steps: list[int]) -> list[int]:
    """Some of the steps, evenly from the first to the last."""
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(SAMPLE_STEPS, len(steps)))]


def _curves(runs: Runs, name: str, title: str, y_name: str, log: bool = False) -> list[ReportBlock]:
    series = []
    for label, run in runs:
        steps, values = run.series("train", name)
        begin = name == "tokens_per_second" and len(steps) > 1  # the first holds the compilation
        series.append(_series(run, label, steps[int(begin) :], values[int(begin) :]))
    return line_figure(title, f"{title} of each run.", y_name, series, log=log, x_names=X_NAMES)


def _series(run: RunData, name: str, steps: np.ndarray, values: np.ndarray, look: str = "line") -> Series:
    """A line over steps, tokens and minutes."""
    if not len(steps) or "train" not in run.tables:
        return Series(name, np.empty(0), np.empty(0), look)
    model = run.config.get("model") or {}
    tokens = steps * run.config.get("batch_size", 1) * model.get("block_size", 1)
    minutes = np.interp(steps, run.tables["train"]["step"], running_seconds(run) / 60)
    return Series(name, steps, values, look, (tokens, minutes))


def _mean_of_last(run: RunData) -> str | None:
    _, loss = run.series("train", "loss")
    return format_number(loss[-TRAIN_WINDOW:].mean()) if len(loss) else None


def _median(values: np.ndarray, form: str | None = None) -> str | None:
    return format_number(float(np.median(values)), form) if len(values) else None
