"""Waits of tests: for what happens, never for a time to pass; the limit is one that only a hang reaches."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 120.0  # seconds, where a quiet machine takes less than one


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.002)
