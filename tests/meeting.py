"""Processes of a run that meet in threads of a test's own process."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from waiting import PATIENCE

from gpt_jax.distributed import channel
from gpt_jax.distributed.processes import Processes, join

channel.end_process = lambda *_: None  # for good: a thread may come to it when its test is over, and end all tests
_met: list[Processes] = []


def meet(count: int, **options) -> list[Processes]:
    with channel.hold_port() as port, ThreadPoolExecutor(count) as pool:
        found = [
            pool.submit(join, f"127.0.0.1:{port},{count},{i}", join_seconds=PATIENCE, **options) for i in range(count)
        ]
        processes = [each.result() for each in found]
    _met.extend(processes)
    return processes


def part() -> None:
    """Ends the watching of all that met so far: in a test of less patience they would lose each other too."""
    for process in _met:
        process.channel._closing = True
    for process in _met:
        process.channel._thread.join()
    _met.clear()


def everywhere(processes: list[Processes], act) -> list:
    with ThreadPoolExecutor(len(processes)) as pool:
        return [each.result() for each in [pool.submit(act, process) for process in processes]]


@dataclasses.dataclass(frozen=True)
class State:
    """All of a run's state that its placement looks at."""

    params: Any


jax.tree_util.register_dataclass(State, ["params"], [])


def states_that_differ() -> tuple[State, State]:
    """Two states, one bit of h_0/w apart."""
    params = {"h_0": {"w": np.linspace(0, 1, 100, dtype=np.float32)}, "wte": np.ones(3, np.float32)}
    other = jax.tree.map(np.copy, params)
    other["h_0"]["w"].view(np.uint32)[41] ^= 1
    return State(params), State(other)
