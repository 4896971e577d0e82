"""Partition into steps, placement in the arena and barriers. Needs no device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_from_jaxpr import graph_of

from vk_kernels import ops
from vk_kernels.compiler.arena import ALIGNMENT, Lifetime, place
from vk_kernels.compiler.ir import Value
from vk_kernels.compiler.list_schedule import Access, assign_stages
from vk_kernels.compiler.op_call import CallSite
from vk_kernels.compiler.partition import Partition, common_scope, partition
from vk_kernels.compiler.passes.fuse_epilogue import fuse_epilogues
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.runtime.program import BufferSlice, find_barriers

X = np.ones((64, 48), np.float32)


def steps_of(fn, *args, **options) -> Partition:
    return partition(simplify(graph_of(fn, *args)), **options)


def kinds(found: Partition) -> list[set[str]]:
    return [{step.node.op} if step.node else {node.op for node in step.graph.nodes} for step in found.steps]


def check_order(found: Partition) -> None:
    """Everything is in memory when it is read, and steps of one level need nothing of each other."""
    made: dict[Value, int] = dict.fromkeys((*found.inputs, *found.constants), -1)
    for step in found.steps:
        assert all(made[x] < step.level for x in step.inputs)
        made |= dict.fromkeys(step.outputs, step.level)
        if step.graph:
            assert step.graph.inputs == step.inputs
            assert step.graph.outputs == step.outputs
    assert [step.level for step in found.steps] == sorted(step.level for step in found.steps)
    assert all(x in made for x in found.outputs)


def test_an_optimizer_reads_each_gradient_in_one_step_only():
    """However many parameters there are, and however long the way to a number that all of them are scaled by."""
    shapes = [(8 + i, 16) for i in range(60)]
    arrays = [[np.ones(shape, np.float32) for shape in shapes] for _ in range(3)]

    def momentum(params, momenta, grads):
        norm = sum(jnp.sqrt(g[0, 0] * g[0, 0] + i) for i, g in enumerate(grads))
        scale = jnp.where(norm > 1, 1 / norm, 1)
        momenta = [0.9 * m + scale * g for m, g in zip(momenta, grads, strict=True)]
        updated = [p - jnp.tanh(m) for p, m in zip(params, momenta, strict=True)]
        keep = jnp.isfinite(norm)
        return [jnp.where(keep, m, 0) for m in momenta], [jnp.where(keep, p, 0) for p in updated]

    found = steps_of(momentum, *arrays, most_buffers=32)
    check_order(found)
    updates = [step for step in found.steps if any(out.size > 1 for out in step.outputs)]
    assert len(updates) > 5
    read = [x for step in updates for x in step.inputs if x.size > 1]
    assert sorted(map(found.inputs.index, read)) == list(range(3 * len(shapes)))


def test_an_update_goes_with_its_norms():
    """Though the norms have a way to go, and the update waits for numbers that they do not wait for."""
    arrays = [[np.ones((n, 128), np.float32) for n in (64, 65, 66)] for _ in range(3)]

    def momentum(params, momenta, grads):
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads))
        momenta = [0.9 * m + g / norm for m, g in zip(momenta, grads, strict=True)]
        updates = [jnp.tanh(m) for m in momenta]
        norms = [jnp.sqrt(sum(jnp.sum(x * x) for x in xs)) for xs in (params, updates)]
        updated = [jnp.where(jnp.isfinite(norm), p - u, p) for p, u in zip(params, updates, strict=True)]
        return momenta, updated, norms

    found = steps_of(momentum, *arrays)
    check_order(found)
    read = [x for step in found.steps for x in step.inputs if x.size > 1]
    numbers = sorted(map(found.inputs.index, read))
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]  # the gradients for their norm before

    def scaled(params, momenta, grads):
        _, updated, norms = momentum(params, momenta, grads)
        return updated, [p * sum(norms) for p in params]

    found = steps_of(scaled, *arrays)
    check_order(found)
    assert set(found.steps[-1].outputs) == set(found.outputs)  # what reads the parameters last is one step


def test_a_chain_of_elementwise_operations_is_one_step():
    found = steps_of(lambda x: jnp.tanh(x * 2 + 1).T.reshape(-1), X)
    check_order(found)
    assert len(found.steps) == 1
    assert found.steps[0].inputs == found.inputs


def test_what_is_independent_is_one_step():
    found = steps_of(lambda x, y, z: (x + 1, y * 2, jnp.sin(z)), X, X[0], X[:, 0])
    check_order(found)
    assert len(found.steps) == 1
    assert len(found.steps[0].outputs) == 3


def test_a_kernel_binds_so_many_buffers_at_most():
    arrays = [np.ones(n, np.float32) for n in range(1, 21)]
    found = steps_of(lambda *xs: [x + 1 for x in xs], *arrays, most_buffers=10)
    check_order(found)
    assert [len(step.outputs) for step in found.steps] == [5] * 4
    assert {step.level for step in found.steps} == {0}


def test_a_kernel_has_so_many_reductions_at_most():
    arrays = [np.ones((n, 50), np.float32) for n in (1, 2, 1, 2, 1, 2)]
    found = steps_of(lambda *xs: [x.sum() for x in xs], *arrays, most_reductions=3)
    check_order(found)
    assert [{x.shape for x in step.inputs} for step in found.steps] == [{(1, 50)}, {(2, 50)}]


def test_products_are_stored_and_what_is_done_to_their_operands_is_not():
    found = steps_of(lambda x, y: jax.nn.relu((x * 2) @ (y + 1)), X, X.T)
    check_order(found)
    assert [next(iter(k & {"dot_general"}), None) for k in kinds(found)] == ["dot_general", None]
    assert len(found.steps[0].inputs) == 2


def test_a_hot_operation_is_its_own_step_and_reads_views_where_they_are():
    def fn(x, scale, bias):
        y = ops.layer_norm((x + 1).reshape(8, 8, 48), scale, bias, implementation="vulkan")
        return y.reshape(-1, 48).sum(0), y

    traced = jax.make_jaxpr(fn)(X, X[0], X[0])
    assert "layer_norm" in str(traced)
    found = steps_of(fn, X, X[0], X[0])
    check_order(found)
    assert kinds(found)[1] == {"layer_norm"}
    assert found.steps[1].inputs[0] is found.steps[0].outputs[0]
    assert found.outputs[1] is found.steps[1].outputs[0]
    assert found.steps[1].node.call.startswith(b'["layer_norm"')
    assert CallSite().device == ""


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


def test_costly_values_that_are_broadcast_are_stored_once():
    found = steps_of(lambda x, t: x * jnp.exp(t) ** 3.5, X, np.float32(1))
    check_order(found)
    assert len(found.steps) == 2
    assert found.steps[0].outputs[0].shape == ()


def test_inputs_are_converted_to_a_smaller_type_in_one_step():
    def chain(x, *ws):
        for w in ws:
            x = ops.matmul(x, w.astype(jnp.bfloat16), implementation="vulkan")
        return x

    square = np.ones((48, 48), np.float32)
    found = steps_of(chain, X.astype(jnp.bfloat16), square, square, square)
    check_order(found)
    assert [len(step.outputs) for step in found.steps] == [3, 1, 1, 1]
    assert len(steps_of(chain, *(x.astype(jnp.bfloat16) for x in (X, square, square))).steps) == 2


def test_an_output_that_a_later_step_needs_is_loaded_there():
    found = steps_of(lambda x: (x + 1, jnp.cos((x + 1).sum(0))), X)
    check_order(found)
    assert len(found.steps) == 2


def test_constants_and_inputs_can_be_outputs():
    found = steps_of(lambda x: (x, 3.0, X, x + 1), X)
    check_order(found)
    assert found.outputs[0] is found.inputs[0]
    assert sorted(array.shape for array in found.constants.values()) == [(), (64, 48)]


def test_common_scope():
    assert common_scope(["a/b/c", "a/b", "a/b/d"]) == "a/b"
    assert common_scope(["a", "b"]) == common_scope([]) == ""


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 9), st.integers(0, 9)), max_size=30),
    st.sampled_from((2048, 2304, 1 << 20)),
)
@settings(max_examples=200, deadline=None)
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


def dispatch(reads: str, writes: str, nbytes: int = 4, parts: str = "") -> Access:
    return Access(frozenset(reads), frozenset(writes), nbytes, frozenset(parts))


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


@given(
    st.lists(st.tuples(st.integers(0, 3), st.text("abcdef", max_size=3), st.text("abcdef", max_size=2)), max_size=12)
)
@settings(max_examples=200, deadline=None)
def test_waves_keep_the_order_of_what_meets(found):
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
