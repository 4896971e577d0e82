"""The trace of a profile, as its readers take it."""

import json
import random
from pathlib import Path

import pytest

from vk_kernels.bridge.profile import Profile


def nanoseconds(event: dict) -> tuple[int, int]:
    """Start and end as Perfetto has them: each number is cut to whole nanoseconds by itself."""
    start = int(1e3 * event["ts"])
    return start, start + int(1e3 * event["dur"])


def test_slices_of_a_trace_lie_in_each_other_to_the_nanosecond(tmp_path: Path):
    """Perfetto drops a slice that ends after the one around it, be it by one."""
    draw = random.Random(0)
    scopes = ("jvp(GPT)/h_0/a", "jvp(GPT)/h_1/a", "transpose(jvp(GPT))/h_1/a", "optimizer", "")
    rows = [("matmul", scope, draw.choice((1e-6, 3e-5)) * draw.random()) for scope in scopes for _ in range(100)]
    Profile(tuple(rows)).write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    around: list[int] = []  # ends of the slices that are open
    for event in slices:
        start, end = nanoseconds(event)
        while around and around[-1] <= start:
            around.pop()
        assert not around or end <= around[-1], event
        around.append(end)
    assert [event["name"] for event in slices if event["name"] != "matmul"] == [
        *("forward", "h_0", "h_1", "backward", "h_1", "optimizer", "other"),
    ]
    told = [event["args"]["scope"] for event in slices if "args" in event]
    assert told == [scope for _, scope, _ in rows]
    whole = sum(round(1e9 * seconds) for _, _, seconds in rows)
    for names in ({"matmul"}, {"forward", "backward", "optimizer", "other"}):
        found = sum(event["dur"] for event in slices if event["name"] in names)
        assert 1e3 * found == pytest.approx(whole, rel=1e-12), names
