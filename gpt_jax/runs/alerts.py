"""Alerts about a run, by rules over its metrics: one line each, as soon as a rule finds it.

    rule          says something when
    non-finite    an update was skipped for a loss or gradient that is not finite; of several in a row the first
    spike         the gradient norm is over 10 times its mean of late, or the loss over 1.5 times
    loss up       the mean loss of 500 steps is above that of the 500 before, by more than three standard errors
    gap           the validation loss is 2 % above the lowest so far, while the training loss is below what it was there
    throughput    tokens a second are below half of what is usual for the run; the first measurement after a start,
                  which has the compilation in it, does not count
    disk          the disk has no room for two more checkpoints

A rule that has spoken is silent until what it found is over; a spike is told once in 100 steps. A mean of late is
exponential, over some 100 steps, and rules need as many before they speak. Everything is a function of the metrics in
their order: `Alerts` sees each line once, whoever reads it: the trainer, the watch or the report.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gpt_jax.runs.formats import format_size

NON_FINITE = "non-finite"
RECENT = 100  # steps of a mean of late, and between two spikes that are told
NORM_SPIKE, LOSS_SPIKE = 10.0, 1.5  # times the mean of late
TREND = 500  # steps whose mean losses are compared
TREND_ERRORS = 3.0  # standard errors of the difference that count as a rise
GAP = 1.02  # times the lowest validation loss
SLOW, USUAL = 0.5, 10  # of the usual throughput; measurements that make it
CHECKPOINTS_LEFT = 2


class Alert(NamedTuple):
    step: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"alert at step {self.step:,}, {self.rule}: {self.text}"


class _Mean:
    """A mean of the last values, exponential once there are RECENT of them."""

    def __init__(self) -> None:
        self.count, self.value = 0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, RECENT)

    @property
    def ready(self) -> bool:
        return self.count >= RECENT


class _Block:
    """Mean and variance of the losses of TREND steps, as they come (Welford)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        change = value - self.mean
        self.mean += change / self.count
        self.squares += change * (value - self.mean)

    @property
    def error(self) -> float:
        """Variance of the mean."""
        return self.squares / self.count**2


class Alerts:
    """The rules, and what they remember of the lines that they have seen."""

    def __init__(self) -> None:
        self._norm, self._loss = _Mean(), _Mean()
        self._block, self._before = _Block(), None
        self._spiked = -RECENT
        self._lowest: tuple[float, float, int] | None = None  # validation loss, training loss of late, step
        self._rates: list[float] = []
        self._compiled = False  # whether the measurement with the compilation is past
        self._open: set[str] = set()  # rules whose condition holds and was told

    def see(self, step: int, split: str, values: Mapping[str, Any]) -> list[Alert]:
        """The alerts of a line of metrics, which comes after all that were seen. Values as metrics.jsonl has them."""
        if split == "train":
            return [*self._see_step(step, values), *self._see_throughput(step, values)]
        if split == "event" and isinstance(rule := values.get("rule"), str):  # recorded, as it follows from no metric
            return [Alert(step, rule, str(values.get("text", "")))]
        if split == "event" and str(values.get("text", "")).startswith("resumed"):
            self._compiled = False
        if split == "validation" and (loss := _number(values.get("loss"))) is not None:
            return self._see_validation(step, loss)
        return []

    def see_disk(self, step: int, free: int, checkpoint: int) -> list[Alert]:
        """The alert of a disk: bytes that are free, and those of a checkpoint."""
        text = f"{format_size(free)} are free, and a checkpoint has {format_size(checkpoint)}: free some space"
        return self._once("disk", free < CHECKPOINTS_LEFT * checkpoint, step, text)

    def _see_step(self, step: int, values: Mapping[str, Any]) -> list[Alert]:
        loss, norm = _number(values.get("loss")), _number(values.get("grad_norm"))
        bad = values.get("finite") is False or values.get("finite") == 0
        found = self._once(NON_FINITE, bad, step, "the update was skipped: the loss or the gradient is not finite")
        if bad:
            return found
        for name, value, mean, times in (
            ("gradient norm", norm, self._norm, NORM_SPIKE),
            ("loss", loss, self._loss, LOSS_SPIKE),
        ):
            if value is None:
                continue
            if mean.ready and value > times * mean.value and step - self._spiked >= RECENT:
                self._spiked = step
                found.append(Alert(step, "spike", f"{name} {value:.4g}, and {mean.value:.4g} of late"))
            mean.add(value)
        if loss is not None:
            self._block.add(loss)
        if self._block.count == TREND:
            found += self._see_trend(step)
            self._before, self._block = self._block, _Block()
        return found

    def _see_trend(self, step: int) -> list[Alert]:
        now, before = self._block, self._before
        if before is None:
            return []
        rise = now.mean - before.mean
        text = f"the mean loss of the last {TREND} steps is {now.mean:.4f}, and was {before.mean:.4f} in those before"
        return self._once("loss up", rise > TREND_ERRORS * math.sqrt(now.error + before.error), step, text)

    def _see_validation(self, step: int, loss: float) -> list[Alert]:
        train = self._loss.value if self._loss.ready else math.nan
        lowest = self._lowest
        if lowest is None or loss < lowest[0]:
            self._lowest = loss, train, step
            self._open.discard("gap")
            return []
        opens = loss > GAP * lowest[0] and train < lowest[1]
        text = f"validation loss {loss:.4f}, and {lowest[0]:.4f} at step {lowest[2]:,}, while the training loss fell"
        return self._once("gap", opens, step, text)

    def _see_throughput(self, step: int, values: Mapping[str, Any]) -> list[Alert]:
        rate = _number(values.get("tokens_per_second"))
        if rate is None:
            return []
        if not self._compiled:
            self._compiled = True
            return []
        usual = sorted(self._rates)[len(self._rates) // 2] if len(self._rates) >= USUAL else 0.0
        self._rates = [*self._rates[-4 * USUAL :], rate]
        text = f"{rate:,.0f} tokens a second, and {usual:,.0f} as a rule"
        return self._once("throughput", rate < SLOW * usual, step, text)

    def _once(self, rule: str, holds: bool, step: int, text: str) -> list[Alert]:
        """The alert of a rule whose condition holds and did not hold before."""
        if not holds:
            self._open.discard(rule)
            return []
        if rule in self._open:
            return []
        self._open.add(rule)
        return [Alert(step, rule, text)]


def alerts_of(lines: Iterable[Mapping[str, Any]]) -> list[Alert]:
    """All alerts of the lines of a metrics.jsonl."""
    alerts = Alerts()
    return [alert for line in lines for alert in alerts.see(line["step"], line.get("split", ""), line)]


def _number(value: Any) -> float | None:
    """A finite number; None for all else, as the texts "NaN" and "Infinity" of metrics.jsonl."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
