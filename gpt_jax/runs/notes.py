"""Notes of a report: rules, each of which says one thing about a run in a sentence, or nothing."""

import math
from collections.abc import Callable

import numpy as np

from gpt_jax.runs.analysis import evaluations, worst_steps
from gpt_jax.runs.load import SPIKE, RunData
from gpt_jax.runs.status import CRASHED, RUNNING
from gpt_jax.runs.wall_time import compiled


def _note_status(run: RunData) -> str | None:
    status = run.info.get("status")
    if status == RUNNING:
        return "The run is going on: this is a view of it so far."
    if status == CRASHED:
        return "The run crashed: its process is gone and did not say why; gpt_jax.main with --workdir goes on."
    if early := run.info.get("stopped_early"):
        return f"The run ended early: {early}."
    return f"The run did not reach its end: {status}." if status in ("interrupted", "failed") else None


def _note_start(run: RunData) -> str | None:
    """A model that knows nothing has a loss near the logarithm of the vocabulary's size."""
    vocab = run.config.get("model", {}).get("vocab_size")
    steps, loss = run.series("train", "loss")
    if not vocab or not len(loss) or steps[0] != 1 or run.config.get("init_from"):
        return None
    near = abs(loss[0] - math.log(vocab)) < 0.1 * math.log(vocab)
    verdict = "as it should be" if near else "far from it: look at the initialisation"
    return f"The first loss is {loss[0]:.3f}; guessing over {vocab:,} tokens has {math.log(vocab):.3f}: {verdict}."


def _note_nonfinite(run: RunData) -> str | None:
    finite = run.tables.get("train", {}).get("finite")
    if finite is None:
        return None
    bad = run.tables["train"]["step"][finite == 0]
    if not len(bad):
        return "Every loss and gradient was finite."
    return f"{len(bad):,} updates were skipped for a non-finite loss or gradient, the first at step {bad[0]:,}."


def _note_spikes(run: RunData) -> str | None:
    steps, norms = run.series("train", "grad_norm")
    if not len(norms):
        return None
    count = int((norms > SPIKE).sum())
    if not count:
        largest = norms.argmax()
        return f"No gradient norm was above {SPIKE:g}; the largest is {norms[largest]:.2f}, at step {steps[largest]:,}."
    layers = [layer for _, norm, layer, _ in worst_steps(run, count) if norm > SPIKE]
    often = max(set(layers), key=layers.count)
    where = f"most often from {often} ({layers.count(often):,})" if often else "layers not recorded"
    return f"Gradient norms above {SPIKE:g}: {count:,} ({count / len(norms):.1%} of the steps), {where}."


def _note_clipping(run: RunData) -> str | None:
    clip = run.config.get("optimizer", {}).get("clip_norm")
    _, norms = run.series("train", "grad_norm")
    if not clip or not len(norms):
        return None
    return f"The clip at {clip:g} acted on {(norms > clip).mean():.1%} of the steps."


def _note_progress(run: RunData) -> str | None:
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


def _note_overfitting(run: RunData) -> str | None:
    rows = [row for row in evaluations(run) if not math.isnan(row[3])]  # step 0 has no training loss
    if len(rows) < 3:
        return None
    best = min(rows, key=lambda row: row[2])
    last = rows[-1]
    gap = f"the gap went from {rows[0][3]:+.3f} to {last[3]:+.3f}"
    if last[2] > 1.01 * best[2]:
        return f"Overfitting: validation loss was best at step {best[0]:,} ({best[2]:.4f}), now {last[2]:.4f}; {gap}."
    return f"No overfitting: validation loss {last[2]:.4f}, best {best[2]:.4f} at step {best[0]:,}; {gap}."


def _note_attention(run: RunData) -> str | None:
    table = run.tables.get("diagnostics", {})
    scores = {name: v[-1] for name, v in table.items() if name.startswith("attention_max/")}
    cap = run.config.get("model", {}).get("soft_cap")
    if not scores or not cap:
        return None
    name = max(scores, key=scores.get)
    where = f"{'beyond' if scores[name] > cap else 'below'} the soft cap of {cap:g}"
    return f"The largest attention score is {scores[name]:.1f} ({name.split('/', 1)[1]}), {where}."


def _note_data_wait(run: RunData) -> str | None:
    _, data = run.series("train", "data_ms")
    _, step = run.series("train", "step_ms")
    if not len(data) or not len(step):
        return None
    share = np.median(data) / np.median(step)
    verdict = "raise config.data.prefetch" if share > 0.1 else "the input pipeline keeps up"
    return f"Waiting for data is {share:.1%} of a step: {verdict}."


def _note_speed(run: RunData) -> str | None:
    steps, step = run.series("train", "step_ms")
    usual = ~compiled(run, steps)
    steady, step = steps[usual], step[usual]
    slow = step > 2 * np.median(step) if len(step) else np.empty(0, bool)
    if not slow.any():
        return None
    where = ", ".join(f"{s:,}" for s in steady[slow][:5])
    return f"{slow.sum():,} of {len(slow):,} logging intervals took over twice the median step (at steps {where})."


NOTES: tuple[Callable[[RunData], str | None], ...] = (
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
