"""The metrics and samples of a run, a line of JSON each.

`metrics.jsonl` has one JSON object a line: {"step", "split", "time" in unix seconds, and scalars}. The splits are

- train, every step: loss, grad_norm, grad_norm/LAYER, param_norm, update_norm, learning_rate, finite. At logging steps
  also step_ms and data_ms (wall time a step; the data wait is part of it), tokens_per_second, mfu, eta_seconds
  (but where a step compiled), host_peak_bytes and device_peak_bytes (the most memory so far), and PHASE_ms: the whole
  time spent in another phase (eval, sample, checkpoint, ...) since the logging step before. Of several Vulkan devices
  exchange_ms (a step's exchange after its gradient), exchange_wait_ms (for other processes) and exchange_bytes.
- validation: loss, best, seconds; of several sources also "loss of SOURCE", of which loss is the mean by weight.
- diagnostics: attention_max/LAYER/HEAD and attention_entropy/LAYER/HEAD (nats).
- event: text; an alert that follows from no metric has its rule too. A start ("started", "resumed from STEP") has
  start_seconds too, from the process's start to the loop, and lost_steps and lost_seconds if records of later steps
  were dropped for it; an end: PHASE_ms since the last log line.

`samples.jsonl` has {"step", "prompt", "text", "tokens", "seconds", "ended"} a line. JSON knows no NaN and no infinity:
on disk they are the strings "NaN", "Infinity" and "-Infinity", which `float` reads back. Both files may end in half a
line, of a write that a crash or kill cut short; readers leave it out.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from gpt_jax.errors import UserError
from gpt_jax.storage.files import StorageError, replacing, writing
from gpt_jax.storage.json_file import parse_json

METRICS_FILE, SAMPLES_FILE, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"

LOSS_OF = "loss of "  # before the name of a source


class Tracker(Protocol):
    """A place that shows a run beside its folder. `now`: in unix seconds."""

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None: ...

    def text(self, step: int, name: str, text: str, now: float) -> None: ...

    def alert(self, step: int, rule: str, text: str, now: float) -> None: ...


class MetricsWriter:
    """Appends the metrics and samples of a run to its folder, as JSON lines, and hands them to trackers.

    Every line reaches the operating system before the call returns, so a killed process loses nothing but the line
    it was writing. TensorBoard and other trackers get everything but the train lines between logging steps (those
    without step_ms), which would cost more than the training step of a small model.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int | None = None,
        tensorboard: bool = True,
        *,
        settings: Mapping[str, Any] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Opens the files, and drops from them what a run that stood at `resume_step` has not seen yet.

        Args:
          workdir: run folder; made if it is not there.
          resume_step: the last step whose lines stay; None: the run starts afresh and no line stays.
          tensorboard: whether to write event files as well.
          settings: the run's, for them.
          trackers: more that shows the run; whoever made them closes them.

        Raises:
          UserError: a line other than the last of an existing file is damaged.
          StorageError: a file cannot be written.
        """
        self._folder = Path(workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        last_kept = -1 if resume_step is None else resume_step
        self._metrics = _open_after(self._folder / METRICS_FILE, last_kept)
        self._samples = _open_after(self._folder / SAMPLES_FILE, last_kept)
        self._events = None
        self._trackers = list(trackers)
        if tensorboard:
            from gpt_jax.runs.tensorboard import EventFile

            self._events = EventFile(self._folder / TENSORBOARD, last_kept + 1, settings or {})
            self._trackers.append(self._events)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, split: str, scalars: Mapping[str, Any]) -> None:
        """Appends one line. Values are numbers or bools, Python's or NumPy's 0-d; of an event also texts."""
        now = time.time()
        values = {name: value.item() if hasattr(value, "item") else value for name, value in scalars.items()}
        _write_line(self._metrics, {"step": step, "split": split, "time": now, **values})
        if not self._trackers or (split == "train" and "step_ms" not in values):
            return
        numbers = {f"{split}/{name}": value for name, value in values.items() if not isinstance(value, str)}
        for tracker in self._trackers:
            if numbers:
                tracker.scalars(step, numbers, now)
            if "text" in values:
                tracker.text(step, f"{split}/text", values["text"], now)

    def alert(self, step: int, rule: str, text: str) -> None:
        """Shows an alert in all trackers; the lines of metrics have it already."""
        for tracker in self._trackers:
            tracker.alert(step, rule, text, time.time())

    def sample(
        self, step: int, prompt: str, text: str, *, tokens: int, seconds: float, ended: bool | None = None
    ) -> None:
        """Appends one generated answer.

        Args:
          tokens: how many were generated.
          seconds: that it took.
          ended: whether the model ended it by itself, not the limit; None: not known.
        """
        sample = {"prompt": prompt, "text": text, "tokens": tokens, "seconds": seconds, "ended": ended}
        _write_line(self._samples, {"step": step, **sample})
        for tracker in self._trackers:
            tracker.text(step, f"sample/{prompt}", text, time.time())

    def flush(self) -> None:
        """Has the operating system put every line written so far on the disk."""
        self.check_in_place()
        for file in (self._metrics, self._samples):
            with writing(file.name):
                os.fsync(file.fileno())
        if self._events is not None:
            self._events.flush()

    def check_in_place(self) -> None:
        """Raises StorageError if the files are no longer where they were opened: what is written then is lost."""
        for file in (self._metrics, self._samples):
            with writing(file.name):
                if not os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
                    raise StorageError(f"cannot write {file.name}: another file stands there now")

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        if self._metrics.closed:
            return
        with contextlib.ExitStack() as stack:  # all of it, even if one fails
            if self._events is not None:
                stack.callback(self._events.close)
            stack.callback(_close, self._metrics)
            stack.callback(_close, self._samples)
            self.flush()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file. A damaged last line is left out.

    Raises:
      UserError: another line is damaged.
    """
    return (record for _, record in _whole_lines(path))


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line as it stands and as an object."""
    if not path.exists():
        return
    damaged = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if damaged is not None:
                raise UserError(f"{path}: line {damaged} is no JSON object; remove the line")
            try:
                record = parse_json(line)
                record["step"] = int(record["step"])
                if not 0 <= record["step"] < 2**63:
                    raise ValueError
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                damaged = number
                continue
            if line.endswith("\n"):
                yield line, record


def _write_line(file: TextIO, record: dict[str, Any]) -> None:
    try:
        line = json.dumps(record, allow_nan=False)
    except ValueError:
        line = json.dumps({name: _spell_nonfinite(value) for name, value in record.items()}, allow_nan=False)
    with writing(file.name):
        file.write(line + "\n")


def _close(file: TextIO) -> None:
    with writing(file.name):  # what a full disk did not take yet
        file.close()


def _spell_nonfinite(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _open_after(path: Path, last_kept: int) -> TextIO:
    """Opens a JSON-lines file to append to, without its lines of later steps than `last_kept`."""
    if path.exists():
        with writing(path), replacing(path) as kept:
            kept.writelines(line for line, record in _whole_lines(path) if record["step"] <= last_kept)
    with writing(path):
        return open(path, "a", buffering=1, encoding="utf-8")
