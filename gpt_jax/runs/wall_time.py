"""The wall time of a run by what it went to, over all its starts."""

from collections import Counter
from typing import Any

import numpy as np

from gpt_jax.runs.load import RunData

PHASES = {  # by their name in metrics.jsonl; in the order of a run
    "eval": "evaluation",
    "sample": "samples",
    "checkpoint": "checkpoints",
    "diagnostics": "attention statistics",
    "profile": "profile",
}


def wall_time(run: RunData) -> list[tuple[str, float]]:
    """Names and seconds of what the run spent its time on, while a process ran; what took none is left out.

    Steps between a part's last progress line and its end are counted at the median. Of a run of an older version,
    which recorded no starts, the starts and what was lost are not known.
    """
    steps, data, compilation = _steps(run)
    known = {
        "start": sum(number(event, "start_seconds") for event in run.events),
        "compilation": compilation,
        "steps": steps,
        "waiting for data": data,
    }
    spent = _phases(run)
    known |= {name: spent.pop(phase, 0.0) for phase, name in PHASES.items()} | spent
    known["lost to restarts"] = sum(number(event, "lost_seconds") for event in run.events)
    whole = _whole(run)
    if whole is not None:
        known["other"] = whole - sum(known.values())
    return [(name, float(seconds)) for name, seconds in known.items() if seconds > 0]


def elapsed_seconds(run: RunData) -> float | None:
    """Seconds in which a process ran, by run.json, or, where a run that goes on or was killed is ahead of that, by its
    last step."""
    said = run.info.get("elapsed_seconds")
    if not run.last_step:
        return said
    return max(said or 0.0, float(running_seconds(run)[-1]))


def number(record: dict[str, Any], name: str) -> float:
    """A number of a record; 0 if it has none."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else 0.0


def step_times(run: RunData) -> np.ndarray:
    """Milliseconds a step by the progress lines, but for steps that compiled; where no others have a line, by the times
    of the lines of all steps, (N,)."""
    steps, ms = run.series("train", "step_ms")
    times = run.tables["train"]["time"] if len(ms) else np.empty(0)
    if len(times) > 1 and compiled(run, steps).all():
        return 1e3 * np.diff(times)
    return measured(run, "step_ms")


def measured(run: RunData, name: str) -> np.ndarray:
    """The values of progress lines, but for those whose steps compiled; all of them where there are no others."""
    steps, values = run.series("train", name)
    kept = values[~compiled(run, steps)]
    return kept if len(kept) else values


def compiled(run: RunData, steps: np.ndarray) -> np.ndarray:
    """Whether the steps between each line of progress and the one before have the first one of a process, (N,)."""
    before = np.concatenate([np.zeros(1), steps[:-1]]) if len(steps) else steps
    found = np.zeros(len(steps), bool)
    for start in _first_steps(run):
        found |= (before <= start) & (start < steps)
    return found


def _first_steps(run: RunData) -> set[int]:
    """The steps after which a process made its first one."""
    return {event["step"] for event in run.events if str(event.get("text", "")).startswith("resumed")} | {0}


def _starts(run: RunData) -> list[dict[str, Any]]:
    """The starts that say how long they took, by time."""
    known = [event for event in run.events if "start_seconds" in event and number(event, "time") > 0]
    return sorted(known, key=lambda event: event["time"])


def _steps(run: RunData) -> tuple[float, float, float]:
    """Seconds of steps, of their waits for data, and of what the first steps of the parts took longer."""
    logged, step_ms = run.series("train", "step_ms")
    if not len(logged):
        return 0.0, 0.0, 0.0
    median = float(np.median(step_times(run)))
    data_ms = dict(zip(*run.series("train", "data_ms"), strict=True))
    starts = _first_steps(run)
    steps = data = compilation = 0.0
    timed, before = 0, 0
    for step, ms in zip(logged, step_ms, strict=True):
        begin = max((start for start in starts if start < step), default=0)
        count = int(step - max(before, begin))
        first = step == begin + 1
        longer = max(ms - median, 0.0) if first else 0.0
        waited = data_ms.get(step, 0.0) * count
        steps += max(ms * count - longer - waited, 0.0)
        data, compilation = data + waited, compilation + longer
        timed, before = timed + count, step
    return 1e-3 * (steps + median * (run.last_step - timed)), 1e-3 * data, 1e-3 * compilation


def _phases(run: RunData) -> dict[str, float]:
    """Seconds by phase, as the progress lines and the ends of parts say."""
    found: Counter[str] = Counter()
    for name, values in run.tables.get("train", {}).items():
        if name.endswith("_ms") and name not in ("step_ms", "data_ms"):
            found[name.removesuffix("_ms")] += 1e-3 * float(values[np.isfinite(values)].sum())  # pyrefly: ignore[unsupported-operation]
    for event in run.events:
        for name in event:
            if name.endswith("_ms"):
                found[name.removesuffix("_ms")] += 1e-3 * number(event, name)  # pyrefly: ignore[unsupported-operation]
    # A kill may have cost the progress line that would tell of them.
    _, evaluations = run.series("validation", "seconds")
    found["eval"] = max(found["eval"], float(evaluations.sum()))
    found["sample"] = max(found["sample"], sum(sample["seconds"] for sample in run.samples))
    return dict(found)


def _whole(run: RunData) -> float | None:
    """Seconds in which a process ran, from its start to its last record; None: the starts were not recorded."""
    begun = [(number(event, "time"), number(event, "start_seconds")) for event in _starts(run)]
    if not begun:
        return None
    times = [table["time"][np.isfinite(table["time"])] for table in run.tables.values()]
    recorded = np.sort(np.concatenate([*times, [number(event, "time") for event in run.events]]))
    whole = sum(number(event, "lost_seconds") for event in run.events)
    ends = [start for start, _ in begun[1:]] + [np.inf]
    for (start, took), end in zip(begun, ends, strict=True):
        inside = recorded[(recorded >= start) & (recorded < end)]
        whole += took + float(inside[-1] - start)
    return whole


def running_seconds(run: RunData) -> np.ndarray:
    """Seconds from the start of the run to each line of the training table, (N,), without those when no process ran."""
    times = run.tables["train"]["time"]
    starts = _starts(run)
    begin = number(starts[0], "time") - number(starts[0], "start_seconds") if starts else times[0]
    elapsed = times - begin
    for event in starts[1:]:
        at = number(event, "time")
        before = times[times < at]
        if len(before):
            stood = at - number(event, "start_seconds") - before[-1] - number(event, "lost_seconds")
            elapsed[times >= at] -= max(stood, 0.0)
    return elapsed
