"""TensorBoard's event files, written where the caller stands.

Not by tensorboardX's `SummaryWriter`: its thread dies of the first error, on a full disk for one, and whoever writes
next then waits for ever.
"""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]  # made by protobuf
from tensorboardX.summary import scalar, text

_FLUSH_EVERY = 30  # seconds: how late a TensorBoard that looks on may be


class EventFile:
    """One event file. All methods raise OSError where the disk does."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Begins a file, from which readers take that no event of `purge_step` or later in older files counts."""
        folder.mkdir(exist_ok=True)
        self._flushed = time.monotonic()
        # Its own names differ by the second only: a quick restart would overwrite the file before.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)), time.time())

    def add_scalar(self, name: str, value: float, step: int, now: float) -> None:
        self._write(Event(step=step, summary=scalar(name, value)), now)

    def add_text(self, name: str, value: str, step: int, now: float) -> None:
        self._write(Event(step=step, summary=text(name, value)), now)

    def flush(self) -> None:
        """Has the operating system put everything on the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event, now: float) -> None:
        event.wall_time = now
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()
