"""Rematerialization: less memory, the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_graph import normal
from test_from_jaxpr import graph_of
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.compiler import pipeline
from vk_kernels.compiler.ir import producers
from vk_kernels.compiler.passes.rematerialize import LEAST_BYTES, rematerialize
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.ops.layer_norm.reference import (
    layer_norm_forward_reference,
    layer_norm_rule,
    residual_layer_norm_forward_reference,
    residual_layer_norm_rule,
)
from vk_kernels.ops.matmul.reference import matmul_forward_reference, matmul_rule

ROWS, WIDTH, LAYERS = 4096, 64, 4
X, RNG = normal(ROWS, WIDTH), np.zeros(2, np.uint32)
PARAMS = {
    "scale": 1 + 0.1 * normal(LAYERS, WIDTH),
    "bias": 0.1 * normal(LAYERS, WIDTH, seed=1),
    "into": normal(LAYERS, WIDTH, WIDTH, seed=2) / 8,
    "out": normal(LAYERS, WIDTH, WIDTH, seed=3) / 8,
}


def loss(params, x, layers: int = LAYERS, rate: float = 0.0):
    """A loss of blocks as in a transformer: 2 arrays of each are to be computed again, the norm and the GELU."""
    branch = None
    for i in range(layers):
        scale, bias = params["scale"][i], params["bias"][i]
        if branch is None:
            normed = ops.layer_norm(x, scale, bias)
        else:
            x, normed = ops.residual_layer_norm(x, branch, scale, bias, RNG, dropout_rate=rate, site=i)
        branch = ops.matmul(ops.matmul(normed, params["into"][i], activation="gelu"), params["out"][i])
    return jnp.square(x + branch).mean()


def graph(layers: int = LAYERS, rate: float = 0.0):
    with vk_kernels.use("vulkan", device=SELECTOR):
        return simplify(graph_of(jax.value_and_grad(lambda params, x: loss(params, x, layers, rate)), PARAMS, X))


def large_operands(found, op: str) -> list[str]:
    """The nodes that give the large operand of each product's gradient: (dy, x, w, ...)."""
    made = producers(found.nodes)
    return [made[node.inputs[1]].op for node in found.nodes if node.op == op]


pytestmark = needs_vulkan


def test_what_is_read_late_and_follows_from_what_is_kept_is_computed_again():
    before = graph()
    after = rematerialize(before)
    operands = large_operands(after, "matmul_backward")
    # The newest first. Between the last layer's forward and backward pass there is no time to win.
    norms = ["residual_layer_norm"] * (LAYERS - 1) + ["layer_norm"]
    assert large_operands(before, "matmul_backward") == [op for norm in norms for op in ("matmul", norm)]
    assert operands[:2] == ["matmul", "residual_layer_norm"]
    assert not {"matmul", *norms} & set(operands[3:])
    assert [node.op for node in after.nodes if node.call] == [node.op for node in before.nodes if node.call]


def test_rules_of_layers_are_traced_once(monkeypatch):
    before, traced, make_jaxpr = graph(rate=0.1), [], jax.make_jaxpr  # each layer draws at a site of its own
    monkeypatch.setattr(jax, "make_jaxpr", lambda fn: traced.append(fn) or make_jaxpr(fn))
    rematerialize(before)
    assert len(traced) == 5  # both norms, the sum before one, a GELU's product and its argument: two have no rule


def test_what_is_small_or_soon_read_again_is_kept():
    assert str(rematerialize(graph(), least_bytes=LEAST_BYTES + 1)) == str(graph())
    assert str(rematerialize(graph(), most_bytes=LEAST_BYTES - 1)) == str(graph())
    assert str(rematerialize(graph(layers=1))) == str(graph(layers=1))


def test_what_is_read_late_and_no_kernel_op_gives_is_kept():
    def function(x, w):
        y = kept = jnp.tanh(x)
        for _ in range(4):
            y = ops.matmul(y, w)
        return y + kept

    with vk_kernels.use("vulkan", device=SELECTOR):
        before = simplify(graph_of(function, X, PARAMS["into"][0]))
    assert str(rematerialize(before)) == str(before)


def test_gradients_are_those_of_xla_and_take_less_memory(monkeypatch):
    fn = jax.value_and_grad(loss)
    compiled = vk_kernels.jit(fn, device=SELECTOR)
    found = compiled(PARAMS, X)
    expected = jax.jit(fn)(PARAMS, X)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(jnp.abs(y).max()))
    monkeypatch.setattr(pipeline, "rematerialize", lambda graph: graph)
    kept = vk_kernels.jit(fn, device=SELECTOR).cost(PARAMS, X)
    assert kept.arena_bytes - compiled.cost(PARAMS, X).arena_bytes >= (LAYERS - 2) * X.nbytes


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_rule_gives_what_the_operation_gave(dtype):
    x = jnp.asarray(X[:8], dtype)
    scale, bias = PARAMS["scale"][0], PARAMS["bias"][0]
    results = layer_norm_forward_reference(x, scale, bias)
    again = layer_norm_rule((x, scale, bias), results, epsilon=1e-5)
    np.testing.assert_allclose(np.float32(again[0]), np.float32(results[0]), rtol=1e-6, atol=1e-6)
    results = residual_layer_norm_forward_reference(x, x + 1, scale, bias, dropout_rate=0.0, site=0)
    again = residual_layer_norm_rule((x, x + 1, scale, bias), results, dropout_rate=0.0, site=0)
    np.testing.assert_allclose(np.float32(again[1]), np.float32(results[1]), rtol=1e-6, atol=1e-6)
    options = {"activation": "gelu", "has_bias": False, "has_residual": False, "dropout_rate": 0.0, "site": 0}
    results = matmul_forward_reference(x, jnp.asarray(PARAMS["into"][0], dtype), **options)
    again = matmul_rule((x, None), results, **options)
    np.testing.assert_array_equal(again[0], results[0])
    assert matmul_rule((x, None), results, **options | {"has_residual": True}) == (None, None)
