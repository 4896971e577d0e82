"""Heroes, section keys, frontiers and stages: what each kernel of a graph writes. Plain data, no device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_graph import graph_of

from vk_kernels.compiler.codegen.geometry import Geometry
from vk_kernels.compiler.codegen.heroes import Heroes, MapKey, RankKey, ReduceKey
from vk_kernels.compiler.codegen.kernel_stages import combine_pieces, numbers, plan_stage, without_common_arrays
from vk_kernels.compiler.codegen.kernels import generate
from vk_kernels.compiler.ir import Node

X = np.ones((40, 100), np.float32)
ROWS, COLUMNS = Geometry(X.shape, (1,)), Geometry(X.shape, (0,))
LONG = np.ones(90_001, np.float32)


class Analysed:
    """A function's graph, its heroes, and the values that it returns."""

    def __init__(self, fn: Callable, *args: np.ndarray):
        self.graph, _ = graph_of(fn, *args)
        self.memory = {value: i for i, value in enumerate(self.graph.inputs)}
        self.heroes = Heroes(self.graph, self.memory)
        self.outputs = self.graph.outputs

    def node(self, op: str) -> Node:
        (node,) = (node for node in self.graph.nodes if node.op == op)
        return node

    def keys(self) -> list:
        return [self.heroes.section_key(value) for value in self.outputs]

    def stage(self):
        scratch = iter(range(100, 200))
        wanted = [(value, 10 + i) for i, value in enumerate(self.outputs)]
        return plan_stage(self.heroes, wanted, lambda value: next(scratch))


def test_heroes_are_long_reductions_and_sorts_through_any_number_of_others():
    found = Analysed(lambda x: (jnp.exp(x.sum(1)) * 2, x + 1, x[:, :8].sum(1), jnp.sort(x, 1)[:, 0]), X)
    sums = [node for node in found.graph.nodes if node.op == "reduce_sum"]
    expected = [{sums[0]}, set(), set(), {found.node("sort")}]  # a sum of 8 elements is one thread's
    assert [set(found.heroes.of(value)) for value in found.outputs] == expected


def test_what_is_in_memory_has_no_heroes():
    found = Analysed(lambda x: x.sum(1) + 1, X)
    total = found.node("reduce_sum").outputs[0]
    assert Heroes(found.graph, {*found.memory, total}).of(found.outputs[0]) == set()


def test_section_keys_say_what_goes_together():
    def fn(x, long):
        total = x.sum(1, keepdims=True)
        return x * 2, x / total, jnp.exp(total), x.max(1), x.max(0), jnp.sort(x), x[:2] / total[:2], long.sum()

    found = Analysed(fn, X, LONG)
    expected = [MapKey(X.shape), *3 * [ReduceKey(ROWS)], ReduceKey(COLUMNS), RankKey(found.node("sort")), None, None]
    assert found.keys() == expected  # two rows are neither the whole nor what is kept; `long` is split


@pytest.mark.parametrize(
    "fn",
    [lambda x: x.sum(1) + x.sum(0)[:40], lambda x: jnp.sort(x) + 1, lambda x: jnp.sort(x).sum(1)],
    ids=["two geometries", "more than a sort", "a sum of a sort"],
)
def test_what_needs_several_heroes_in_turn_has_no_section_yet(fn):
    assert Analysed(fn, X).keys() == [None]


def test_the_frontier_of_the_docstrings_example():
    found = Analysed(lambda x: (y := jnp.sort(x)) / y.sum(1, keepdims=True), X)
    (value,), sort, total = found.outputs, found.node("sort"), found.node("reduce_sum")
    assert found.heroes.of(value) == {sort, total}
    assert found.heroes.frontier(value) == [sort]
    after = Heroes(found.graph, {*found.memory, *sort.outputs})
    assert (after.of(value), after.section_key(value)) == ({total}, ReduceKey(ROWS))


def test_a_frontier_holds_the_last_heroes_that_can_be_made_not_those_inside_them():
    found = Analysed(lambda x: (x - x.max(1, keepdims=True)).sum(1)[:, None] + x.sum(0, keepdims=True), X)
    sums = [node for node in found.graph.nodes if node.op == "reduce_sum"]
    assert set(found.heroes.frontier(found.outputs[0])) == set(sums)
    assert all(map(found.heroes.is_closed, found.heroes.all))


def test_levels_are_by_what_needs_what_in_turn():
    found = Analysed(lambda x: (x.min(1), ((x - x.max(1, keepdims=True)) ** 2).sum(1)), X)
    levels = found.heroes.levels(found.outputs)
    assert [{node.op for node in level} for level in levels] == [{"reduce_min", "reduce_max"}, {"reduce_sum"}]
    assert found.heroes.levels(found.outputs[:1]) == [[found.node("reduce_min")]]


def test_a_stage_writes_what_it_can_and_stores_the_frontier_of_the_rest():
    def fn(x):
        y = jnp.sort(x)
        return x + 1, y / y.sum(1, keepdims=True), x.sum(1)

    found = Analysed(fn, X)
    stage = found.stage()
    (ordered,) = found.node("sort").outputs
    assert stage.outputs == [(found.outputs[0], 10), (found.outputs[2], 12)]
    assert stage.results == [(ordered, 100)]
    assert (stage.pieces, stage.memory) == ({}, {ordered: 100})


def test_a_result_of_the_frontier_that_is_an_output_is_stored_once():
    found = Analysed(lambda x: (y := jnp.sort(x), y + 1), X)
    assert found.stage().results == [(found.outputs[0], 10)]


def test_a_split_reduction_is_of_its_pieces_in_the_next_kernel():
    found = Analysed(lambda x: x.sum() * 2, LONG)
    total, stage = found.node("reduce_sum"), found.stage()
    partial, operand = stage.pieces[total]
    assert (partial.shape, operand, stage.results) == ((found.heroes.geometry[total].splits,), 100, [])
    combined = combine_pieces(found.graph, stage.pieces)
    (after,) = (node for node in combined.nodes if node.op == "reduce_sum")
    assert (after.inputs, after.params, after.outputs) == ((partial,), {"axes": (0,)}, total.outputs)
    assert [node.op for node in combined.nodes] == [node.op for node in found.graph.nodes]


def test_outputs_are_apart_where_they_have_no_array_in_common():
    def fn(a, b, c, one):
        return a + 1, b * one, (a - c).T, jnp.tanh(b), c[0] * one

    found = Analysed(fn, *(np.ones((4, 4), np.float32) for _ in range(3)), np.float32(3))
    groups = without_common_arrays(found.outputs, found.heroes.producers, found.memory.keys(), numbers(found.graph))
    assert groups == [[0, 2, 4], [1, 3]]  # a and c meet in the third; `one` is a number, which ties nothing together


def test_numbers_are_what_needs_no_array():
    found = Analysed(lambda x, one: (jnp.broadcast_to(one * 2, (4, 4)) + 1, x + one), np.ones((4, 4)), np.float32(3))
    assert [value in numbers(found.graph) for value in found.outputs] == [True, False]


@pytest.mark.parametrize(
    ("fn", "kernels"),
    [
        (lambda x: (x + 1, jax.nn.softmax(x), x.sum(0)), 1),
        (lambda x: jnp.sort(x) + 1, 2),
        (lambda x: (y := jnp.sort(x)) / y.sum(1, keepdims=True), 2),
        (lambda x: (x - x.sum(1, keepdims=True)).max(0), 2),
        (lambda x: jnp.cumsum(jax.nn.softmax(jnp.sort(x)), 1), 2),
        (lambda x: x[:0], 0),
    ],
)
def test_as_many_kernels_as_what_waits_in_turn(fn, kernels):
    graph, _ = graph_of(fn, X)
    made = generate(graph).kernels
    assert len(made) == kernels
    written: set[int] = set(range(len(graph.inputs)))
    for kernel in made:
        reads = {operand for operand, writes in zip(kernel.operands, kernel.writes, strict=True) if not writes}
        assert reads <= written  # each kernel reads what those before it wrote
        written |= set(kernel.operands)
