"""Processes of a run that meet in threads of a test's own process."""

import time
from concurrent.futures import ThreadPoolExecutor

from gpt_jax.distributed import channel
from gpt_jax.distributed.processes import Processes, join

channel.end_process = lambda *_: None  # for good: a thread may come to it when its test is over, and end all tests


def meet(count: int, port: int | None = None, **options) -> list[Processes]:
    port = port or channel.free_port()
    with ThreadPoolExecutor(count) as pool:
        found = [pool.submit(join, f"127.0.0.1:{port},{count},{i}", join_seconds=5, **options) for i in range(count)]
        return [each.result() for each in found]


def everywhere(processes: list[Processes], act) -> list:
    with ThreadPoolExecutor(len(processes)) as pool:
        return [each.result() for each in [pool.submit(act, process) for process in processes]]


def wait_until(condition) -> None:
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()
