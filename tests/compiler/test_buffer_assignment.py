"""The places of a program's arrays: outputs in donated inputs, lifetimes, memory that is passed on. No device."""

import numpy as np
import pytest

from vk_kernels.compiler.buffer_assignment import (
    PlannedDispatch,
    PlannedStep,
    alias_outputs,
    find_lifetimes,
    place_in_arena,
    share_memory,
    step_accesses,
    update_in_place,
)
from vk_kernels.compiler.ir import Value
from vk_kernels.compiler.partition import Partition, Step
from vk_kernels.runtime.dispatch_plan import Update

F32 = np.dtype(np.float32)


def value(size=64):
    return Value((size,), F32)


def step(inputs, outputs, shareable=(), scratch=()):
    """A step of one dispatch that reads its inputs and writes its outputs and scratch."""
    count = len(inputs) + len(outputs) + len(scratch)
    writes = tuple(i >= len(inputs) for i in range(count))
    made = PlannedDispatch("d", b"", tuple(range(count)), writes, (1, 1, 1))
    return PlannedStep(Step(tuple(inputs), tuple(outputs), 0), (made,), tuple(scratch), frozenset(shareable))


def assigned(inputs, steps, outputs, donated):
    partition = Partition(tuple(inputs), {}, [s.step for s in steps], tuple(outputs))
    found = alias_outputs(partition, steps, donated)
    accesses = [step_accesses(i, s, found.slices) for i, s in enumerate(steps)]
    stages = [[i] for i in range(len(steps))]
    lives = find_lifetimes(accesses, stages, [x for x, _ in found.copied])
    blocks = share_memory(steps, lives, found.slices)
    slices, nbytes = place_in_arena(blocks, found.slices, 1 << 20)
    return found, slices, nbytes


def test_an_output_lies_in_the_donated_input_that_nothing_reads_later():
    x, y = value(), value()
    found, slices, _ = assigned([x], [step([x], [y], shareable=[(0, 0)])], [y], [True])
    assert found.aliases == {0: 0}
    assert slices[y].space == "input"
    assert found.copied == []


@pytest.mark.parametrize("in_place", [True, False])
def test_an_output_is_copied_where_the_input_is_read_beside_it(in_place):
    """In place one thread reads and writes the same element; else another may read what it has written."""
    x, y, z = value(), value(), value()
    late = step([x], [z])  # reads x after y is written
    found, slices, _ = assigned([x], [step([x], [y], [(0, 0)] if in_place else []), late], [y, z], [True])
    assert found.aliases == {0: 0}
    assert [(v, place.space) for v, place in found.copied] == [(y, "input")]
    assert slices[y].space == "arena"


def test_nothing_is_aliased_that_is_not_donated():
    x, y = value(), value()
    found, slices, nbytes = assigned([x], [step([x], [y], [(0, 0)])], [y], [False])
    assert (found.aliases, slices[y].space, nbytes) == ({}, "output", 0)


def test_a_lifetime_goes_from_the_first_to_the_last_access_and_to_the_end_for_what_is_copied():
    x, a, b = value(), value(), value()
    steps = [step([x], [a]), step([x], [b]), step([a, b], [value()])]
    accesses = [step_accesses(i, s, {}) for i, s in enumerate(steps)]
    lives = find_lifetimes(accesses, [[0], [1], [2]], [b])
    assert (lives.first[a], lives.last[a]) == (0, 2)
    assert (lives.first[b], lives.last[b]) == (1, 3)


@pytest.mark.parametrize(
    ("shareable", "read_again", "shared"), [([(0, 0)], False, True), ([], False, False), ([(0, 0)], True, False)]
)
def test_memory_is_passed_on_in_place_where_nothing_else_reads_it(shareable, read_again, shared):
    x, a, b, c = value(), value(), value(), value()
    steps = [step([x], [a]), step([a], [b], shareable), step([b, a] if read_again else [b], [c])]
    _, slices, nbytes = assigned([x], steps, [c], [False])
    assert (slices[a] == slices[b]) == shared
    assert nbytes == 256 * (1 if shared else 2)


def test_scratch_shares_the_arena_with_what_does_not_live_then():
    x, a, b, c = value(), value(), value(), value()
    _, slices, nbytes = assigned([x], [step([x], [a]), step([a], [b]), step([b], [c], scratch=[256])], [c], [False])
    assert slices[2, 0].index == slices[a].index
    assert nbytes == 512


def updating(inputs, outputs):
    """A step whose first output is its first input, updated: a copy, then what changes it."""
    copy = PlannedDispatch("copy", b"", (0, len(inputs)), (False, True), (1, 1, 1))
    numbers = (*range(1, len(inputs)), *range(len(inputs), len(inputs) + len(outputs)))
    change = PlannedDispatch("change", b"", numbers, tuple(i >= len(inputs) for i in numbers), (1, 1, 1))
    made = Step(tuple(inputs), tuple(outputs), 0)
    return PlannedStep(made, (copy, change), (), frozenset(), (Update(0, 0, copy=0),))


def labels(steps):
    return [[one.label for one in step.dispatches] for step in steps]


def updated(inputs, steps, outputs, donated):
    return update_in_place(Partition(tuple(inputs), {}, [s.step for s in steps], tuple(outputs)), steps, donated)


def test_updates_of_a_donated_input_one_after_the_other_are_one_array():
    x, y, z = value(), value(), value()
    partition, steps = updated([x], [updating([x], [y]), updating([y], [z])], [z], [True])
    assert labels(steps) == [["change"], ["change"]]
    assert partition.outputs == (x,)
    assert [one.step.outputs for one in steps] == [(x,), (x,)]


@pytest.mark.parametrize("case", ["kept by the caller", "read later", "an output too"])
def test_an_update_copies_what_is_still_needed(case):
    x, y, z = value(), value(), value()
    later = [step([x], [z])] if case == "read later" else []
    outputs = [y, x] if case == "an output too" else [y, *(z for _ in later)]
    partition, steps = updated([x], [updating([x], [y]), *later], outputs, [case != "kept by the caller"])
    assert labels(steps)[0] == ["copy", "change"]
    assert partition.outputs == tuple(outputs)


def test_a_reader_before_the_update_does_not_keep_the_array():
    x, y, z = value(), value(), value()
    partition, steps = updated([x], [step([x], [z]), updating([x], [y])], [y, z], [True])
    assert labels(steps)[1] == ["change"]
    found, slices, _ = assigned([x], steps, partition.outputs, [True])
    assert (found.aliases[0], slices[x].space, found.copied) == (0, "input", [])


def test_an_update_of_what_was_made_here_shares_its_memory():
    x, y, z = value(), value(), value()
    partition, steps = updated([x], [step([x], [y]), updating([y], [z])], [z], [False])
    assert labels(steps) == [["d"], ["change"]]
    _, slices, nbytes = assigned([x], steps, partition.outputs, [False])
    assert (slices[y].space, nbytes) == ("output", 0)
