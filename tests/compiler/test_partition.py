"""Partition into steps. Needs no device."""

import jax
import jax.numpy as jnp
import numpy as np
from test_from_jaxpr import graph_of

from vk_kernels import ops
from vk_kernels.compiler.ir import Value
from vk_kernels.compiler.op_call import CallSite
from vk_kernels.compiler.partition import Partition, common_scope, partition
from vk_kernels.compiler.passes.simplify import simplify

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
