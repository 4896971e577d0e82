"""An operation and its gradient as one: where that can be, and that it changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_graph import normal
from test_from_jaxpr import graph_of
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.compiler.ir import producers
from vk_kernels.compiler.passes.fuse_forward_backward import fuse_forward_backward
from vk_kernels.compiler.passes.simplify import simplify

pytestmark = needs_vulkan

TOKENS, WIDTH, VOCAB = 24, 8, 40
X, W = normal(TOKENS, WIDTH), normal(WIDTH, VOCAB, seed=1)
TARGETS = np.random.default_rng(2).integers(-1, VOCAB, TOKENS).astype(np.int32)
BOTH = "linear_cross_entropy_both_passes"


def mean_loss(x, w, targets):
    """Counts targets that are not ignored, and gives what is made of the losses beside the gradient."""
    losses = ops.linear_cross_entropy(x, w, targets)
    mean = losses.sum() / jnp.maximum((targets >= 0).sum(), 1).astype(jnp.float32)
    return mean, {"largest": losses.max(), "perplexity": jnp.exp(mean)}


@jax.grad
def gradient_of_squares(x, w, targets):
    return jnp.square(ops.linear_cross_entropy(x, w, targets)).mean()


def gradient_by_the_losses(x, w, targets):
    losses, pull_back = jax.vjp(lambda x, w: ops.linear_cross_entropy(x, w, targets), x, w)
    return pull_back(losses)


def two_heads(x, w, targets):
    first, rest = mean_loss(x, w, targets)
    second, _ = mean_loss(x * 2, w, targets[::-1])
    return first + second, rest


def gradients_of(loss):
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def joined(function, *arguments):
    with vk_kernels.use("vulkan", device=SELECTOR):
        plain = simplify(graph_of(function, *arguments))
    return plain, fuse_forward_backward(plain)


def operations(graph):
    return [node.op for node in graph.nodes if node.op.startswith("linear_cross_entropy")]


@pytest.mark.parametrize(("loss", "count"), [(mean_loss, 1), (two_heads, 2)])
def test_a_loss_is_joined_with_its_gradient(loss, count):
    plain, found = joined(gradients_of(loss), X, W, TARGETS)
    assert len(operations(plain)) == 2 * count
    assert operations(found) == [BOTH] * count
    made = set(found.inputs) | set(found.constants)
    makers = producers(found.nodes)
    for node in found.nodes:  # still in order
        assert all(x in made for x in node.inputs if x in makers)
        made.update(node.outputs)
    assert found.outputs == plain.outputs


@pytest.mark.parametrize("gradient", [gradient_of_squares, gradient_by_the_losses])
def test_a_gradient_that_waits_for_the_losses_is_not_joined(gradient):
    plain, found = joined(gradient, X, W, TARGETS)
    assert str(found) == str(plain)
    assert len(operations(found)) == 2


def test_a_loss_alone_stays_alone():
    _, found = joined(mean_loss, X, W, TARGETS)
    assert operations(found) == ["linear_cross_entropy"]


@pytest.mark.parametrize(
    "function",
    [*map(gradients_of, (mean_loss, two_heads)), gradient_of_squares, gradient_by_the_losses],
)
def test_results_are_those_of_xla(function):
    expected = jax.jit(function)(X, W, TARGETS)
    found = vk_kernels.jit(function, device=SELECTOR)(X, W, TARGETS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, expected)
