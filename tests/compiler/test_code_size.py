"""Code grows with the length of a function, and no kernel has more than is good for a driver's compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_from_jaxpr import graph_of
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.compiler.codegen import kernels
from vk_kernels.compiler.codegen.code_size import CodeSize
from vk_kernels.compiler.ir import Graph
from vk_kernels.compiler.partition import partition
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.compiler.roots import MOST_CODE


def scan_gradient(turns):
    def last(c, xs):
        return jax.lax.scan(lambda c, x: (jnp.tanh(c * x + 1), None), c, xs)[0]

    return jax.grad(last, (0, 1)), (np.float32(0.5), np.linspace(-1, 1, turns, dtype=np.float32))


def scan_sums(turns):
    """All rows of a loop, put together, and summed up."""

    def total(c, xs):
        c, ys = jax.lax.scan(lambda c, x: (jnp.sin(c) * x + jnp.cos(c), c), c, xs)
        return c + (ys * ys).sum()

    return jax.value_and_grad(total, (0, 1)), (np.float32(0.5), np.linspace(-1, 1, turns, dtype=np.float32))


def chain(turns):
    def chained(x):
        for _ in range(turns):
            x = jnp.sin(x) + 0.5 * x
        return x

    return chained, (np.linspace(-1, 1, 64, dtype=np.float32),)


def associative_scan(turns):
    return lambda x: jax.lax.associative_scan(jnp.add, x), (np.ones((turns, 2), np.float32),)


def associative_scan_of_pairs(turns):
    def combine(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    pair = np.linspace(0, 1, 2 * turns, dtype=np.float32).reshape(turns, 2), np.ones((turns, 2), np.float32)
    return lambda *xs: jax.lax.associative_scan(combine, xs), pair


def mlp(turns):
    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x.sum()

    return jax.grad(loss), ([np.eye(8, dtype=np.float32)] * turns, np.ones((4, 8), np.float32))


PROGRAMS = [scan_gradient, scan_sums, chain, associative_scan, associative_scan_of_pairs, mlp]


def kernels_of(program, turns) -> list[tuple[int, int]]:
    """Bytes of each kernel, and how many results its graph has, which may stand side by side in it."""
    fn, args = program(turns)
    graphs = [step.graph for step in partition(simplify(graph_of(fn, *args))).steps if step.graph]
    return [(len(kernel.spirv), len(graph.outputs)) for graph in graphs for kernel in kernels.generate(graph).kernels]


def code_of(program, turns) -> list[int]:
    """Bytes of each kernel."""
    return [size for size, _ in kernels_of(program, turns)]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_code_grows_no_faster_than_a_function(program):
    long = kernels_of(program, 64)
    assert sum(size for size, _ in long) < 6 * sum(code_of(program, 16))
    assert all(size < 1.5 * MOST_CODE * min(results, 4) for size, results in long)


def test_many_rows_are_put_together_by_a_few_at_a_time():
    kernels = code_of(lambda n: (lambda *xs: jnp.stack([2 * x for x in xs]), [np.float32(i) for i in range(n)]), 300)
    assert max(kernels) < 1.5 * MOST_CODE


def test_what_stands_side_by_side_has_a_limit_too():
    """Many results that need much code each, and nothing of each other."""

    def results(n):
        return lambda xs: [jnp.tan(jnp.sin(x) * x) * jnp.cos(x) for x in xs], [[np.ones(8 + i) for i in range(n)]]

    kernels = code_of(results, 60)
    assert sum(kernels) > 5 * MOST_CODE
    assert max(kernels) < 6 * MOST_CODE


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.sin(x) * jnp.cos(x) + jnp.tanh(x),
        lambda x: jnp.concatenate([jnp.sin(x), jnp.cos(x), x * 2]),
        lambda x: jnp.exp(x[::2] - x[1::2]) + jnp.exp(x[1::2]),
        lambda x: jnp.sum(jnp.log1p(x * x).reshape(8, 8), 1),
        lambda x: jax.random.bits(jax.random.key(0), (64,)) + x.astype(jnp.uint32),
        lambda x: jnp.pad(jnp.sinh(x), 3)[jnp.arange(9)],
    ],
)
def test_code_is_as_long_as_expected(fn):
    graph = simplify(graph_of(fn, np.ones(64, np.float32)))
    size = CodeSize()
    for node in graph.nodes:
        size.add(node)
    (kernel,) = kernels.generate(Graph((*graph.inputs, *graph.constants), {}, graph.nodes, graph.outputs)).kernels
    actual = len(kernel.spirv) - 1500  # declarations, and to find a thread's element
    assert 0.5 * actual < size[graph.outputs[0]] < 2 * actual + 1000


def test_a_slice_of_what_was_put_together_is_of_the_array_that_it_is_from():
    """As one loop's rows are, which the loop of a gradient takes one by one."""

    def slices(x, y):
        whole = jnp.concatenate([x, y * 2, x[:1]])
        return whole[4:9:2], whole[10:11], whole[3:5]

    graph = simplify(graph_of(slices, np.ones(4, np.float32), np.ones(6, np.float32)))
    makers = {out: node.op for node in graph.nodes for out in node.outputs}
    found = {
        (makers.get(node.inputs[0]), node.params["start_indices"], node.params["limit_indices"])
        for node in graph.nodes
        if node.op == "slice"
    }
    assert found == {("mul", (0,), (5,)), (None, (0,), (1,)), ("concatenate", (3,), (5,))}


@needs_vulkan
@pytest.mark.parametrize(("program", "turns"), [(scan_gradient, 24), (scan_sums, 8), (chain, 24)])
def test_what_is_cut_gives_the_same(program, turns):
    fn, args = program(turns)
    found, expected = vk_kernels.jit(fn, device=SELECTOR)(*args), jax.jit(fn)(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@needs_vulkan
def test_associative_scans_of_many_rows():
    """As one kernel, 0.8 MB of code, on which lavapipe takes gigabytes."""
    functions = [associative_scan(70), associative_scan_of_pairs(33)]
    found, expected = (
        jitted(lambda xs: [fn(*x) for (fn, _), x in zip(functions, xs, strict=True)])([args for _, args in functions])
        for jitted in (lambda fn: vk_kernels.jit(fn, device=SELECTOR), jax.jit)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
