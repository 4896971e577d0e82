"""Rematerialization: late readers of a large array read a second computation of it, and it is not kept until then.

Of a train step's memory most is what the forward pass keeps for the backward pass. Some of that follows, element by
element, from other arrays that are kept anyway: an activation from its argument, a layer norm from what it normalises.
It takes the time of a copy, beside other work, and saves the memory of the whole way through the later layers. Not so
for arrays that no cache holds: their copies go through memory, and the time is better spent.
"""

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jax.extend.core import ClosedJaxpr

from vk_kernels.compiler.from_jaxpr import inline, trace
from vk_kernels.compiler.ir import Graph, Node, Operand, Value
from vk_kernels.compiler.op_registry import kernel_op
from vk_kernels.compiler.passes.simplify import constant_fold, dce

LEAST_BYTES = 1 << 20  # of an array that is worth it
MOST_BYTES = 16 << 20  # of an array that a cache holds, with what it is made of
LEAST_DISTANCE = 3  # kernel ops between one reader and the next: so long it would be kept for the latter alone
_MOST_KEPT = 1 / 8  # of its bytes, that may have to be kept to compute it


def rematerialize(
    graph: Graph,
    least_bytes: int = LEAST_BYTES,
    most_bytes: int = MOST_BYTES,
    least_distance: int = LEAST_DISTANCE,
) -> Graph:
    """The graph with late readers of arrays that have a rule reading a second computation of them."""
    found = _Readers(graph)
    before: dict[Node, list[Node]] = {}  # new nodes, by the node that they stand before
    known: dict[Node, dict[Value, Operand]] = {}  # new operands of a node
    traces: dict[Hashable, ClosedJaxpr] = {}
    for node in graph.nodes:
        if not node.call or kernel_op(node.op).rematerialize is None:
            continue
        large = [k for k, out in enumerate(node.outputs) if least_bytes <= out.nbytes <= most_bytes]
        late = {k: readers for k in large if (readers := found.late(node, node.outputs[k], least_distance))}
        for k, readers in late.items():
            nodes, result = _recompute_nodes(node, k, traces)
            kept_for_it = sum(x.nbytes for x in _needs(nodes) if not found.outlives(x, node.outputs[k]))
            if result is None or kept_for_it > _MOST_KEPT * node.outputs[k].nbytes:
                continue
            before.setdefault(readers[0], []).extend(nodes)
            for reader in readers:
                for x in reader.inputs:
                    if found.base(x) is node.outputs[k]:
                        views, operand = _reshape_like(result, x, node)
                        before[readers[0]] += views
                        known.setdefault(reader, {})[x] = operand
    nodes = []
    for node in graph.nodes:
        nodes += before.get(node, [])
        changed = known.get(node)
        nodes.append(replace(node, inputs=tuple(changed.get(x, x) for x in node.inputs)) if changed else node)
    return dce(Graph(graph.inputs, graph.constants, nodes, graph.outputs))


def _recompute_nodes(node: Node, k: int, traces: dict[Hashable, ClosedJaxpr]) -> tuple[list[Node], Operand | None]:
    """The nodes that compute a result again, and what they give; None without a rule for it.

    traces: of rules, by all that they follow from: those of the layers of a model are the same.
    """
    count, again = len(node.inputs), kernel_op(node.op).rematerialize
    read = {name: node.params[name] for name in inspect.signature(again).parameters if name in node.params}

    def rule(*arrays: Any) -> Any:
        return again(arrays[:count], arrays[count:], **read)[k]

    values = (*node.inputs, *node.outputs)
    key = again, tuple(read.items()), k, count, tuple(x.spec for x in values)
    if key not in traces:
        traces[key] = trace(rule, values)
    nodes, results = inline(traces[key], values, node)
    if not results:
        return [], None
    graph = dce(constant_fold(Graph(values, {}, nodes, tuple(results))))
    return graph.nodes, graph.outputs[0]


def _needs(nodes: Sequence[Node]) -> set[Value]:
    made = {out for node in nodes for out in node.outputs}
    return {x for node in nodes for x in node.inputs if isinstance(x, Value)} - made


def _reshape_like(result: Operand, like: Value, node: Node) -> tuple[list[Node], Operand]:
    """`result` in the shape of `like`, and the nodes that it takes."""
    if result.shape == like.shape:
        return [], result
    out = Value(like.shape, like.dtype)
    params = {"new_sizes": like.shape, "dimensions": None}
    return [Node("reshape", (result,), (out,), params, node.source, node.scope)], out


class _Readers:
    """Who reads each array of a graph, and when. Reshapes are no readers: they are the array itself."""

    def __init__(self, graph: Graph):
        self._bases: dict[Value, Value] = {}
        self._order: dict[Node, int] = {}
        self._clock: dict[Node, int] = {}  # kernel ops before a node
        self._readers: dict[Value, list[Node]] = {}
        kernel_ops = 0
        for i, node in enumerate(graph.nodes):
            self._order[node], self._clock[node] = i, kernel_ops
            kernel_ops += bool(node.call)
            if node.op == "reshape":
                self._bases[node.outputs[0]] = self.base(node.inputs[0])
                continue
            for x in dict.fromkeys(map(self.base, node.inputs)):
                self._readers.setdefault(x, []).append(node)
        self._kept = {*graph.inputs, *graph.constants, *map(self.base, graph.outputs)}

    def base(self, x: Operand) -> Operand:
        return self._bases.get(x, x)

    def late(self, producer: Node, value: Value, distance: int) -> list[Node]:
        """The readers of a value after the longest time without one, if that is long enough."""
        readers = self._readers.get(value, [])
        if value in self._kept or not readers:
            return []
        times = [self._clock[node] for node in (producer, *readers)]
        gap, i = max((after - before, i) for i, (before, after) in enumerate(pairwise(times)))
        return readers[i:] if gap > distance else []

    def outlives(self, x: Value, value: Value) -> bool:
        """Whether `x` is in memory for as long as `value` is read."""
        x = self.base(x)
        return x in self._kept or self._last(x) >= self._last(value)

    def _last(self, value: Value) -> int:
        return max((self._order[node] for node in self._readers.get(value, [])), default=-1)
