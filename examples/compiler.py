"""Follows one function through the compiler and prints it after every pass, as in docs/compiler.md.

python examples/compiler.py
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import vk_kernels
from vk_kernels import ops
from vk_kernels.compiler import pipeline
from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.compiler.ir import Graph
from vk_kernels.compiler.partition import Step, partition

Weights = tuple[jax.Array, jax.Array]
PASSES: Sequence[Callable[[Graph], Graph]] = (
    pipeline.simplify,
    pipeline.fuse_forward_backward,
    pipeline.fuse_epilogues,
    pipeline.rematerialize,
)


def loss(weights: Weights, head: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
    hidden = ops.matmul(x, weights[0], activation="gelu")
    return ops.linear_cross_entropy(ops.matmul(hidden, weights[1]), head, targets).mean()


def step(
    weights: Weights, head: jax.Array, x: jax.Array, targets: jax.Array, log_rate: jax.Array
) -> tuple[jax.Array, Weights]:
    value, (slope, _) = jax.value_and_grad(loss)(weights, head, x, targets)
    rate = jnp.exp(log_rate) / (1 + jnp.exp(log_rate))
    return value, (weights[0] - rate * slope, weights[1])


def show(title: str, text: object) -> None:
    print(f"{title}:\n\n{text}\n")


def described(one: Step) -> str:
    if one.graph:
        return f"level {one.level}: kernels are generated for {' '.join(node.op for node in one.graph.nodes)}"
    return f"level {one.level}: the kernels of {one.node.op if one.node else ''}"


weights = jnp.ones((32, 64)), jnp.ones((64, 64))
arguments = weights, jnp.ones((64, 100)), jnp.ones((16, 32)), jnp.zeros(16, jnp.int32), jnp.float32(-1.0)
with vk_kernels.use("vulkan"):
    graph = make_graph(jax.make_jaxpr(step)(*arguments))
show("make_graph", graph)
for one_pass in PASSES:
    before, graph = str(graph), one_pass(graph)
    show(one_pass.__name__, graph if str(graph) != before else "the same")
steps = partition(graph, pipeline.MOST_BUFFERS, pipeline.MOST_REDUCTIONS).steps
show("partition", "\n".join(map(described, steps)))
show("program", vk_kernels.jit(step).lower(*arguments).as_text())
