"""How a run's state and batches lie on its devices: on one, or spread over several.

A batch of B rows is computed in A parts, one after another, and each part is split evenly among N devices: device d has
of part i the rows i B/A + d B/(N A) and those after it. So every part has the rows, and the dropout, of one device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt_jax.errors import UserError


@dataclass(frozen=True)
class Share:
    """Devices `first` to `first + held - 1` of `total`: those of this process."""

    first: int = 0
    held: int = 1
    total: int = 1

    def rows(self, batch_size: int, parts: int = 1) -> np.ndarray:
        """The numbers of the rows of a batch that are this process's, in the order of its parts."""
        part = batch_size // parts
        each = part // self.total
        inside = np.arange(self.first * each, (self.first + self.held) * each)
        return (part * np.arange(parts)[:, None] + inside).reshape(-1)

    def check_batch(self, batch_size: int, parts: int) -> None:
        """Raises UserError if the parts of a batch cannot be split evenly."""
        step = self.total * parts
        if batch_size % step:
            below, in_parts = batch_size // step * step, f" in {parts} parts" if parts > 1 else ""
            near = " or ".join(str(size) for size in (below, below + step) if size)
            raise UserError(
                f"config.batch_size={batch_size}{in_parts} does not go evenly into {self.total} devices: {near} does"
            )


class OneDevice:
    """All on the device of the only process."""

    share = Share()

    def step_options(self, state: Any) -> dict[str, Any]:
        """Options of the jit of a train step on the leaves of such a state."""
        return {}

    def gather(self, params: Any) -> Any:
        """Inside a step: parameters as every device needs them."""
        return params

    def scatter(self, gradient: Any) -> Any:
        """Inside a step: a gradient as the optimizer's state lies."""
        return gradient

    def broadcast(self, state: Any) -> Any:
        """Process 0's state, on the host of every process; the others give one of its shapes."""
        return state

    def batch(self, batch: dict[str, np.ndarray], parts: int = 1) -> dict[str, Any]:
        """A batch for a step, from the rows that this process has read."""
        return batch

    def own(self, tree: Any) -> Any:
        """Arrays for this process to use alone; all processes call it."""
        return tree

    def whole(self, tree: Any) -> Any:
        """Arrays that a checkpoint is made of; all processes call it."""
        return tree

    def total(self, sums: np.ndarray) -> np.ndarray:
        """Sums of what this process's rows gave as those of all processes; all of them call it."""
        return sums

    def measures(self) -> dict[str, float]:
        """Metrics of the exchange, by step, since the last call."""
        return {}

    def settle(self, state: Any, step: int) -> Any:
        """The state after a step, from which all processes go on with the same bits; all of them call it.

        They have them already if their devices are alike. Devices of different kinds round differently in the update:
        they take process 0's state, as a run does that goes on.

        Raises UserError, naming the first parameter and the processes, if devices that are alike have other bits.
        """
        return state
