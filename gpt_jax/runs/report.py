"""A run in numbers and plain words: `python -m gpt_jax.report RUN` prints it, training writes it as report.md.

Works on a run that is going on, was interrupted or failed; a section without data says so.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import FIELDS, leaves
from gpt_jax.runs.analysis import (
    TRAIN_WINDOW,
    evaluations,
    phase_figures,
    phases,
    text_statistics,
    trailing_mean,
    worst_steps,
)
from gpt_jax.runs.load import NORM, RunData, forward_order, load_run
from gpt_jax.runs.markdown import (
    NO_DATA,
    bullet_list,
    fenced,
    format_duration,
    format_number,
    format_size,
    make_table,
    one_line,
)
from gpt_jax.runs.notes import NOTES
from gpt_jax.storage.files import replacing

RANGE_ENDS = (500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
MILESTONES = (8, 7, 6.5, 6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1)
LOSS_STEPS = (1, 10, 50, 100, 200, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
LEARNING_RATE_STEPS = (1, 10, 50, 100, 250, 500, 5000)
SPIKE_THRESHOLDS = (10, 100, 1000)
SAMPLE_STEPS_SHOWN = 8
SHOWN_ELSEWHERE = {  # facts of run.json that have a place outside the section on model and data
    *("run_id", "name", "domain", "status", "command", "starts", "started", "ended", "elapsed_seconds"),
    *("backend", "versions", "device", "host", "git", "peak_memory_bytes", "peak_flops"),
}


def write_report(workdir: str | Path) -> Path:
    """Writes report.md into a run folder and returns its path. Raises UserError if there is no run."""
    path = Path(workdir) / "report.md"
    report = make_report(load_run(workdir))
    with replacing(path) as file:
        file.write(report)
    return path


def make_report(run: RunData) -> str:
    """The report, in Markdown."""
    title = f"# Run {run.info.get('run_id', run.workdir.resolve().name)}"
    return "\n\n".join([title, *(f"## {name}\n\n{section(run)}" for name, section in SECTIONS.items())]) + "\n"


def summary(run: RunData) -> str:
    info = run.info
    rows = [(name, info.get(name)) for name in ("name", "domain", "status", "started", "ended")]
    total = run.config.get("num_steps")
    rows += [
        ("steps", f"{run.last_step:,}" + (f" of {total:,}" if total else "")),
        ("time", format_duration(info.get("elapsed_seconds"))),
        ("starts", info.get("starts")),
        ("command", f"`{info['command']}`" if "command" in info else None),
    ]
    return bullet_list(rows)


def infrastructure(run: RunData) -> str:
    info = run.info
    device, host, git = (info.get(key) or {} for key in ("device", "host", "git"))
    peak = info.get("peak_memory_bytes") or {}
    changed = " (with uncommitted changes)" if git.get("dirty") else ""
    rows = [
        ("backend", info.get("backend")),
        ("device", device and f"{device.get('count')} x {device.get('kind')} ({device.get('platform')})"),
        ("largest use of device memory", format_size(peak.get("device"))),
        ("host", host and f"{host.get('cpu_count')} processors, {format_size(host.get('memory_bytes'))} of memory"),
        ("largest use of host memory", format_size(peak.get("host"))),
        ("system", host.get("platform")),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())),
        ("git commit", git.get("commit") and f"{git['commit']}{changed}"),
    ]
    return bullet_list(rows)


def configuration(run: RunData) -> str:
    rows = [(name, f"`{value}`", FIELDS[name].meaning if name in FIELDS else "") for name, value in leaves(run.config)]
    return make_table(("setting", "value", "what"), rows)


def model_and_data(run: RunData) -> str:
    facts = {name: value for name, value in run.info.items() if name not in SHOWN_ELSEWHERE}
    return bullet_list((name, f"{value:,}" if type(value) is int else value) for name, value in leaves(facts))


def checkpoints(run: RunData) -> str:
    validation = dict(zip(*run.series("validation", "loss"), strict=True))
    best = min(validation, key=validation.get, default=None)
    rows = [
        (
            c.step,
            c.name,
            format_size(c.size),
            format_number(validation.get(c.step)) + (" (best)" if c.step == best else ""),
        )
        for c in run.checkpoints
    ]
    total = sum(checkpoint.size for checkpoint in run.checkpoints)
    return make_table(("step", "folder", "on disk", "validation loss"), rows) + (
        f"\n\nTotal: {format_size(total)}." if rows else ""
    )


def loss_by_range(run: RunData) -> str:
    steps, loss = run.series("train", "loss")
    rows = []
    for start, end in itertools.pairwise((0, *RANGE_ENDS, math.inf)):
        inside = loss[(steps > start) & (steps <= end)]
        if len(inside):
            name = f"{start + 1:,}-{min(end, run.last_step):,}"
            rows.append((name, *map(format_number, (inside[0], inside[-1], inside.mean(), inside.min()))))
    return make_table(("steps", "first", "last", "mean", "lowest"), rows)


def loss_milestones(run: RunData) -> str:
    steps, loss = run.series("train", "loss")
    if not len(loss):
        return NO_DATA
    smooth = trailing_mean(loss)
    rows = []
    for milestone in MILESTONES:
        if milestone >= loss[0]:
            continue
        reached = [steps[values <= milestone] for values in (loss, smooth)]
        rows.append((f"<= {milestone}", *(f"{found[0]:,}" if len(found) else "not reached" for found in reached)))
        if not len(reached[0]):
            break
    columns = ("loss", "first step", f"first step, mean of {TRAIN_WINDOW}")
    return make_table(columns, rows) + "\n\n" + _values_at(run, "loss", LOSS_STEPS, ".4f")


def evaluation(run: RunData) -> str:
    rows = [
        (step, format_number(train), format_number(validation), format_number(gap, "+.4f"))
        for step, train, validation, gap in evaluations(run)
    ]
    note = (
        f"\n\nTraining loss: mean of the last {TRAIN_WINDOW} steps, with dropout on if the model has any. Validation "
        "is without dropout and of this very step, so while the loss falls fast a gap below zero is no error."
    )
    return make_table(("step", "training loss", "validation loss", "gap"), rows) + (note if rows else "")


def gradient_norms(run: RunData) -> str:
    _, total = run.series("train", "grad_norm")
    if not len(total):
        return NO_DATA
    names = ["all", *run.layers]
    rows = []
    for name in names:
        _, norms = run.series("train", "grad_norm" if name == "all" else NORM + name)
        if len(norms):
            rows.append((name, *map(format_number, (*np.percentile(norms, (50, 90, 99)), norms.max()))))
    counts = [(f"> {t:,}", (total > t).sum(), f"{(total > t).mean():.1%}") for t in SPIKE_THRESHOLDS]
    worst = [(step, format_number(norm), layer, format_number(share)) for step, norm, layer, share in worst_steps(run)]
    return "\n\n".join(
        [
            "Before the clip.",
            make_table(("layer", "p50", "p90", "p99", "max"), rows),
            make_table(("gradient norm", "steps", "share"), counts),
            "The steps with the largest norms, and the layer that most of each came from:",
            make_table(("step", "gradient norm", "layer", "norm of the layer"), worst),
        ]
    )


def attention(run: RunData) -> str:
    table = run.tables.get("diagnostics", {})
    layers = forward_order(name.split("/")[1] for name in table if name.startswith("attention_max/"))
    rows = []
    for layer in layers:
        scores = np.array([v for name, v in table.items() if name.startswith(f"attention_max/{layer}/")])
        entropy = np.array([v for name, v in table.items() if name.startswith(f"attention_entropy/{layer}/")])
        head = int(scores[:, -1].argmax())
        lowest = (entropy[:, 0].min(), entropy[:, -1].min()) if entropy.size else (math.nan, math.nan)
        rows.append(
            (layer, *map(format_number, (scores[:, 0].max(), scores[:, -1].max())), head, *map(format_number, lowest))
        )
    columns = ("layer", "largest score, first", "last", "in head", "lowest entropy (nats), first", "last")
    return make_table(columns, rows)


def learning_rate(run: RunData) -> str:
    return _values_at(run, "learning_rate", LEARNING_RATE_STEPS, ".4g")


def timing(run: RunData) -> str:
    rows = [
        (name, len(each), *map(format_number, phase_figures(each)), format_duration(total))
        for name, each, total in phases(run)
    ]
    first_step, step_ms = run.series("train", "step_ms")
    first = ""
    if len(first_step) and first_step[0] == 1:
        first = f"\n\nThe first step, compilation included, took {format_number(step_ms[0])} ms."
    columns = ("phase", "measured", "median, ms", "p90", "max", "in all")
    note = "\n\nThe data wait is part of the step. Steps and data wait are means over a logging interval."
    return make_table(columns, rows) + (first + note if rows else "")


def throughput(run: RunData) -> str:
    _, tokens = run.series("train", "tokens_per_second")
    tokens = tokens[1:] if len(tokens) > 1 else tokens  # the first holds the compilation
    _, mfu = run.series("train", "mfu")
    if not len(tokens):
        return NO_DATA
    peak = run.info.get("peak_flops")
    seen = run.config.get("batch_size", 0) * run.config.get("model", {}).get("block_size", 0)
    rows = [
        ("tokens a second, median", f"{np.median(tokens):,.0f}"),
        ("tokens a second, lowest and highest", f"{tokens.min():,.0f} to {tokens.max():,.0f}"),
        ("peak of the device", f"{peak / 1e12:,.1f} TFLOP/s" if peak else "not known"),
        ("model FLOPs utilisation (MFU), median", f"{np.median(mfu):.1%}" if len(mfu) else None),
        ("tokens trained on", f"{seen * run.last_step:,}" if seen else None),
    ]
    return bullet_list(rows)


def samples(run: RunData) -> str:
    steps = sorted({sample["step"] for sample in run.samples})
    if not steps:
        return NO_DATA
    before = [[step for step in steps if step <= checkpoint.step][-1:] for checkpoint in run.checkpoints]
    shown = sorted({steps[0], steps[-1], *itertools.chain(*before)})
    parts = []
    for step in _spread(shown, SAMPLE_STEPS_SHOWN):
        for sample in run.samples:
            if sample["step"] == step:
                parts.append(f"**Step {step:,}**, {one_line(sample['prompt'])}\n\n{fenced(sample['text'])}")
    return "\n\n".join(parts)


def sample_quality(run: RunData) -> str:
    steps = sorted({sample["step"] for sample in run.samples})
    rows = []
    for step in _spread(steps, 20):
        quality = text_statistics([sample for sample in run.samples if sample["step"] == step])
        ended = quality["ended"]
        rows.append(
            (
                step,
                f"{quality['tokens']:.0f}",
                format_number(quality["distinct_2"], ".2f"),
                format_number(quality["repetition"], ".2f"),
                "not known" if ended is None else f"{ended:.0%}",
            )
        )
    note = (
        "\n\ndistinct-2: share of word pairs that are different ones; repetition: share of word triples that the "
        "same text had before; ended: share of texts that the model ended itself. They show collapse and "
        "rambling, not whether a text makes sense."
    )
    return make_table(("step", "mean tokens", "distinct-2", "repetition", "ended"), rows) + (note if rows else "")


def events(run: RunData) -> str:
    rows = [(event["step"], event.get("text", "")) for event in run.events]
    hidden = len(rows) - 40
    more = f"\n\n{hidden:,} more in metrics.jsonl." if hidden > 0 else ""
    return make_table(("step", "event"), rows[:40]) + more if rows else "None."


def notes(run: RunData) -> str:
    found = [note for rule in NOTES if (note := rule(run))]
    return "\n".join(f"- {note}" for note in found) or NO_DATA


SECTIONS: dict[str, Callable[[RunData], str]] = {
    "Summary": summary,
    "Notes": notes,
    "Infrastructure": infrastructure,
    "Configuration": configuration,
    "Model and data": model_and_data,
    "Checkpoints": checkpoints,
    "Loss by step range": loss_by_range,
    "Loss milestones": loss_milestones,
    "Evaluation": evaluation,
    "Gradient norm": gradient_norms,
    "Attention": attention,
    "Learning rate": learning_rate,
    "Time by phase": timing,
    "Throughput": throughput,
    "Samples": samples,
    "Sample quality": sample_quality,
    "Events": events,
}


def _values_at(run: RunData, name: str, steps: Sequence[int], form: str) -> str:
    values = dict(zip(*run.series("train", name), strict=True))
    rows = [(step, format(values[step], form)) for step in steps if step in values]
    return make_table(("step", name.replace("_", " ")), rows)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]
