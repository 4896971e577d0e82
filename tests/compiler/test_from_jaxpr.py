"""From JAX functions to graphs, and what simplification leaves of them. Needs no device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.compiler.ir import Graph, Literal, Node, Value, consumers, producers
from vk_kernels.compiler.passes.simplify import constant_fold, cse, dce, drop_barriers, simplify
from vk_kernels.errors import UnsupportedError

F32 = np.dtype(np.float32)


def graph_of(fn, *args) -> Graph:
    return make_graph(jax.make_jaxpr(fn)(*args))


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_a_graph_prints_its_inputs_nodes_and_outputs():
    x, y = Value((2, 3), F32), Value((2, 3), F32)
    node = Node("mul", (x, Literal(np.float32(2))), (y,), {"k": 1, "unused": None}, "user.py:3", "layer")
    graph = Graph((x,), {}, [node], (y, Literal(np.int32(1))))
    assert str(graph).splitlines() == [
        "graph(i0: float32[2,3])",
        "  v0: float32[2,3] = mul[k=1](i0, 2.:float32)  # layer",
        "  return v0, 1:int32",
    ]


def test_producers_and_consumers():
    graph = graph_of(lambda x: (x * x) + 1, np.float32(1))
    mul, add = graph.nodes
    assert producers(graph.nodes)[mul.outputs[0]] is mul
    assert consumers(graph) == {graph.inputs[0]: [mul], mul.outputs[0]: [add]}


def custom_jvp_sin():
    fn = jax.custom_jvp(jnp.sin)
    fn.defjvps(lambda t, y, x: t)
    return fn


def custom_vjp_sin():
    fn = jax.custom_vjp(jnp.sin)
    fn.defvjp(lambda x: (jnp.sin(x), None), lambda _, t: (t,))
    return fn


@pytest.mark.parametrize(
    "fn",
    [
        jax.jit(jnp.sin),
        jax.checkpoint(jnp.sin),
        lambda x: lax.stop_gradient(jnp.sin(x)),
        custom_jvp_sin(),
        custom_vjp_sin(),
    ],
)
def test_calls_are_inlined(fn):
    assert ops(graph_of(fn, np.float32(1))) == ["sin"]


def test_names_and_lines_of_the_user_are_kept():
    def fn(x):
        with jax.named_scope("outer"):
            return jax.jit(lambda y: jnp.sin(y))(x)

    (node,) = graph_of(fn, np.float32(1)).nodes
    assert node.scope.startswith("outer")
    assert "test_from_jaxpr.py" in node.source


def test_a_scan_is_unrolled_and_its_rows_put_together():
    graph = graph_of(lambda xs: lax.scan(lambda c, x: (c + x, c * x), 0.0, xs), np.ones((3, 2), np.float32)[:, 0])
    assert ops(graph).count("mul") == 3
    assert graph.nodes[-1].op == "concatenate"
    assert graph.outputs[1].shape == (3,)


@pytest.mark.slow
def test_loops_that_grow_too_long_are_refused():
    with pytest.raises(UnsupportedError, match=r"loops of over .* operations .*test_from_jaxpr.py"):
        graph_of(lambda x: lax.fori_loop(0, 10**6, lambda i, y: y + 1, x), np.float32(1))


def test_cond_computes_both_branches_unless_the_branch_is_known():
    def fn(p, x):
        return lax.cond(p, jnp.sin, jnp.cos, x)

    assert {"sin", "cos", "select_n"} <= set(ops(graph_of(fn, True, np.float32(1))))
    assert ops(graph_of(lambda x: fn(True, x), np.float32(1))) == ["sin"]


def test_keys_are_words():
    graph = graph_of(lambda key: jax.random.split(key, 4), jax.random.key(0))
    assert [graph.inputs[0].shape, graph.outputs[0].shape] == [(2,), (4, 2)]
    assert graph.outputs[0].dtype == np.uint32


@pytest.mark.parametrize(
    ("fn", "found"),
    [
        (lambda x: jnp.linalg.cholesky(x), r"cholesky\(float32\[2,2\]\) at .*test_from_jaxpr.py"),
        (lambda x: lax.while_loop(lambda y: y[0, 0] < 3, lambda y: y + 1, x), "known only on the device"),
        (lambda x: jax.pure_callback(lambda y: y, x, x), "pure_callback"),
        (lambda x: lax.complex(x, x), r"complex\(float32"),
    ],
)
def test_what_no_kernel_is_there_for_is_an_error_that_names_it(fn, found):
    with pytest.raises(UnsupportedError, match=found) as error:
        graph_of(fn, np.eye(2, dtype=np.float32))
    assert "\n" not in str(error.value)


def test_side_effects_are_refused():
    with pytest.raises(UnsupportedError, match="no side effects"):
        graph_of(lambda x: jax.debug.print("{}", x), np.float32(1))


def test_fold_computes_scalars_and_drops_what_does_nothing():
    def fn(x):
        y = x.reshape(3, 2).reshape(2, 3).astype(jnp.float32)[:, :]
        return jnp.where(jnp.float32(3) > 2, y, -y).transpose(0, 1)

    graph = dce(constant_fold(graph_of(fn, np.ones((2, 3), np.float32))))
    assert graph.nodes == []
    assert graph.outputs == graph.inputs


def test_fold_keeps_what_changes_a_value():
    graph = graph_of(lambda x: (x[::2], x.T, x.astype(jnp.int32)), np.ones((2, 2), np.float32))
    assert ops(constant_fold(graph)) == ["slice", "transpose", "convert_element_type"]


def test_chains_of_reshapes_become_one():
    graph = simplify(graph_of(lambda x: jnp.sin(x.reshape(6)[None].reshape(3, 2)), np.ones((2, 3), np.float32)))
    assert ops(graph) == ["reshape", "sin"]


def test_merge_computes_once_what_is_the_same():
    graph = cse(graph_of(lambda x: jnp.sin(x) + jnp.sin(x) * jnp.cos(x), np.float32(1)))
    assert sorted(ops(dce(graph))) == ["add", "cos", "mul", "sin"]


def test_merge_tells_parameters_and_dtypes_apart():
    graph = graph_of(lambda x: (x.sum(0), x.sum(1), x + jnp.float32(1), x + jnp.float32(2)), np.ones((2, 2), "f"))
    assert len(cse(graph).nodes) == 4


def test_a_recomputation_is_not_merged_with_what_it_recomputes():
    def loss(x):
        return jax.checkpoint(lambda y: jnp.sin(jnp.sin(y)))(x)

    graph = simplify(graph_of(jax.value_and_grad(loss), np.float32(1)))
    assert ops(graph).count("sin") == 3  # two forward, the inner one again
    assert "optimization_barrier" not in ops(graph)


def test_prune_drops_what_nobody_reads():
    table = np.ones((3, 3), np.float32)

    def fn(x):
        jnp.exp(x) @ table
        return x + 1

    graph = graph_of(fn, np.ones((3, 3), np.float32))
    assert len(graph.constants) == 1
    pruned = dce(graph)
    assert ops(pruned) == ["add"]
    assert pruned.constants == {}


def test_flatten_takes_barriers_out():
    graph = drop_barriers(graph_of(lambda x: lax.optimization_barrier(x) + 1, np.float32(1)))
    assert ops(graph) == ["add"]
    assert graph.nodes[0].inputs[0] is graph.inputs[0]
