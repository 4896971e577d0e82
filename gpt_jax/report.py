"""A run in numbers and plain words: `python -m gpt_jax.report WORKDIR` prints it, training writes it as report.md.

Works on a run that is going on, was interrupted or failed; a section without data says so.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.cli import run_main
from gpt_jax.config import FIELDS, leaves
from gpt_jax.runs.load import NORM, SPIKE, Run, forward_order, load_run

RANGE_ENDS = (500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
MILESTONES = (8, 7, 6.5, 6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1)
LOSS_STEPS = (1, 10, 50, 100, 200, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000)
LEARNING_RATE_STEPS = (1, 10, 50, 100, 250, 500, 5000)
SPIKE_THRESHOLDS = (10, 100, 1000)
TRAIN_WINDOW = 50  # steps whose mean loss stands for the training loss at a step: one batch alone is noisy
SAMPLE_STEPS_SHOWN = 8
NO_DATA = "No data yet."
SHOWN_ELSEWHERE = {  # facts of run.json that have a place outside the section on model and data
    *("run_id", "name", "domain", "status", "command", "starts", "started", "ended", "elapsed_seconds"),
    *("backend", "versions", "device", "host", "git", "peak_memory_bytes", "peak_flops"),
}


def write_report(workdir: str | Path) -> Path:
    """Writes report.md into a run folder and returns its path. Raises UserError if there is no run."""
    path = Path(workdir) / "report.md"
    path.write_text(make_report(load_run(workdir)), encoding="utf-8")
    return path


def make_report(run: Run) -> str:
    """The report, in Markdown."""
    title = f"# Run {run.info.get('run_id', run.workdir.resolve().name)}"
    return "\n\n".join([title, *(f"## {name}\n\n{section(run)}" for name, section in SECTIONS.items())]) + "\n"


def summary(run: Run) -> str:
    info = run.info
    rows = [(name, info.get(name)) for name in ("name", "domain", "status", "started", "ended")]
    total = run.config.get("num_steps")
    rows += [
        ("steps", f"{run.last_step:,}" + (f" of {total:,}" if total else "")),
        ("time", _duration(info.get("elapsed_seconds"))),
        ("starts", info.get("starts")),
        ("command", f"`{info['command']}`" if "command" in info else None),
    ]
    return _facts(rows)


def infrastructure(run: Run) -> str:
    info = run.info
    device, host, git = (info.get(key) or {} for key in ("device", "host", "git"))
    peak = info.get("peak_memory_bytes") or {}
    changed = " (with uncommitted changes)" if git.get("dirty") else ""
    rows = [
        ("backend", info.get("backend")),
        ("device", device and f"{device.get('count')} x {device.get('kind')} ({device.get('platform')})"),
        ("largest use of device memory", _size(peak.get("device"))),
        ("host", host and f"{host.get('cpu_count')} processors, {_size(host.get('memory_bytes'))} of memory"),
        ("largest use of host memory", _size(peak.get("host"))),
        ("system", host.get("platform")),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())),
        ("git commit", git.get("commit") and f"{git['commit']}{changed}"),
    ]
    return _facts(rows)


def configuration(run: Run) -> str:
    rows = [(name, f"`{value}`", FIELDS[name].meaning if name in FIELDS else "") for name, value in leaves(run.config)]
    return _table(("setting", "value", "what"), rows)


def model_and_data(run: Run) -> str:
    facts = {name: value for name, value in run.info.items() if name not in SHOWN_ELSEWHERE}
    return _facts((name, f"{value:,}" if type(value) is int else value) for name, value in leaves(facts))


def checkpoints(run: Run) -> str:
    validation = dict(zip(*run.series("validation", "loss"), strict=True))
    best = min(validation, key=validation.get, default=None)
    rows = [
        (
            c.step,
            c.name,
            _size(c.size),
            _number(validation.get(c.step)) + (" (best)" if c.step == best else ""),
        )
        for c in run.checkpoints
    ]
    total = sum(checkpoint.size for checkpoint in run.checkpoints)
    return _table(("step", "folder", "on disk", "validation loss"), rows) + (
        f"\n\nTotal: {_size(total)}." if rows else ""
    )


def loss_by_range(run: Run) -> str:
    steps, loss = run.series("train", "loss")
    rows = []
    for start, end in itertools.pairwise((0, *RANGE_ENDS, math.inf)):
        inside = loss[(steps > start) & (steps <= end)]
        if len(inside):
            name = f"{start + 1:,}-{min(end, run.last_step):,}"
            rows.append((name, *map(_number, (inside[0], inside[-1], inside.mean(), inside.min()))))
    return _table(("steps", "first", "last", "mean", "lowest"), rows)


def loss_milestones(run: Run) -> str:
    steps, loss = run.series("train", "loss")
    if not len(loss):
        return NO_DATA
    smooth = _trailing_mean(loss)
    rows = []
    for milestone in MILESTONES:
        if milestone >= loss[0]:
            continue
        reached = [steps[values <= milestone] for values in (loss, smooth)]
        rows.append((f"<= {milestone}", *(f"{found[0]:,}" if len(found) else "not reached" for found in reached)))
        if not len(reached[0]):
            break
    columns = ("loss", "first step", f"first step, mean of {TRAIN_WINDOW}")
    return _table(columns, rows) + "\n\n" + _values_at(run, "loss", LOSS_STEPS, ".4f")


def evaluation(run: Run) -> str:
    rows = [
        (step, _number(train), _number(validation), _number(gap, "+.4f"))
        for step, train, validation, gap in _evaluations(run)
    ]
    note = (
        f"\n\nTraining loss: mean of the last {TRAIN_WINDOW} steps, with dropout on if the model has any. Validation "
        "is without dropout and of this very step, so while the loss falls fast a gap below zero is no error."
    )
    return _table(("step", "training loss", "validation loss", "gap"), rows) + (note if rows else "")


def gradient_norms(run: Run) -> str:
    _, total = run.series("train", "grad_norm")
    if not len(total):
        return NO_DATA
    names = ["all", *run.layers]
    rows = []
    for name in names:
        _, norms = run.series("train", "grad_norm" if name == "all" else NORM + name)
        if len(norms):
            rows.append((name, *map(_number, (*np.percentile(norms, (50, 90, 99)), norms.max()))))
    counts = [(f"> {t:,}", (total > t).sum(), f"{(total > t).mean():.1%}") for t in SPIKE_THRESHOLDS]
    worst = [(step, _number(norm), layer, _number(share)) for step, norm, layer, share in _worst_steps(run)]
    return "\n\n".join(
        [
            "Before the clip.",
            _table(("layer", "p50", "p90", "p99", "max"), rows),
            _table(("gradient norm", "steps", "share"), counts),
            "The steps with the largest norms, and the layer that most of each came from:",
            _table(("step", "gradient norm", "layer", "norm of the layer"), worst),
        ]
    )


def attention(run: Run) -> str:
    table = run.tables.get("diagnostics", {})
    layers = forward_order(name.split("/")[1] for name in table if name.startswith("attention_max/"))
    rows = []
    for layer in layers:
        scores = np.array([v for name, v in table.items() if name.startswith(f"attention_max/{layer}/")])
        entropy = np.array([v for name, v in table.items() if name.startswith(f"attention_entropy/{layer}/")])
        head = int(scores[:, -1].argmax())
        lowest = (entropy[:, 0].min(), entropy[:, -1].min()) if entropy.size else (math.nan, math.nan)
        rows.append((layer, *map(_number, (scores[:, 0].max(), scores[:, -1].max())), head, *map(_number, lowest)))
    columns = ("layer", "largest score, first", "last", "in head", "lowest entropy (nats), first", "last")
    return _table(columns, rows)


def learning_rate(run: Run) -> str:
    return _values_at(run, "learning_rate", LEARNING_RATE_STEPS, ".4g")


def timing(run: Run) -> str:
    rows = [
        (name, len(each), *map(_number, _phase_figures(each)), _duration(total)) for name, each, total in _phases(run)
    ]
    first_step, step_ms = run.series("train", "step_ms")
    first = ""
    if len(first_step) and first_step[0] == 1:
        first = f"\n\nThe first step, compilation included, took {_number(step_ms[0])} ms."
    columns = ("phase", "measured", "median, ms", "p90", "max", "in all")
    note = "\n\nThe data wait is part of the step. Steps and data wait are means over a logging interval."
    return _table(columns, rows) + (first + note if rows else "")


def throughput(run: Run) -> str:
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
    return _facts(rows)


def samples(run: Run) -> str:
    steps = sorted({sample["step"] for sample in run.samples})
    if not steps:
        return NO_DATA
    before = [[step for step in steps if step <= checkpoint.step][-1:] for checkpoint in run.checkpoints]
    shown = sorted({steps[0], steps[-1], *itertools.chain(*before)})
    parts = []
    for step in _spread(shown, SAMPLE_STEPS_SHOWN):
        for sample in run.samples:
            if sample["step"] == step:
                parts.append(f"**Step {step:,}**, {_inline(sample['prompt'])}\n\n{_fenced(sample['text'])}")
    return "\n\n".join(parts)


def sample_quality(run: Run) -> str:
    steps = sorted({sample["step"] for sample in run.samples})
    rows = []
    for step in _spread(steps, 20):
        quality = text_statistics([sample for sample in run.samples if sample["step"] == step])
        ended = quality["ended"]
        rows.append(
            (
                step,
                f"{quality['tokens']:.0f}",
                _number(quality["distinct_2"], ".2f"),
                _number(quality["repetition"], ".2f"),
                "not known" if ended is None else f"{ended:.0%}",
            )
        )
    note = (
        "\n\ndistinct-2: share of word pairs that are different ones; repetition: share of word triples that the "
        "same text had before; ended: share of texts that the model ended itself. They show collapse and "
        "rambling, not whether a text makes sense."
    )
    return _table(("step", "mean tokens", "distinct-2", "repetition", "ended"), rows) + (note if rows else "")


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


def events(run: Run) -> str:
    rows = [(event["step"], event.get("text", "")) for event in run.events]
    hidden = len(rows) - 40
    more = f"\n\n{hidden:,} more in metrics.jsonl." if hidden > 0 else ""
    return _table(("step", "event"), rows[:40]) + more if rows else "None."


def notes(run: Run) -> str:
    found = [note for rule in NOTES if (note := rule(run))]
    return "\n".join(f"- {note}" for note in found) or NO_DATA


def _note_status(run: Run) -> str | None:
    status = run.info.get("status")
    if status == "running":
        return "The run is still marked as running: this is a view of it so far, or it was killed."
    return f"The run did not reach its end: {status}." if status in ("interrupted", "failed") else None


def _note_start(run: Run) -> str | None:
    """A model that knows nothing has a loss near the logarithm of the vocabulary's size."""
    vocab = run.config.get("model", {}).get("vocab_size")
    steps, loss = run.series("train", "loss")
    if not vocab or not len(loss) or steps[0] != 1 or run.config.get("init_from"):
        return None
    near = abs(loss[0] - math.log(vocab)) < 0.1 * math.log(vocab)
    verdict = "as it should be" if near else "far from it: look at the initialisation"
    return f"The first loss is {loss[0]:.3f}; guessing over {vocab:,} tokens has {math.log(vocab):.3f}: {verdict}."


def _note_nonfinite(run: Run) -> str | None:
    finite = run.tables.get("train", {}).get("finite")
    if finite is None:
        return None
    bad = run.tables["train"]["step"][finite == 0]
    if not len(bad):
        return "Every loss and gradient was finite."
    return f"{len(bad):,} updates were skipped for a non-finite loss or gradient, the first at step {bad[0]:,}."


def _note_spikes(run: Run) -> str | None:
    steps, norms = run.series("train", "grad_norm")
    if not len(norms):
        return None
    count = int((norms > SPIKE).sum())
    if not count:
        largest = norms.argmax()
        return f"No gradient norm was above {SPIKE:g}; the largest is {norms[largest]:.2f}, at step {steps[largest]:,}."
    layers = [layer for _, norm, layer, _ in _worst_steps(run, count) if norm > SPIKE]
    often = max(set(layers), key=layers.count)
    where = f"most often from {often} ({layers.count(often):,})" if often else "layers not recorded"
    return f"Gradient norms above {SPIKE:g}: {count:,} ({count / len(norms):.1%} of the steps), {where}."


def _note_clipping(run: Run) -> str | None:
    clip = run.config.get("optimizer", {}).get("clip_norm")
    _, norms = run.series("train", "grad_norm")
    if not clip or not len(norms):
        return None
    return f"The clip at {clip:g} acted on {(norms > clip).mean():.1%} of the steps."


def _note_progress(run: Run) -> str | None:
    _, loss = run.series("train", "loss")
    part = len(loss) // 10
    if part < 10:
        return None
    before, after = loss[-2 * part : -part], loss[-part:]
    change = after.mean() - before.mean()
    # Standard error of the difference of the two means: what chance alone would move them by.
    noise = math.sqrt((before.var() + after.var()) / part)
    if change < -2 * noise:
        return f"Still improving: the loss fell by {-change:.4f} from the last but one to the last tenth of the steps."
    if change > 2 * noise:
        return f"Getting worse: the loss rose by {change:.4f} from the last but one to the last tenth of the steps."
    return f"Training loss has levelled off (change {change:+.4f} over the last tenth, noise {noise:.4f})."


def _note_overfitting(run: Run) -> str | None:
    rows = [row for row in _evaluations(run) if not math.isnan(row[3])]  # step 0 has no training loss
    if len(rows) < 3:
        return None
    best = min(rows, key=lambda row: row[2])
    last = rows[-1]
    gap = f"the gap went from {rows[0][3]:+.3f} to {last[3]:+.3f}"
    if last[2] > 1.01 * best[2]:
        return f"Overfitting: validation loss was best at step {best[0]:,} ({best[2]:.4f}), now {last[2]:.4f}; {gap}."
    return f"No overfitting: validation loss {last[2]:.4f}, best {best[2]:.4f} at step {best[0]:,}; {gap}."


def _note_attention(run: Run) -> str | None:
    table = run.tables.get("diagnostics", {})
    scores = {name: v[-1] for name, v in table.items() if name.startswith("attention_max/")}
    cap = run.config.get("model", {}).get("soft_cap")
    if not scores or not cap:
        return None
    name = max(scores, key=scores.get)
    where = f"{'beyond' if scores[name] > cap else 'below'} the soft cap of {cap:g}"
    return f"The largest attention score is {scores[name]:.1f} ({name.split('/', 1)[1]}), {where}."


def _note_data_wait(run: Run) -> str | None:
    _, data = run.series("train", "data_ms")
    _, step = run.series("train", "step_ms")
    if not len(data) or not len(step):
        return None
    share = np.median(data) / np.median(step)
    verdict = "raise config.data.prefetch" if share > 0.1 else "the input pipeline keeps up"
    return f"Waiting for data is {share:.1%} of a step: {verdict}."


def _note_speed(run: Run) -> str | None:
    steps, step = run.series("train", "step_ms")
    steady, slow = steps[1:], step[1:] > 2 * np.median(step[1:]) if len(step) > 1 else np.empty(0, bool)
    if not slow.any():
        return None
    where = ", ".join(f"{s:,}" for s in steady[slow][:5])
    return f"{slow.sum():,} of {len(slow):,} logging intervals took over twice the median step (at steps {where})."


NOTES: tuple[Callable[[Run], str | None], ...] = (
    _note_status,
    _note_start,
    _note_nonfinite,
    _note_spikes,
    _note_clipping,
    _note_progress,
    _note_overfitting,
    _note_attention,
    _note_data_wait,
    _note_speed,
)

SECTIONS: dict[str, Callable[[Run], str]] = {
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


def _evaluations(run: Run) -> Iterable[tuple[int, float, float, float]]:
    """Step, training loss around it, validation loss and their gap."""
    steps, loss = run.series("train", "loss")
    for step, validation in zip(*run.series("validation", "loss"), strict=True):
        window = loss[(steps > step - TRAIN_WINDOW) & (steps <= step)]
        train = window.mean() if len(window) else math.nan
        yield int(step), train, validation, validation - train


def _worst_steps(run: Run, count: int = 5) -> list[tuple[int, float, str, float]]:
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


def _phases(run: Run) -> Iterable[tuple[str, np.ndarray, float]]:
    """Name, milliseconds of each measurement and seconds in all, of what the run spent its time on."""
    logged, step_ms = run.series("train", "step_ms")
    data_steps, data_ms = run.series("train", "data_ms")
    if len(step_ms):
        yield "step", step_ms, float(step_ms @ np.diff(logged, prepend=0)) / 1e3
    if len(data_ms):
        yield "data wait", data_ms, float(data_ms @ np.diff(data_steps, prepend=0)) / 1e3
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


def _phase_figures(milliseconds: np.ndarray) -> tuple[float, float, float]:
    return (*np.percentile(milliseconds, (50, 90)), milliseconds.max())


def _values_at(run: Run, name: str, steps: Sequence[int], form: str) -> str:
    values = dict(zip(*run.series("train", name), strict=True))
    rows = [(step, format(values[step], form)) for step in steps if step in values]
    return _table(("step", name.replace("_", " ")), rows)


def _trailing_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the last TRAIN_WINDOW values at each place; +inf until there are as many."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    means = np.full(len(values), math.inf)
    means[TRAIN_WINDOW - 1 :] = (sums[TRAIN_WINDOW:] - sums[:-TRAIN_WINDOW]) / TRAIN_WINDOW
    return means


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A list of what is known."""
    known = [f"- {name}: {value}" for name, value in rows if value not in (None, "", {})]
    return "\n".join(known) or NO_DATA


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return NO_DATA
    cells = [[f"{cell:,}" if isinstance(cell, int | np.integer) else _inline(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *cells))


def _inline(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _fenced(text: str) -> str:
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _number(value: float | None, form: str | None = None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return format(value, form or (".3g" if abs(value) < 0.01 else ".4f" if abs(value) < 100 else ",.1f"))


def _size(count: float | None) -> str | None:
    if count is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{seconds / 60:.1f} min"


def main(argv: Sequence[str]) -> None:
    print(make_report(load_run(argv[1])), end="")


if __name__ == "__main__":
    run_main(main, arguments=["WORKDIR"])
