"""Accesses that conflict."""

import pytest

from vk_kernels.runtime.hazards import PendingAccesses, waiting_first

A, B, ACROSS, ELSEWHERE = ("m", 0, 8), ("m", 8, 16), ("m", 4, 12), ("n", 0, 16)
NOTHING = ((), (), ())


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (((A,), (), ()), ((A,), (), ()), False),  # two reads
        (((), (A,), ()), ((A,), (), ()), True),  # read after write
        (((A,), (), ()), ((), (A,), ()), True),  # write after read
        (((), (A,), ()), ((), (A,), ()), True),  # write after write
        (((), (A,), ()), ((B,), (B,), ()), False),  # side by side
        (((), (A,), ()), ((ACROSS,), (), ()), True),  # some of the same bytes
        (((), (A, B), ()), ((ELSEWHERE,), (ELSEWHERE,), ()), False),  # other memory
        (((), (), (A,)), ((), (), (A,)), False),  # both write a part of their own
        (((), (), (A,)), ((), (A,), ()), True),  # one writes all of it
        (((), (), (A,)), ((A,), (), ()), True),  # one reads it
        (((), (A,), ()), ((), (), (A,)), True),
        (((A,), (), ()), ((), (), (A,)), True),
    ],
)
def test_accesses_that_conflict_are_found(before, after, expected):
    pending = PendingAccesses()
    assert not pending.conflict(*before)
    pending.add(*before)
    pending.add(*NOTHING)
    assert pending.conflict(*after) == expected
    pending.clear()
    assert not pending.conflict(*after)


def test_of_a_stage_those_commands_come_first_that_wait_for_the_stage_before():
    x, y, z = (("arena", 16 * i, 16 * i + 16) for i in range(3))
    alone, reader = ([], [y], []), ([x], [z], [])
    assert waiting_first([[([], [x], [])], [alone, reader, reader]]) == [[0], [1, 2, 0]]
    assert waiting_first([[([], [x], [])], [alone], [reader]]) == [[0], [0], [0]]  # a stage that waits for nothing
