"""The sections of a run's report: each makes the blocks of one heading from what the run's folder says.

They work on a run that is going on, was interrupted or failed, or is of another version: what is not known is left out.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.config import FIELDS, leaves
from gpt_jax.data import tokenizer
from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.errors import UserError
from gpt_jax.runs import charts, kernel_floors
from gpt_jax.runs.alerts import alerts_of
from gpt_jax.runs.analysis import (
    TRAIN_WINDOW,
    evaluations,
    metric_lines,
    peak_memory,
    phase_figures,
    phases,
    text_statistics,
    trailing_mean,
    worst_steps,
)
from gpt_jax.runs.content import Notes, ReportBlock, Text, Timeline, TokenizedSentence, make_facts, make_table
from gpt_jax.runs.formats import format_duration, format_number, format_size
from gpt_jax.runs.load import NORM, RunData, forward_order
from gpt_jax.runs.metrics import LOSS_OF
from gpt_jax.runs.notes import NOTES
from gpt_jax.runs.wall_time import elapsed_seconds, measured

RANGE_ENDS = (500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
MILESTONES = (8, 7, 6.5, 6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1)
LOSS_STEPS = (1, 10, 50, 100, 200, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
LEARNING_RATE_STEPS = (1, 10, 50, 100, 250, 500, 5000)
SPIKE_THRESHOLDS = (10, 100, 1000)
SAMPLE_STEPS_SHOWN = 12
LAST_STEPS = 10
ALERTS_SHOWN = 40
SENTENCE = "The unexamined life isn't worth living, wrote a naïve reader in 2024: 3.14159 times!"
SHOWN_ELSEWHERE = {  # facts of run.json that have a place outside the section on model and data
    *("run_id", "name", "domain", "status", "command", "starts", "started", "ended", "elapsed_seconds"),
    *("backend", "versions", "device", "host", "git", "peak_memory_bytes", "peak_flops", "config_file", "operations"),
    "processes",
}


def summary(run: RunData) -> list[ReportBlock]:
    info = run.info
    rows = [(name, info.get(name)) for name in ("name", "domain", "status", "started", "ended")]
    total = run.config.get("num_steps")
    rows += [
        ("steps", f"{run.last_step:,}" + (f" of {total:,}" if total else "")),
        ("time", format_duration(elapsed_seconds(run))),
        *final_figures(run),
        ("starts", info.get("starts")),
        ("command", info.get("command")),
    ]
    return make_facts(rows)


def final_figures(run: RunData) -> list[tuple[str, str | None]]:
    """The losses that the run ends with so far."""
    _, loss = run.series("train", "loss")
    at, validation = run.series("validation", "loss")
    if not len(loss):
        return []
    last = loss[-TRAIN_WINDOW:]
    best = f"{validation.min():.4f}, at step {at[validation.argmin()]:,}" if len(validation) else None
    return [
        (f"training loss, mean of the last {len(last)} steps", f"{last.mean():.4f}"),
        ("best validation loss", best),
        *((f"last validation loss on {source}", f"{value:.4f}") for source, value in losses_by_source(run).items()),
    ]


def losses_by_source(run: RunData) -> dict[str, float]:
    """The last validation loss of each source; empty for a run of one."""
    names = [name for name in run.tables.get("validation", {}) if name.startswith(LOSS_OF)]
    values = {name.removeprefix(LOSS_OF): run.series("validation", name)[1] for name in names}
    return {source: float(series[-1]) for source, series in values.items() if len(series)}


def infrastructure(run: RunData) -> list[ReportBlock]:
    info = run.info
    device, host, git = (info.get(key) or {} for key in ("device", "host", "git"))
    changed = " (with uncommitted changes)" if git.get("dirty") else ""
    rows = [
        ("backend", info.get("backend")),
        ("device", device and f"{device.get('count')} x {device.get('kind')} ({device.get('platform')})"),
        ("processes", _processes(info.get("processes") or {})),
        ("largest use of device memory", format_size(peak_memory(run, "device"))),
        ("utilisation of the device (MFU), median", _median_mfu(run)),
        ("host", host and f"{host.get('cpu_count')} processors, {format_size(host.get('memory_bytes'))} of memory"),
        ("largest use of host memory", format_size(peak_memory(run, "host"))),
        ("system", host.get("platform")),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())),
        ("operations a step", _operations(info.get("operations") or {})),
        ("git commit", git.get("commit") and f"{git['commit']}{changed}"),
    ]
    return make_facts(rows)


def _processes(processes: Mapping[str, Any]) -> str | None:
    """The processes of a run that has several, and where they are."""
    hosts = processes.get("hosts") or []
    if not processes.get("count"):
        return None
    return f"{processes['count']} on {', '.join(hosts)}; parameters {processes.get('shard')}"


def configuration(run: RunData) -> list[ReportBlock]:
    """Says what the command line changed in the config's file, then lists all settings."""
    file = run.info.get("config_file") or {}
    now = dict(leaves(run.config))
    changed = [(name, str(before), str(now.get(name, "-"))) for name, before in (file.get("values") or {}).items()]
    blocks: list[ReportBlock] = []
    if "path" in file:
        same = f"The settings are those of {file['path']}."
        blocks = [Text(f"Against {file['path']} the command line changed:") if changed else Text(same)]
        blocks += make_table(("setting", "in the file", "in this run"), changed)
    rows = [(name, str(value), FIELDS[name].meaning if name in FIELDS else "") for name, value in leaves(run.config)]
    return blocks + make_table(("setting", "value", "what"), rows)


def model_and_data(run: RunData) -> list[ReportBlock]:
    facts = {name: value for name, value in run.info.items() if name not in SHOWN_ELSEWHERE}
    return make_facts((name, f"{value:,}" if type(value) is int else value) for name, value in leaves(facts))


def checkpoints(run: RunData) -> list[ReportBlock]:
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
    note = [Text(f"Total: {format_size(total)}.")] if rows else []
    return make_table(("step", "folder", "on disk", "validation loss"), rows) + note


def loss_by_range(run: RunData) -> list[ReportBlock]:
    steps, loss = run.series("train", "loss")
    rows = []
    for start, end in itertools.pairwise((0, *RANGE_ENDS, math.inf)):
        inside = loss[(steps > start) & (steps <= end)]
        if len(inside):
            name = f"{start + 1:,}-{min(end, run.last_step):,}"
            rows.append((name, *map(format_number, (inside[0], inside[-1], inside.mean(), inside.min()))))
    return make_table(("steps", "first", "last", "mean", "lowest"), rows)


def loss_milestones(run: RunData) -> list[ReportBlock]:
    steps, loss = run.series("train", "loss")
    if not len(loss):
        return []
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
    return make_table(columns, rows) + _values_at(run, "loss", LOSS_STEPS, ".4f")


def last_steps(run: RunData) -> list[ReportBlock]:
    table = run.tables.get("train", {})
    names = [name for name in ("loss", "grad_norm", "learning_rate", "param_norm", "update_norm") if name in table]
    rows = [
        (table["step"][place], *(format_number(table[name][place]) for name in names))
        for place in range(len(table.get("step", ())))[-LAST_STEPS:]
    ]
    return make_table(("step", *(name.replace("_", " ") for name in names)), rows)


def tokens(run: RunData) -> list[ReportBlock]:
    """A sentence and the first prompt in the pieces that the model reads."""
    path = run.workdir / TOKENIZER_FILE
    if not path.exists():
        return []
    try:
        loaded = tokenizer.load(path)
        vocabulary = tokenizer.vocabulary_bytes(loaded, loaded.get_vocab_size())
    except UserError as error:  # the rest of the run can be read all the same
        return [Text(str(error))]
    blocks: list[ReportBlock] = []
    for sentence in (SENTENCE, *(run.config.get("sample") or {}).get("prompts", ())[:1]):
        ids = tokenizer.encode(loaded, sentence)
        pieces = tuple((vocabulary[i].decode(errors="replace"), i) for i in ids)
        each, word = len(sentence) / max(len(ids), 1), len(ids) / max(len(sentence.split()), 1)
        counts = (
            f"{len(ids)} tokens of a vocabulary of {len(vocabulary):,}: {word:.2f} a word, {each:.1f} characters each"
        )
        blocks += [Text(counts), TokenizedSentence(pieces)]
    return blocks


def evaluation(run: RunData) -> list[ReportBlock]:
    rows = [
        (step, format_number(train), format_number(validation), format_number(gap, "+.4f"))
        for step, train, validation, gap in evaluations(run)
    ]
    note = Text(
        f"Training loss: mean of the last {TRAIN_WINDOW} steps, with dropout on if the model has any. Validation "
        "is without dropout and of this very step, so while the loss falls fast a gap below zero is no error."
    )
    return make_table(("step", "training loss", "validation loss", "gap"), rows) + ([note] if rows else [])


def gradient_norms(run: RunData) -> list[ReportBlock]:
    _, total = run.series("train", "grad_norm")
    if not len(total):
        return []
    names = ["all", *run.layers]
    rows = []
    for name in names:
        _, norms = run.series("train", "grad_norm" if name == "all" else NORM + name)
        if len(norms):
            rows.append((name, *map(format_number, (*np.percentile(norms, (50, 90, 99)), norms.max()))))
    counts = [(f"> {t:,}", (total > t).sum(), f"{(total > t).mean():.1%}") for t in SPIKE_THRESHOLDS]
    worst = [(step, format_number(norm), layer, format_number(share)) for step, norm, layer, share in worst_steps(run)]
    return [
        Text("Before the clip."),
        *make_table(("layer", "p50", "p90", "p99", "max"), rows),
        *make_table(("gradient norm", "steps", "share"), counts),
        Text("The steps with the largest norms, and the layer that most of each came from:"),
        *make_table(("step", "gradient norm", "layer", "norm of the layer"), worst),
        *charts.norms(run),
        *charts.layer_norms(run),
    ]


def attention(run: RunData) -> list[ReportBlock]:
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
    return make_table(columns, rows) + charts.attention(run)


def learning_rate(run: RunData) -> list[ReportBlock]:
    return _values_at(run, "learning_rate", LEARNING_RATE_STEPS, ".4g") + charts.learning_rate(run)


def timing(run: RunData) -> list[ReportBlock]:
    rows = [
        (name, len(each), *map(format_number, phase_figures(each)), format_duration(total))
        for name, each, total in phases(run)
    ]
    if not rows:
        return []
    first_step, step_ms = run.series("train", "step_ms")
    note = "Data wait and exchange are part of the step. All three are means over a logging interval."
    if len(first_step) and first_step[0] == 1:
        note = f"The first step, compilation included, took {format_number(step_ms[0])} ms. {note}"
    columns = ("phase", "measured", "median, ms", "p90", "max", "in all")
    return [*charts.wall_time_bar(run), *make_table(columns, rows), Text(note)]


def throughput(run: RunData) -> list[ReportBlock]:
    _, tokens = run.series("train", "tokens_per_second")
    tokens = tokens[1:] if len(tokens) > 1 else tokens  # the first holds the compilation
    if not len(tokens):
        return []
    peak = run.info.get("peak_flops")
    seen = run.config.get("batch_size", 0) * run.config.get("model", {}).get("block_size", 0)
    rows = [
        ("tokens a second, median", f"{np.median(tokens):,.0f}"),
        ("tokens a second, lowest and highest", f"{tokens.min():,.0f} to {tokens.max():,.0f}"),
        ("peak of the device", f"{peak / 1e12:,.1f} TFLOP/s" if peak else "not known"),
        ("model FLOPs utilisation (MFU), median", _median_mfu(run)),
        ("tokens trained on", f"{seen * run.last_step:,}" if seen else None),
    ]
    return make_facts(rows) + charts.throughput(run)


def memory(run: RunData) -> list[ReportBlock]:
    rows = [(f"largest use of {name} memory", format_size(peak_memory(run, name))) for name in ("device", "host")]
    return make_facts(rows) + charts.memory(run)


def samples(run: RunData) -> list[ReportBlock]:
    """The answers to each prompt, as the model learns: the first, the last, and those of the checkpoints."""
    steps = sorted({sample["step"] for sample in run.samples})
    before = [[step for step in steps if step <= checkpoint.step][-1:] for checkpoint in run.checkpoints]
    wanted = sorted({*steps[:1], *steps[-1:], *itertools.chain(*before)})
    shown = set(_spread(wanted if len(wanted) > 2 else steps, SAMPLE_STEPS_SHOWN))
    answers: dict[str, list[tuple[str, str]]] = {}
    for sample in run.samples:
        if sample["step"] in shown:
            answers.setdefault(sample["prompt"], []).append((f"Step {sample['step']:,}", sample["text"]))
    return [Timeline(prompt, tuple(texts)) for prompt, texts in answers.items()]


def sample_quality(run: RunData) -> list[ReportBlock]:
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
    note = Text(
        "distinct-2: share of word pairs that are different ones; repetition: share of word triples that the "
        "same text had before; ended: share of texts that the model ended itself. They show collapse and "
        "rambling, not whether a text makes sense."
    )
    return make_table(("step", "mean tokens", "distinct-2", "repetition", "ended"), rows) + ([note] if rows else [])


def events(run: RunData) -> list[ReportBlock]:
    rows = [(event["step"], event.get("text", "")) for event in run.events]
    hidden = len(rows) - 40
    more = [Text(f"{hidden:,} more in metrics.jsonl.")] if hidden > 0 else []
    return make_table(("step", "event"), rows[:40]) + more if rows else [Text("None.")]


def notes(run: RunData) -> list[ReportBlock]:
    found = [note for rule in NOTES if (note := rule(run))]
    return [Notes(tuple(found))] if found else []


def alerts(run: RunData) -> list[ReportBlock]:
    """A table of what the rules of `alerts` find in the metrics, by step."""
    lines = metric_lines(run)
    if not lines:
        return []
    rows = [(alert.step, alert.rule, alert.text) for alert in alerts_of(lines)]
    hidden = len(rows) - ALERTS_SHOWN
    more = [Text(f"{hidden:,} later ones are not shown.")] if hidden > 0 else []
    return make_table(("step", "rule", "what"), rows[:ALERTS_SHOWN]) + more if rows else [Text("None.")]


SECTIONS: dict[str, Callable[[RunData], list[ReportBlock]]] = {
    "Summary": summary,
    "Notes": notes,
    "Alerts": alerts,
    "Loss": charts.loss,
    "Evaluation": evaluation,
    "Loss by step range": loss_by_range,
    "Loss milestones": loss_milestones,
    "Last steps": last_steps,
    "Learning rate": learning_rate,
    "Gradient norm": gradient_norms,
    "Attention": attention,
    "Time by phase": timing,
    "Throughput": throughput,
    "Memory": memory,
    "Kernels": kernel_floors.section,
    "Samples": samples,
    "Sample quality": sample_quality,
    "Checkpoints": checkpoints,
    "Model and data": model_and_data,
    "Tokenizer": tokens,
    "Configuration": configuration,
    "Infrastructure": infrastructure,
    "Events": events,
}


def _median_mfu(run: RunData) -> str | None:
    mfu = measured(run, "mfu")
    return f"{np.median(mfu):.1%}" if len(mfu) else None


def _operations(found: dict[str, Any]) -> str | None:
    """The size of a train step's program, which Vulkan runs as one submission."""
    known = {"dispatches", "barriers", "flops"} <= found.keys()
    return (
        f"{found['dispatches']:,} dispatches behind {found['barriers']:,} barriers, {found['flops'] / 1e9:,.1f} GFLOPs"
        if known
        else None
    )


def _values_at(run: RunData, name: str, steps: Sequence[int], form: str) -> list[ReportBlock]:
    values = dict(zip(*run.series("train", name), strict=True))
    rows = [(step, format(values[step], form)) for step in steps if step in values]
    return make_table(("step", name.replace("_", " ")), rows)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]
