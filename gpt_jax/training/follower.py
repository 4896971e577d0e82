"""Stands in for a run's folder in a process beside process 0: it writes nothing, and has nothing to read.

All processes run the same loop, in which what is computed together comes in the same order everywhere; process 0 alone
keeps what comes of it.
"""

from typing import Any


class SilentWriter:
    """A `MetricsWriter` that drops all."""

    def write(self, *_: Any, **__: Any) -> None: ...

    sample = alert = flush = check_in_place = write


class SilentInfo:
    """A `RunInfo` that keeps nothing."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def update(self, *_: Any, **__: Any) -> None: ...

    finish = update


class SilentCheckpointer:
    """A `Checkpointer` without checkpoints: those of the run are process 0's."""

    newest = None

    def check(self, *_: Any, **__: Any) -> None: ...

    save = mark = wait = check

    def would_be_best(self, validation_loss: float) -> bool:
        return False


def silent(line: str) -> None:
    """A `Log` that says nothing."""
