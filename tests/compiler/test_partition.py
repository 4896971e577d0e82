"""Partition into steps. Needs no device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_from_jaxpr import graph_of

from vk_kernels import ops
from vk_kernels.compiler.codegen import kernels
from vk_kernels.compiler.ir import Function, Literal, Node, Value
from vk_kernels.compiler.op_call import CallSite
from vk_kernels.compiler.partition import (
    Partition,
    common_scope,
    find_depths,
    form_kernels,
    partition,
    reductions_first,
)
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.compiler.roots import Roots, find_roots

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


def test_groups_of_outputs_are_made_as_soon_as_they_can_be_and_all_others_at_the_end():
    def layers(x, weights):
        sums = []
        for w in weights:
            x = jnp.tanh(x @ w)
            sums.append(x.sum(0))
        return x, sums

    arguments = layers, X, [np.ones((48, 48), np.float32)] * 4
    late, soon = steps_of(*arguments), steps_of(*arguments, output_groups=[(1, 2), (3, 4)])
    for found, levels in ((late, [4, 4, 4, 4]), (soon, [2, 2, 4, 4])):
        check_order(found)
        levels_of = {out: step.level for step in found.steps for out in step.outputs}
        deepest = max(levels_of.values())
        assert [levels_of[out] - deepest + 4 for out in found.outputs[1:]] == levels


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


def test_a_kernel_op_is_its_own_step_and_reads_views_where_they_are():
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


def roots_of(fn, *args, **options) -> Roots:
    return find_roots(simplify(graph_of(fn, *args)), **options)


def by_op(found: dict[Node, int]) -> dict[str, int]:
    """A number by operation, each of which is a root once at most."""
    return {node.op: number for node, number in found.items()}


def test_roots_are_what_is_made_of_many_elements_and_what_the_caller_reads():
    def fn(x, y):
        product = jnp.sin(x) @ (y * 2)
        return jax.nn.relu(product).sum(0).reshape(8, 8), jnp.cos(x)

    roots = roots_of(fn, X, X.T)
    product, total, cosine = roots.needs
    assert [product.op, total.op, cosine.op] == ["dot_general", "reduce_sum", "cos"]
    assert set(roots.needs[product]) == set(roots.graph.inputs)
    assert roots.needs[total] == product.outputs  # through relu, which is no root
    assert roots.base(roots.graph.outputs[0]) is total.outputs[0]  # the reshape is a view
    assert cosine.outputs[0] in roots.stored - roots.loaded


def test_roots_are_what_is_costly_and_needed_more_than_once():
    def drawn(key):
        return jax.random.bits(jax.random.wrap_key_data(key), X.shape)

    def costly(fn, *args) -> list[str]:
        return [node.op for node in roots_of(fn, *args).needs]

    key = np.zeros(2, np.uint32)
    assert costly(lambda key: (drawn(key) & 1, drawn(key) >> 31), key) == ["xor", "and", "shift_right_logical"]
    assert costly(lambda key: drawn(key) & 1, key) == ["and"]
    assert costly(lambda x: x * jnp.exp(x[0, 0]), X) == ["exp", "mul"]  # for 3,072 elements
    assert costly(lambda x: x[0] * jnp.exp(x[0, 0]), X[:, :8]) == ["mul"]  # for 8


def test_roots_are_no_more_than_a_kernel_can_bind():
    arrays = [np.ones(8, np.float32) for _ in range(30)]
    wide = roots_of(lambda *xs: sum(xs), *arrays)
    assert [len(needs) for needs in wide.needs.values()] == [30]
    narrow = roots_of(lambda *xs: sum(xs), *arrays, most_buffers=10)
    assert max(map(len, narrow.needs.values())) <= 8
    assert set().union(*narrow.needs.values()) >= set(narrow.graph.inputs)


def test_a_depth_is_the_longest_way_to_the_end():
    def fn(x, y):
        return ((x @ y) @ x).sum(), jnp.sin(y)

    roots = roots_of(fn, X, X.T)
    first, second, total, sine = roots.needs
    assert find_depths(roots) == {first: 2, second: 1, total: 0, sine: 0}
    assert find_depths(roots, {second: 4}) == {first: 5, second: 4, total: 0, sine: 0}


def test_what_is_stored_for_the_caller_is_computed_again_at_its_own_depth():
    plain = roots_of(lambda x: (x + 1, (x + 1) * 3), X)
    assert set(find_depths(plain).values()) == {0}
    reduced = roots_of(lambda x: (x + 1, (x + 1).sum(), ((x + 1).sum() + x).max()), X)
    assert by_op(find_depths(reduced)) == {"add": 1, "reduce_sum": 1, "reduce_max": 0}


def test_inputs_in_a_smaller_type_are_as_deep_as_anything():
    def fn(x, y):
        return (x @ x.T @ x).sum(), y.astype(jnp.bfloat16), (y * 2).astype(jnp.bfloat16)

    roots = roots_of(fn, X, X[0])
    depths = find_depths(roots)
    assert [depths[node] for node in roots.needs if node.op == "convert_element_type"] == [2, 0]


def test_updates_come_forward_to_the_reductions_that_load_the_same():
    large = np.ones((64, 128), np.float32)

    def momentum(m, g):
        return 0.9 * m + g, ((g * m).sum() * X).max()

    roots = roots_of(momentum, large, large)
    depths = find_depths(roots)
    assert by_op(depths) == {"add": 0, "reduce_sum": 1, "reduce_max": 0}
    assert by_op(reductions_first(roots, depths)) == {"add": 1}

    def read_later(m, g):
        return *momentum(m, g), ((g * m).sum() + m.T).max()

    roots = roots_of(read_later, large, large)
    assert reductions_first(roots, find_depths(roots)) == {}  # nothing could be written over the moments then

    roots = roots_of(lambda m, g: (momentum(m.T, g.T)[0], momentum(m, g)[1]), large, large)
    assert reductions_first(roots, find_depths(roots)) == {}  # of another shape


def test_kernels_are_formed_of_roots_of_one_depth():
    def fn(x, y, z):
        return x + 1, y * 2, x - z, jnp.sin(y)

    arrays = X, X[0], 2 * X
    roots = roots_of(fn, *arrays)
    add, mul, sub, sine = roots.needs
    (step,) = form_kernels(roots, dict.fromkeys(roots.needs, 0))
    assert step.outputs == (*add.outputs, *sub.outputs, *mul.outputs, *sine.outputs)  # those that read x, then y
    assert step.inputs == roots.graph.inputs
    assert step.graph.nodes == roots.graph.nodes
    later, earlier = form_kernels(roots, {add: 1, mul: 0, sub: 1, sine: 0})[::-1]
    assert (earlier.level, earlier.outputs) == (0, (*add.outputs, *sub.outputs))
    assert (later.level, later.outputs) == (1, (*mul.outputs, *sine.outputs))
    narrow = form_kernels(roots, dict.fromkeys(roots.needs, 0), most_buffers=4)
    assert [len(step.outputs) for step in narrow] == [2, 2]


def scan_slope(xs, ys):
    """Rows of several arrays, of which results load one or two."""

    def turn(carry, row):
        (a, b), (x, y) = carry, row
        a, b = jnp.tanh(a * x + b), jnp.sin(b) * y + a
        return (a, b), (a * b, jnp.cos(a), a - b)

    def total(xs, ys):
        return sum(jnp.sum(x) for x in jax.tree.leaves(jax.lax.scan(turn, (1.0, 2.0), (xs, ys))))

    return jax.value_and_grad(total, (0, 1))(xs, ys)


def listing(found: Partition) -> list[tuple]:
    """All that kernels, their operands and their places in a program are made from."""
    numbers: dict[Value, int] = {}

    def numbered(values) -> list[int]:
        return [numbers.setdefault(value, len(numbers)) for value in values]

    rows: list[tuple] = [tuple(numbered(found.inputs))]
    for step in found.steps:
        code = [kernel.spirv for kernel in kernels.generate(step.graph).kernels] if step.graph else []
        rows.append(
            (step.level, numbered(step.inputs), numbered(step.outputs), str(step.graph or step.node.call), code)
        )
    return rows


@pytest.mark.slow
def test_kernels_are_the_same_however_objects_are_hashed(monkeypatch):
    """As in two processes, which have the objects of a graph at other addresses: the cache on disk is for both."""

    def fn(x, y, xs, ys):
        return x + 1, y * 2, x * y, jnp.sin(x), x - y, jnp.tanh(y), scan_slope(xs, ys)

    found, args = [], (X, 2 * X, X[0, :6], 2 * X[0, :6])
    for factor in (1, 3, 5, 7, -1):
        order: dict[int, int] = {}  # by id; all objects of a graph live until its listing is made
        for kind in (Value, Literal, Node, Function):
            monkeypatch.setattr(kind, "__hash__", lambda x, k=factor, o=order: k * o.setdefault(id(x), 1 + len(o)))
        found.append(listing(steps_of(fn, *args)))
    assert all(one == found[0] for one in found)
