"""Costs and times of a compiled function, dispatch by dispatch, as data, tables and traces."""

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The cost of a call. flops: useful floating-point operations, roughly; bytes: that dispatches read and write."""

    flops: int
    bytes: int
    dispatches: int
    barriers: int
    arena_bytes: int
    constant_bytes: int


@dataclass(frozen=True)
class Profile:
    """Device time of a call's dispatches, in order: (label, scope, seconds)."""

    rows: tuple[tuple[str, str, float], ...]

    @property
    def seconds(self) -> float:
        return sum(row[2] for row in self.rows)

    def by_scope(self, depth: int = 1) -> dict[str, float]:
        """Seconds by the first `depth` names of the scopes, the slowest first; '' has none."""
        found: Counter[str] = Counter()
        for _, scope, seconds in self.rows:
            found["/".join(scope.split("/")[:depth])] += seconds  # pyrefly: ignore[unsupported-operation]
        return dict(found.most_common())

    def by_phase(self) -> dict[str, float]:
        """Seconds 'forward' and 'backward', by the marks of JAX on what it differentiates, and of the rest by the
        first name of the scope, the slowest first; '' has none, or several."""
        found: Counter[str] = Counter()
        for _, scope, seconds in self.rows:
            found[phase_of(scope)] += seconds  # pyrefly: ignore[unsupported-operation]
        return dict(found.most_common())

    def write_trace(self, path: str | Path) -> None:
        """A trace for ui.perfetto.dev or chrome://tracing: the dispatches, one after another, and above each what
        of its scope it shares with its neighbours: the phase, and in it the layer."""
        events: list[dict[str, Any]] = [
            {
                "ph": "M",
                "name": "process_name",
                "pid": 0,
                "args": {"name": "device time of one call, dispatch by dispatch"},
            },
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "phase, layer, dispatch"}},
        ]
        rows = [(label, scope, round(1e9 * seconds)) for label, scope, seconds in self.rows]
        start = 0
        for phase, of_phase in itertools.groupby(rows, lambda row: phase_of(row[1])):
            of_phase = list(of_phase)
            events.append(_slice(phase or "other", start, sum(row[2] for row in of_phase)))
            for layer, of_layer in itertools.groupby(of_phase, lambda row: layer_of(row[1])):
                of_layer = list(of_layer)
                if layer:
                    events.append(_slice(layer, start, sum(row[2] for row in of_layer)))
                for label, scope, duration in of_layer:
                    events.append(_slice(label, start, duration) | {"cat": scope, "args": {"scope": scope}})
                    start += duration
        Path(path).write_text(json.dumps({"traceEvents": events}))

    def __str__(self) -> str:
        lines = [f"{1e3 * self.seconds:10.3f} ms in {len(self.rows)} dispatches"]
        lines += [f"{1e3 * seconds:10.3f} ms  {scope}: {label}" for label, scope, seconds in self.rows]
        return "\n".join(lines)


def phase_of(scope: str) -> str:
    """'forward' or 'backward', by the marks of JAX on what it differentiates; of the rest the first name."""
    first = scope.split("/")[0]
    if "transpose(" in first:
        return "backward"
    return "forward" if "jvp(" in first else first


def layer_of(scope: str) -> str:
    """The name below the phase: of a Flax model, `jvp(GPT.losses)/GPT/h_0/qkv`, the module h_0, or GPT for what is the
    model's own; '' if there is none."""
    phase, *names = scope.split("/")
    if len(names) > 1 and names[0] in phase:
        del names[0]
    return names[0] if names else ""


def _slice(name: str, start: int, duration: int) -> dict[str, Any]:
    """An event from nanoseconds, in us as the format has them.

    Perfetto cuts each number to whole nanoseconds, and drops a slice that ends after the one around it.
    """
    return {"name": name, "ph": "X", "ts": _microseconds(start), "dur": _microseconds(duration), "pid": 0, "tid": 0}


def _microseconds(nanoseconds: int) -> float:
    """The least number that is cut to so many whole nanoseconds and not to one less."""
    found = nanoseconds / 1e3
    return found if int(found * 1e3) == nanoseconds else math.nextafter(found, math.inf)
