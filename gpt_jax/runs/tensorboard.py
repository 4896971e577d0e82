"""TensorBoard's event files, written where the caller stands.

Not by tensorboardX's `SummaryWriter`: its thread dies of the first error, on a full disk for one, and whoever writes
next then waits for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_jax.imports import absent
from gpt_jax.storage.files import writing

# For types and places that we do not use: torch alone took 1.7 s of a start, of 7.7.
with absent("torch", "boto3", "comet_ml"):
    from tensorboardX.event_file_writer import EventsWriter

    # Made by protobuf:
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
    from tensorboardX.summary import hparams
    from tensorboardX.summary import scalar as scalar_summary
    from tensorboardX.summary import text as text_summary

_FIGURES = ("validation/loss", "train/loss")  # that runs are compared by
_FLUSH_EVERY = 30  # seconds: how late a TensorBoard that looks on may be


class EventFile:
    """One event file: a `metrics.Tracker`. All methods raise StorageError where the disk fails."""

    def __init__(self, folder: Path, purge_step: int, settings: Mapping[str, Any]) -> None:
        """Begins a file, from which readers take that no event of `purge_step` or later in older files counts.

        settings: the run's, by name; TensorBoard's HPARAMS page sets runs beside each other by them.
        """
        self._folder, self._flushed = folder, time.monotonic()
        with writing(folder):
            folder.mkdir(exist_ok=True)
            # Its own names differ by the second only: a quick restart would overwrite the file before.
            self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        now = time.time()
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)), now)
        if settings:
            experiment, start, _ = hparams(dict(settings), dict.fromkeys(_FIGURES))
            for summary in (experiment, start):
                self._write(Event(summary=summary), now)

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        for name, value in values.items():
            self._write(Event(step=step, summary=scalar_summary(name, value)), now)

    def text(self, step: int, name: str, text: str, now: float) -> None:
        self._write(Event(step=step, summary=text_summary(name, text)), now)

    def alert(self, step: int, rule: str, text: str, now: float) -> None:
        self.text(step, f"alert/{rule}", text, now)

    def flush(self) -> None:
        """Has the operating system put everything on the disk."""
        with writing(self._folder):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()

    def _write(self, event: Event, now: float) -> None:
        event.wall_time = now
        with writing(self._folder):
            self._writer.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()
