"""Windows: every token is a target once, from the tokens that the rule says."""

import numpy as np
import pytest

from gpt_jax.data.batches import MASKED
from gpt_jax.evaluation.windows import Window, WindowCutter

START = 999


def cut(count: int, length: int, stride: int, piece: int, counted=None) -> list[Window]:
    """The windows of a stream of tokens 1 to `count`, added `piece` at a time."""
    ids = np.arange(1, count + 1)
    counted = np.ones(count, bool) if counted is None else counted
    cutter = WindowCutter("a source", START, length, stride)
    windows = []
    for first in range(0, count, piece):
        windows += cutter.add(ids[first : first + piece], counted[first : first + piece])
    return [*windows, *cutter.finish()]


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 1), (4, 3), (7, 2), (1, 1)])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9, 23])
def test_every_token_is_a_target_once_after_the_tokens_of_the_rule(count, length, stride):
    stream = np.array([START, *range(1, count + 1)])
    expected = []
    for token in range(1, count + 1):
        number = max(0, -(-(token - length) // stride))  # of the first window that reaches it
        expected.append((token, stream[number * stride : token].tolist()))
    for piece in (1, 5, 100):
        found = []
        for window in cut(count, length, stride, piece):
            assert len(window.inputs) == len(window.targets) <= length
            assert (window.inputs.dtype, window.targets.dtype, window.source) == (np.int32, np.int32, "a source")
            for place in np.flatnonzero(window.targets != MASKED):
                found.append((int(window.targets[place]), window.inputs[: place + 1].tolist()))
        assert found == expected


def test_what_does_not_count_is_context_and_a_window_of_it_alone_is_left_out():
    counted = np.array([False] * 4 + [True, False, True, False] + [False] * 4)
    [window] = cut(12, length=4, stride=4, piece=3, counted=counted)
    assert window.inputs.tolist() == [4, 5, 6, 7]
    assert window.targets.tolist() == [5, MASKED, 7, MASKED]
