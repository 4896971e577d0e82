"""The cost of a compiled function, as planned and as timed."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


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
            found[_phase(scope)] += seconds  # pyrefly: ignore[unsupported-operation]
        return dict(found.most_common())

    def write_trace(self, path: str | Path) -> None:
        """A Chrome trace (chrome://tracing, ui.perfetto.dev) of the dispatches, one after another."""
        events, start = [], 0.0
        for label, scope, seconds in self.rows:
            event = {"name": label, "cat": scope, "ph": "X", "ts": 1e6 * start, "dur": 1e6 * seconds}
            events.append(event | {"pid": 0, "tid": 0, "args": {"scope": scope}})
            start += seconds
        Path(path).write_text(json.dumps({"traceEvents": events}))

    def __str__(self) -> str:
        lines = [f"{1e3 * self.seconds:10.3f} ms in {len(self.rows)} dispatches"]
        lines += [f"{1e3 * seconds:10.3f} ms  {scope}: {label}" for label, scope, seconds in self.rows]
        return "\n".join(lines)


def _phase(scope: str) -> str:
    first = scope.split("/")[0]
    if "transpose(" in first:
        return "backward"
    return "forward" if "jvp(" in first else first
