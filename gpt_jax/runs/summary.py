"""A run in a line: what a list of runs shows, from its small files and the end of its metrics."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.runs.info import CONFIG_FILE, INFO_FILE, read_config
from gpt_jax.runs.metrics import METRICS_FILE
from gpt_jax.runs.status import read_status
from gpt_jax.runs.tags import read_tags
from gpt_jax.storage.checkpoint_files import CHECKPOINTS, best_step, read_losses
from gpt_jax.storage.json_file import parse_json

DAMAGED = "damaged"  # the status of a run whose files cannot be read
_ENDS = (2**16, 2**22, 2**62)  # bytes at the end of the metrics in which the last step is looked for


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run, as it stands. What is not known is None.

    run: its folder's name. loss: of the last training step. validation_loss: the lowest of its checkpoints, of which
    best_step is the step. written: when a metric came last, in unix seconds. problem: why it is damaged, one line.
    """

    run: str
    folder: str
    status: str
    id: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    best_step: int | None = None
    tokens_per_second: float | None = None
    parameters: int | None = None
    started: str | None = None
    elapsed_seconds: float | None = None
    written: float | None = None
    backend: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str | None = None


def is_run(folder: Path) -> bool:
    """Whether a folder has the files of a run."""
    return any((folder / name).is_file() for name in (INFO_FILE, CONFIG_FILE))


def summarise(folder: Path) -> Summary:
    """Reads a run's summary from its folder, of a run that may be going on. Never raises for what is in a file."""
    try:
        status, info = read_status(folder)
        config, tags = read_config(folder), read_tags(folder)
        losses = read_losses(folder / CHECKPOINTS) if (folder / CHECKPOINTS).is_dir() else {}
    except (UserError, OSError) as error:  # the latter: it is just being removed
        return Summary(folder.name, str(folder), DAMAGED, written=_written(folder), problem=str(error))
    best = best_step(losses)
    last = last_step(folder / METRICS_FILE)
    return Summary(
        run=folder.name,
        folder=str(folder),
        status=status,
        id=info.get("run_id"),
        name=info.get("name") or config.get("name"),
        tags=tuple(tags),
        step=last.get("step"),
        num_steps=config.get("num_steps"),
        loss=last.get("loss"),
        validation_loss=None if best is None else losses[best],
        best_step=best,
        tokens_per_second=last.get("tokens_per_second"),
        parameters=info.get("parameters"),
        started=info.get("started"),
        elapsed_seconds=info.get("elapsed_seconds"),
        written=_written(folder),
        backend=info.get("backend"),
        config=config,
    )


def last_step(metrics: Path) -> dict[str, Any]:
    """Step and loss of the last training line of a file of metrics, and the last throughput near it; {} if none.

    Only the end of the file is read, and what is no whole line there is left out.
    """
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for end in _ENDS:
                file.seek(max(0, size - end))
                lines = file.read(min(size, end)).split(b"\n")[:-1]  # what is behind the last line's end is half a line
                if found := _last_step(lines[1:] if size > end else lines):
                    return found
                if size <= end:
                    break
    except OSError:  # it is not there yet, or just being replaced
        pass
    return {}


def _last_step(lines: list[bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in reversed(lines):
        if found and b"tokens_per_second" not in line:
            continue
        try:
            record = parse_json(line)
            if record["split"] != "train":
                continue
            if not found:
                found = {"step": int(record["step"]), "loss": _number(record["loss"])}
            if "tokens_per_second" in record:
                return {**found, "tokens_per_second": _number(record["tokens_per_second"])}
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            continue
    return found


def _number(value: Any) -> float | None:
    number = float(value)  # metrics spell NaN and infinities as text
    return None if math.isnan(number) else number


def _written(folder: Path) -> float | None:
    for name in (METRICS_FILE, INFO_FILE, CONFIG_FILE):
        with contextlib.suppress(OSError):
            return (folder / name).stat().st_mtime
    return None
