"""Numbers of a run that its report and its notes are made of."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpt_jax.runs.load import NORM, RunData

TRAIN_WINDOW = 50  # steps whose mean loss stands for the training loss at a step: one batch alone is noisy


def text_statistics(samples: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Statistics of the texts of one step.

    distinct_2 is the share of different ones among the word pairs of all texts (Li et al., "A diversity-promoting
    objective function for neural conversation models", 2016); repetition the share of word triples that their text
    had before; tokens the mean length; ended the share that the model ended itself, None if that was not recorded.
    """
    words = [sample["text"].lower().split() for sample in samples]
    pairs = [pair for text in words for pair in itertools.pairwise(text)]
    triples = [list(zip(text, text[1:], text[2:], strict=False)) for text in words]
    count = sum(map(len, triples))
    known = [sample["ended"] for sample in samples if sample.get("ended") is not None]
    return {
        "tokens": float(np.mean([sample["tokens"] for sample in samples])),
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else math.nan,
        "repetition": 1 - sum(len(set(text)) for text in triples) / count if count else math.nan,
        "ended": sum(known) / len(known) if known else None,
    }


def evaluations(run: RunData) -> Iterable[tuple[int, float, float, float]]:
    """Step, training loss around it, validation loss and their gap."""
    steps, loss = run.series("train", "loss")
    for step, validation in zip(*run.series("validation", "loss"), strict=True):
        window = loss[(steps > step - TRAIN_WINDOW) & (steps <= step)]
        train = window.mean() if len(window) else math.nan
        yield int(step), train, validation, validation - train


def metric_lines(run: RunData) -> list[dict[str, Any]]:
    """The lines that alerts follow from, as they were written: each evaluation behind the training line of its step."""
    lines = [{"split": "event", **event} for event in run.events]
    for split, names in (("train", ("loss", "grad_norm", "finite", "tokens_per_second")), ("validation", ("loss",))):
        table = run.tables.get(split, {})
        columns = {name: table[name].tolist() for name in ("step", *names) if name in table}
        lines += [
            {"split": split, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)
        ]
    order = ("train", "validation", "event")
    return sorted(lines, key=lambda line: (line["step"], order.index(line["split"])))


def worst_steps(run: RunData, count: int = 5) -> list[tuple[int, float, str, float]]:
    """Steps with the largest gradient norms: step, norm, and the layer with the largest part and its norm."""
    table = run.tables["train"]
    steps, norms = run.series("train", "grad_norm")
    worst = np.argsort(-norms, kind="stable")[:count]
    found = []
    for step, norm in zip(steps[worst], norms[worst], strict=True):
        row = int(np.searchsorted(table["step"], step))
        parts = {layer: table[NORM + layer][row] for layer in run.layers if np.isfinite(table[NORM + layer][row])}
        layer = max(parts, key=parts.get, default="")
        found.append((int(step), float(norm), layer, parts.get(layer, math.nan)))
    return found


def phases(run: RunData) -> Iterable[tuple[str, np.ndarray, float]]:
    """Name, milliseconds of each measurement and seconds in all, of what the run spent its time on."""
    for name, metric in (("step", "step_ms"), ("data wait", "data_ms"), ("exchange", "exchange_ms")):
        logged, milliseconds = run.series("train", metric)
        if len(milliseconds):
            yield name, milliseconds, float(milliseconds @ np.diff(logged, prepend=0)) / 1e3
    _, validation = run.series("validation", "seconds")
    sampling = np.array([sample["seconds"] for sample in run.samples])
    _, saving = run.series("train", "checkpoint_ms")
    for name, milliseconds in (
        ("evaluation", 1e3 * validation),
        ("sample", 1e3 * sampling),
        ("checkpoint", saving),
    ):
        if len(milliseconds):
            yield name, milliseconds, float(milliseconds.sum()) / 1e3


def phase_figures(milliseconds: np.ndarray) -> tuple[float, float, float]:
    """Median, 90th percentile and largest."""
    return (*np.percentile(milliseconds, (50, 90)), milliseconds.max())


def peak_memory(run: RunData, where: str) -> float | None:
    """The most bytes that were in use on the 'device' or the 'host'; None: not known."""
    said = (run.info.get("peak_memory_bytes") or {}).get(where)
    _, recorded = run.series("train", f"{where}_peak_bytes")  # ahead of run.json while the run goes on
    return max([*recorded[-1:], *([said] if said else [])], default=None)


def trailing_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the last TRAIN_WINDOW values at each place; +inf until there are as many."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    means = np.full(len(values), math.inf)
    means[TRAIN_WINDOW - 1 :] = (sums[TRAIN_WINDOW:] - sums[:-TRAIN_WINDOW]) / TRAIN_WINDOW
    return means
