"""Epilogues, placement in the arena, stages and barriers. Needs no device."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import NIGHT, PROFILE
from test_from_jaxpr import graph_of

from vk_kernels import ops
from vk_kernels.compiler.arena import ALIGNMENT, Lifetime, place
from vk_kernels.compiler.list_schedule import Access, assign_stages
from vk_kernels.compiler.passes.fuse_epilogue import fuse_epilogues
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.runtime.program import BufferSlice, find_barriers

X = np.ones((64, 48), np.float32)


def two_products(x, first, second):
    """(loss, hidden activations), by products of which the first has an activation."""
    hidden = ops.matmul(x, first, activation="gelu", implementation="vulkan")
    return ops.matmul(hidden, second, implementation="vulkan").sum(), hidden


def test_the_slope_of_an_activation_goes_into_the_product_that_makes_its_gradient():
    gradient = jax.grad(lambda *xs: two_products(*xs)[0], argnums=(0, 1, 2))
    plain = simplify(graph_of(gradient, X, X.T, X))
    found = fuse_epilogues(plain)
    pre_activation = next(node.outputs[1] for node in found.nodes if node.op == "matmul")
    later, earlier = (node for node in found.nodes if node.op == "matmul_backward")
    assert later.inputs[-1] is pre_activation
    assert later.params["input_activation"] == "gelu"
    assert (len(earlier.inputs), earlier.params["activation"]) == (3, None)
    assert earlier.inputs[0] is later.outputs[0]
    assert b'"input_activation": "gelu"' in later.call
    assert b'"activation": null' in earlier.call
    assert [node.outputs for node in found.nodes] == [node.outputs for node in plain.nodes]


def test_what_others_read_too_stays_as_it_is():
    def gradients(x, first, second):
        _, back = jax.vjp(lambda h: ops.matmul(h, second, implementation="vulkan"), x)
        _, back_in = jax.vjp(lambda w: ops.matmul(x, w, activation="gelu", implementation="vulkan"), first)
        hidden = back(x)[0]
        return hidden, back_in(hidden)

    square = X[:48]
    plain = simplify(graph_of(gradients, square, square, square))
    assert [node.op for node in plain.nodes].count("matmul_backward") == 2
    assert str(fuse_epilogues(plain)) == str(plain)


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 9), st.integers(0, 9)), max_size=30),
    st.sampled_from((2048, 2304, 1 << 20)),
)
@settings(PROFILE, max_examples=2000 if NIGHT else 200)
def test_arrays_that_live_at_one_time_do_not_overlap_and_each_is_in_one_block(found, block):
    lifetimes = [Lifetime(n, min(a, b), max(a, b)) for n, a, b in found]
    offsets, total = place(lifetimes, block)
    for i, (own, start) in enumerate(zip(lifetimes, offsets, strict=True)):
        assert start % ALIGNMENT == 0
        assert start + own.nbytes <= total
        assert start // block == (start + max(own.nbytes, 1) - 1) // block
        for other, at in list(zip(lifetimes, offsets, strict=True))[:i]:
            if own.first <= other.last and other.first <= own.last:
                assert start + max(own.nbytes, 1) <= at or at + max(other.nbytes, 1) <= start


def test_arrays_of_different_times_share_memory():
    lifetimes = [Lifetime(1000, i, i + 1) for i in range(20)]
    assert place(lifetimes, 1 << 20)[1] == 2 * 1024
    assert place([], 1 << 20) == ([], 0)


def test_arrays_of_the_fullest_time_make_a_stack_where_the_largest_first_would_leave_a_hole():
    """The largest first: 1,024 bytes at 0, 768 at 0, 512 at 1,024, and the other 512 fit no more below them."""
    lifetimes = [Lifetime(768, 4, 4), Lifetime(1024, 1, 2), Lifetime(512, 2, 4), Lifetime(512, 3, 4)]
    assert place(lifetimes, 1 << 20)[1] == 768 + 512 + 512


def dispatch(reads: str, writes: str, nbytes: int = 4) -> Access:
    return Access(frozenset(reads), frozenset(writes), nbytes)


def test_independent_chains_of_a_level_run_side_by_side():
    products = [dispatch("ab", "p"), dispatch("p", "c"), dispatch("ad", "q"), dispatch("q", "e")]
    assert assign_stages([(0, products), (1, [dispatch("c", "f")])]) == [[0, 1, 0, 1], [2]]


def test_what_a_step_prepares_comes_before_its_level_unless_it_is_large():
    before = [(i, [dispatch("iabcde"[i], "abcdef"[i])]) for i in range(6)]
    sort = [dispatch("t", "u"), dispatch("u", "v"), dispatch("vf", "w")]
    assert assign_stages([*before, (6, sort)]) == [[0], [1], [2], [3], [4], [5], [4, 5, 6]]
    large = [dispatch("t", "u", 1 << 21), dispatch("u", "v"), dispatch("vf", "w")]
    assert assign_stages([*before, (6, large)])[-1] == [6, 7, 8]


def test_what_is_needed_late_is_not_computed_early():
    steps = [(i, [dispatch("abcde"[i], "bcdef"[i])]) for i in range(5)]
    steps.insert(4, (3, [dispatch("x", "y")]))
    steps.append((5, [dispatch("fy", "z")]))
    assert assign_stages(steps) == [[0], [1], [2], [3], [3], [4], [5]]


def test_memory_is_read_before_it_is_written_again():
    steps = [(0, [dispatch("a", "b")]), (0, [dispatch("a", "c")]), (1, [dispatch("b", "a")]), (1, [dispatch("c", "d")])]
    assert assign_stages(steps) == [[0], [0], [1], [1]]
    assert assign_stages([(0, [dispatch("a", "b")]), (0, [dispatch("c", "a")])]) == [[0], [1]]
    assert assign_stages([(0, [dispatch("a", "b")]), (0, [dispatch("c", "b")])]) == [[0], [1]]


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 3), st.text("abcdef", max_size=3), st.text("abcdef", max_size=2)), max_size=12)
)
@settings(PROFILE, max_examples=2000 if NIGHT else 200)
def test_stages_keep_the_order_of_what_meets(found):
    steps = [(level, [dispatch(reads, writes)]) for level, reads, writes in sorted(found, key=lambda item: item[0])]
    stages = [stage for (stage,) in assign_stages(steps)]
    assert all(stage >= 0 for stage in stages)
    for i, (_, (later,)) in enumerate(steps):
        for j, (_, (earlier,)) in enumerate(steps[:i]):
            if later.writes & (earlier.reads | earlier.writes) or later.reads & earlier.writes:
                assert stages[j] < stages[i]


A, B, C = BufferSlice("arena", 0, 256), BufferSlice("arena", 256, 256), BufferSlice("arena", 128, 256)
X0, OUT = BufferSlice("input", 0, 4), BufferSlice("output", 0, 4)


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        ([((X0, A), (False, True)), ((X0, B), (False, True))], [False, False]),  # two readers
        ([((X0, A), (False, True)), ((A, OUT), (False, True))], [False, True]),  # read after write
        ([((A, OUT), (False, True)), ((X0, A), (False, True))], [False, True]),  # write after read
        ([((X0, A), (False, True)), ((X0, A), (False, True))], [False, True]),  # write after write
        ([((X0, A), (False, True)), ((C, OUT), (False, True))], [False, True]),  # parts of the same bytes
        (  # a barrier orders all before it
            [((X0, A), (False, True)), ((A, B), (False, True)), ((A, OUT), (False, True))],
            [False, True, False],
        ),
    ],
)
def test_barriers_stand_where_a_hazard_is(commands, expected):
    assert find_barriers([places for places, _ in commands], [writes for _, writes in commands]) == expected
