"""Arrays that a call gave in donated memory, and their objects, which it may take again: without a device."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vk_kernels.bridge.donation import DonatingCaller, Signature, _Carry
from vk_kernels.runtime import lifetime
from vk_kernels.runtime.array import Array, array_type

FLOAT = array_type((2,), np.dtype(np.float32), False)
X = np.ones(2, np.float32)


class FakeDevice:
    def __init__(self):
        self.uploads = 0

    def upload(self, x):
        self.uploads += 1
        return self.memory()

    def memory(self):
        return SimpleNamespace(device=self, read=lambda dtype, shape: np.zeros(shape, dtype))


class FakeExecutable:
    """Notes the arguments of each call; its results are new arrays."""

    def __init__(self, device, results):
        self.device, self.results, self.calls, self.releases = device, results, [], 0

    def __call__(self, arguments):
        self.calls.append(arguments)
        return [Array(self.device.memory(), FLOAT) for _ in range(self.results)]

    def release_donated(self):
        self.releases += 1


def make(arguments, results, aliases, donated=None):
    """(caller, executable) of a function of arrays like FLOAT. aliases: output -> input."""
    device = FakeDevice()
    in_tree, out_tree = jax.tree.structure((arguments, {})), jax.tree.structure(results)
    executable = FakeExecutable(device, out_tree.num_leaves - len(aliases))
    signature = Signature(
        in_tree=in_tree,
        in_types=[FLOAT] * in_tree.num_leaves,
        out_tree=out_tree,
        out_types=[FLOAT] * out_tree.num_leaves,
        out_avals=[jax.ShapeDtypeStruct((2,), np.float32)] * out_tree.num_leaves,
        donated=sorted(aliases.values()) if donated is None else donated,
        aliases=aliases,
    )
    return DonatingCaller(signature, executable, device), executable


def run(caller, *args):
    """The results of a call, and whether it was the next of a loop."""
    rest = caller.match_carry((args, {}))
    if rest is not None:
        return caller.call_with_carry(rest), True
    return caller.call(jax.tree.leaves(args)), False


STATES = {
    "tuple": (X, X),
    "dict": {"a": X, "b": X},
}
LOOPS = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


def loop(state):
    """(caller, executable) of (state, x) -> (state, y)."""
    return make((state, X), (state, X), {0: 0, 1: 1})


@LOOPS
def test_a_state_that_comes_back_takes_the_fast_path_and_the_objects_of_the_one_before(state):
    caller, executable = loop(state)
    seen, fast = [], []
    for _ in range(6):
        (state, _), was_next = run(caller, state, X)
        seen.append([id(x) for x in jax.tree.leaves(state)])
        fast.append(was_next)
        assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    assert fast == [False] + [True] * 5
    assert seen[2:] == seen[:4]  # two generations take turns
    assert [sorted(arguments) for arguments in executable.calls] == [[0, 1, 2]] + [[2]] * 5
    assert executable.device.uploads == 2  # the first state


@LOOPS
def test_a_generation_that_is_held_stays_donated_for_ever(state):
    caller, _ = loop(state)
    (state, _), _ = run(caller, state, X)
    held = jax.tree.leaves(state)[1]
    for _ in range(5):
        (state, _), was_next = run(caller, state, X)
        assert was_next
        assert held.is_deleted()
        assert all(x is not held for x in jax.tree.leaves(state))
    with pytest.raises(RuntimeError, match="donated or deleted"):
        run(caller, jax.tree.unflatten(jax.tree.structure(state), [held, held]), X)


@LOOPS
def test_a_generation_with_a_deleted_array_is_neither_passed_on_nor_taken_again(state):
    caller, _ = loop(state)
    (state, _), _ = run(caller, state, X)
    before = [id(x) for x in jax.tree.leaves(state)]
    old = state
    (state, _), _ = run(caller, state, X)
    jax.tree.leaves(old)[0].delete()
    del old
    (third, _), was_next = run(caller, state, X)
    assert was_next
    assert not any(x.is_deleted() for x in jax.tree.leaves(third))
    assert [id(x) for x in jax.tree.leaves(third)] != before
    jax.tree.leaves(third)[0].delete()
    assert caller.match_carry(((third, X), {})) is None
    with pytest.raises(RuntimeError, match="donated or deleted"):
        run(caller, third, X)


@LOOPS
@pytest.mark.parametrize(
    "other",
    [
        lambda state, x: (jax.tree.map(lambda leaf: X, state), x),  # another state
        lambda state, x: (state, X.astype(np.int32)),  # another type
        lambda state, x: (state, [x]),  # another structure
        lambda state, x: (state, x[:1]),  # another shape
        lambda state, x: ([state], x),
        lambda state, x: (state,),
        lambda state, x: (jax.tree.map(lambda leaf, back: back, state, swapped(state)), x),  # in other places
    ],
)
def test_anything_else_is_no_next_call(state, other):
    caller, _ = loop(state)
    (state, _), _ = run(caller, state, X)
    assert caller.match_carry((other(state, X), {})) is None
    assert caller.match_carry(((state, X), {})) == [X]


def swapped(state):
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)[::-1])


@LOOPS
def test_memory_is_released_with_the_state_and_not_before(state):
    caller, executable = loop(state)
    first = state
    (state, _), _ = run(caller, first, X)
    run(caller, first, X)  # a second state, while the first is held
    assert executable.releases == 0
    del state
    run(caller, first, X)  # nobody has the second
    assert executable.releases == 1


def test_a_call_that_raises_leaves_the_generation_current():
    caller, executable = loop((X, X))
    (state, _), _ = run(caller, (X, X), X)
    gone = Array(executable.device.memory(), FLOAT)
    gone.delete()
    with pytest.raises(RuntimeError, match="donated or deleted"):
        run(caller, state, gone)
    assert not any(x.is_deleted() for x in state)
    (_, was_next) = run(caller, state, X)
    assert was_next


def test_donated_arrays_without_a_result_in_their_memory_are_deleted():
    caller, executable = make((X, X), (X,), {0: 0}, donated=[0, 1])
    spare = Array(executable.device.memory(), FLOAT)
    (state,), _ = run(caller, X, spare)
    assert spare.is_deleted()
    spare = Array(executable.device.memory(), FLOAT)
    _, was_next = run(caller, state, spare)
    assert was_next
    assert spare.is_deleted()


def test_a_function_that_carries_nothing_has_a_next_call_by_its_types_alone():
    caller, executable = make((X,), (X,), {})
    for i in range(3):
        (result,), was_next = run(caller, X)
        assert was_next == (i > 0)
        assert not result.is_deleted()
    assert caller.match_carry(((X.astype(np.int32),), {})) is None
    assert executable.releases == 0


def test_without_reference_counts_every_result_is_a_new_object(monkeypatch):
    monkeypatch.setattr(lifetime, "_BASE_REFCOUNT", None)
    for state in STATES.values():
        caller, executable = loop(state)
        every = []
        for i in range(6):
            (state, _), was_next = run(caller, state, X)
            assert was_next == (i > 0)
            assert all(x.is_deleted() for x in every)
            every += jax.tree.leaves(state)
        assert len({id(x) for x in every}) == 12
        assert executable.releases == 0


@pytest.mark.parametrize(
    ("arguments", "results", "aliases", "found"),
    [
        (((X, X),), ((X, X),), {0: 0, 1: 1}, (0, 0)),
        ((X, (X, X)), ((X, X), X), {0: 1, 1: 2}, (1, 0)),
        (((X, X), X), (X, {"a": X}, (X, X)), {2: 0, 3: 1}, (0, 2)),
        (((X, X),), ((X, X),), {0: 1, 1: 0}, None),  # crossed
        (((X, X), X), ((X, X), X), {0: 0, 1: 1, 2: 2}, None),  # more is carried than one tuple
        (((X, X),), ((X, X),), {0: 0}, None),  # less
        (([X, X],), ([X, X],), {0: 0, 1: 1}, None),  # no tuple
        (((X, X),), (X, X), {0: 0, 1: 1}, None),  # no tuple of results
        (((),), ((),), {}, None),
    ],
)
def test_a_tuple_of_all_that_is_carried_is_found(arguments, results, aliases, found):
    carry = _Carry.find(jax.tree.structure((arguments, {})), jax.tree.structure(results), aliases)
    assert (carry and (carry.argument, carry.result)) == found
