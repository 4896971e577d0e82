"""A run as it goes on: its metrics and samples, each line read once, and what follows from them. Nothing is written."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.runs.alerts import Alert, Alerts
from gpt_jax.runs.info import read_config
from gpt_jax.runs.metrics import METRICS_FILE, SAMPLES_FILE
from gpt_jax.runs.status import RUNNING, read_status
from gpt_jax.storage.json_file import parse_json

_ETA_STEPS = 500  # the last steps that tell how long one takes
COMPILING = 2  # first steps after a start, which do not


class LineFile:
    """A file of JSON lines that grows: gives each whole line once, and all of them again where it was replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._number = path, 0, 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether it begins anew, and the objects of the lines since the last call."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                anew = found.st_ino != self._number or found.st_size < self._at
                if anew:
                    self._at, self._number = 0, found.st_ino
                file.seek(self._at)
                text = file.read()
        except OSError:  # it is not there yet
            return False, []
        end = text.rfind(b"\n") + 1  # half a line is read when it is whole
        self._at += end
        return anew, list(_objects(text[:end]))


def _objects(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            record = parse_json(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            continue  # `report` tells of damage
        yield record


class FollowedRun:
    """A run by what is known of it now.

    train, validation, sample: its last lines; measured: the last that has tokens_per_second. losses: of all steps.
    best: the lowest validation loss and its step. alerts: all of them, by step. problem: why its files cannot be read.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self._metrics, self._samples = LineFile(workdir / METRICS_FILE), LineFile(workdir / SAMPLES_FILE)
        self.status, self.info, self.config, self.problem = "", {}, {}, ""
        self._forget()
        self.sample: dict[str, Any] = {}

    def _forget(self) -> None:
        self.train: dict[str, Any] = {}
        self.measured: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.best: tuple[float, int] | None = None
        self.losses: list[float] = []
        self.alerts: list[Alert] = []
        self._rules = Alerts()
        self._times: deque[tuple[int, float]] = deque(
            maxlen=_ETA_STEPS
        )  # of the steps since the last start, when each came
        self._started = 0  # steps of it that have come

    def read(self) -> None:
        """Takes in what was written since the last call."""
        try:
            self.status, self.info = read_status(self.workdir)
            self.config, self.problem = read_config(self.workdir), ""
        except UserError as error:
            self.status, self.problem = "damaged", str(error)
        anew, lines = self._metrics.read()
        if anew:
            self._forget()
        for line in lines:
            self._take(line)
        for sample in self._samples.read()[1]:
            self.sample = sample

    def _take(self, line: dict[str, Any]) -> None:
        step, split = line["step"], line.get("split", "")
        self.alerts += self._rules.see(step, split, line)
        if split == "train":
            self.train = line
            self.losses.append(_number(line.get("loss")))
            if "tokens_per_second" in line:
                self.measured = line
            self._started += 1
            if self._started > COMPILING:
                self._times.append((step, _number(line.get("time"))))
        elif split == "validation":
            self.validation = line
            loss = _number(line.get("loss"))
            if self.best is None or loss < self.best[0]:
                self.best = loss, step
        elif split == "event" and str(line.get("text", "")).startswith("resumed"):
            self._times.clear()
            self._started = 0

    @property
    def step(self) -> int:
        """The last step; 0 before the first."""
        return self.train.get("step", 0)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the last step, by the wall time of the last steps, evaluations and samples between them included;
        None if it is not running, or for want of steps."""
        total, known = self.config.get("num_steps"), self._times
        if self.status != RUNNING or not total or len(known) < 2 or known[-1][0] <= known[0][0]:
            return None
        (first, begun), (last, now) = known[0], known[-1]
        return max(0, total - last) * (now - begun) / (last - first)


def _number(value: Any) -> float:
    """A number, as metrics.jsonl spells it; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
