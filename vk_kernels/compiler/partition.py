"""Partition: which nodes become one kernel.

A kernel op is a step of its own; generated kernels are made of roots, the values in memory (`roots`), each with all
that it alone needs. In order: `find_roots`, `find_depths`, `soonest_depths`, `reductions_first`, `form_kernels`.

The depth of a root is the longest way from it to the end of the program, counted in steps. Roots of one depth need
nothing of each other, and become one step together (horizontal fusion): each is computed as late as it can be. But
inputs that are only converted to a smaller type, as a model's parameters to bfloat16, are all converted first;
elementwise roots come forward to the long reductions of all that they load (an optimizer's update to its norms), so
that it is read once; and outputs that the caller wants soon come as soon as they can. No more roots stand side by side
in a kernel than it can bind, or than is good for a compiler.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vk_kernels.compiler.codegen.geometry import is_split
from vk_kernels.compiler.codegen.primitives import EXPENSIVE
from vk_kernels.compiler.ir import Graph, Literal, Node, Operand, Value
from vk_kernels.compiler.roots import FREE, MOST_BUFFERS, MOST_CODE, SPARE_BUFFERS, Roots, find_roots

MOST_REDUCTIONS = 64  # that a generated kernel does, or products or sorts

_MOST_JOINED = 4 * MOST_CODE  # bytes of code of all that a generated kernel stores, side by side

_MOST_PARTS = 32  # of a concatenation, in one piece of code


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a program: a kernel op, or a graph to generate kernels for.

    inputs, outputs: arrays in memory, in the order of the operation's or the graph's own. level: steps of one level
    need nothing of each other; later levels need earlier ones.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    level: int
    node: Node | None = None
    graph: Graph | None = None

    @property
    def scope(self) -> str:
        """The node's scope, or what the scopes of all nodes that compute have in common; where those begin with
        different names, of the nodes under the name that has the most elements."""
        if self.node:
            return self.node.scope
        nodes = [node for node in self.graph.nodes if node.op not in FREE] or self.graph.nodes
        elements: Counter[str] = Counter()
        for node in nodes:
            if node.scope:
                elements[node.scope.split("/")[0]] += sum(out.size for out in node.outputs)
        ((name, _),) = elements.most_common(1) or [("", 0)]
        return common_scope(node.scope for node in nodes if node.scope.split("/")[0] == name)


@dataclass(frozen=True)
class Partition:
    """Steps in order. `constants` are all that are read; `outputs` say which array in memory each output is."""

    inputs: tuple[Value, ...]
    constants: dict[Value, np.ndarray]
    steps: list[Step]
    outputs: tuple[Value, ...]


def common_scope(scopes: Iterable[str]) -> str:
    """The names that all of some scopes begin with."""
    parts = [scope.split("/") for scope in dict.fromkeys(scopes)]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return "/".join(shared)


def partition(
    graph: Graph,
    most_buffers: int = MOST_BUFFERS,
    most_reductions: int = MOST_REDUCTIONS,
    output_groups: Sequence[Sequence[int]] = (),
) -> Partition:
    """Cuts a graph into steps; a generated one binds `most_buffers` and has `most_reductions` at most.

    output_groups: outputs, by number, that are made together, as soon as the last of each group can be; without one, an
    output that nothing waits for is made at the end.

    What one root needs may be more than MOST_BUFFERS, but never more than fewer `most_buffers`: a device's limit.
    """
    most = min(_MOST_PARTS, most_buffers - SPARE_BUFFERS)
    graph = _with_constants(graph)
    graph = replace(graph, nodes=[part for node in graph.nodes for part in _in_a_tree(node, most)])
    roots = find_roots(graph, most_buffers)
    soon = soonest_depths(roots, find_depths(roots), output_groups)
    depths = find_depths(roots, soon)
    depths = find_depths(roots, soon | reductions_first(roots, depths))
    steps = form_kernels(roots, depths, most_buffers, most_reductions)
    outputs = tuple(map(roots.base, graph.outputs))
    read = {x for step in steps for x in step.inputs} | set(outputs)
    constants = {value: array for value, array in graph.constants.items() if value in read}
    return Partition(graph.inputs, constants, steps, outputs)


def _with_constants(graph: Graph) -> Graph:
    """Literals that must be in memory, as operands of kernel ops or outputs, become constants."""
    constants = dict(graph.constants)
    made: dict[tuple, Value] = {}

    def stored(x: Operand) -> Value:
        if isinstance(x, Value):
            return x
        key = x.value.tobytes(), x.dtype, x.shape
        if key not in made:
            made[key] = Value(x.shape, x.dtype)
            constants[made[key]] = x.value
        return made[key]

    nodes = [replace(node, inputs=tuple(map(stored, node.inputs))) if node.call else node for node in graph.nodes]
    return Graph(graph.inputs, constants, nodes, tuple(map(stored, graph.outputs)))


def _in_a_tree(node: Node, most: int) -> Iterable[Node]:
    """A concatenation of more arrays than `most` as one of concatenations; any other node as it is."""
    if node.op != "concatenate" or len(node.inputs) <= most:
        return [node]
    axis, size = node.params["dimension"], -(-len(node.inputs) // most)
    parts = []
    for start in range(0, len(node.inputs), size):
        arrays = node.inputs[start : start + size]
        shape = list(node.outputs[0].shape)
        shape[axis] = sum(x.shape[axis] for x in arrays)
        parts.append(replace(node, inputs=arrays, outputs=(Value(tuple(shape), node.outputs[0].dtype),)))
    whole = replace(node, inputs=tuple(part.outputs[0] for part in parts))
    return [*(small for part in parts for small in _in_a_tree(part, most)), whole]


def find_depths(roots: Roots, least: Mapping[Node, int] | None = None) -> dict[Node, int]:
    """The depth of each root; those in `least` are as deep as that at least."""
    depths: dict[Node, int] = {}
    needed = dict(least or {})
    for node, values in reversed(roots.needs.items()):
        depth = depths[node] = needed.get(node, 0)
        for value in values:
            maker = roots.makers.get(value)
            if maker is not None:
                step = 1 if value in roots.loaded or node.call else 0
                needed[maker] = max(needed.get(maker, 0), depth + step)
    deepest, inputs = max(depths.values(), default=0), set(roots.graph.inputs)
    return {
        node: deepest if _is_smaller(node) and roots.base(node.inputs[0]) in inputs else depth
        for node, depth in depths.items()
    }


def soonest_depths(roots: Roots, depths: Mapping[Node, int], output_groups: Sequence[Sequence[int]]) -> dict[Node, int]:
    """The depth of the roots that make groups of outputs: the greatest that all of a group can have."""
    levels: dict[Node, int] = {}  # the longest way to each root from the start of the program
    for node, values in roots.needs.items():
        steps = ((roots.makers.get(x), int(x in roots.loaded or bool(node.call))) for x in values)
        levels[node] = max((levels[maker] + step for maker, step in steps if maker), default=0)
    deepest, found = max(depths.values(), default=0), {}
    for group in output_groups:
        makers = [roots.makers.get(roots.base(roots.graph.outputs[j])) for j in group]
        own = [maker for maker in makers if maker]
        level = max((levels[maker] for maker in own), default=0)
        found |= dict.fromkeys(own, deepest - level)
    return found


def _is_smaller(node: Node) -> bool:
    """Whether a node gives its operand in a smaller type."""
    return node.op == "convert_element_type" and node.outputs[0].nbytes < node.inputs[0].nbytes


def reductions_first(roots: Roots, depths: Mapping[Node, int]) -> dict[Node, int]:
    """Elementwise roots that load what long reductions of their shape load anyway, and the depth of those: they run
    with them.

    But only if nothing else loads those arrays later, so that an output can still be written over one of them.
    """
    shared: dict[tuple[int, tuple[int, ...]], set[Value]] = {}  # the arrays, by the reductions' depth and shape
    readers: dict[Value, set[Node]] = {}
    loads: dict[Node, set[Value]] = {}
    for node, depth in depths.items():
        loads[node] = set(roots.needs[node] if node.call else _body(node, depth, roots, depths).loads)
        for x in loads[node]:
            readers.setdefault(x, set()).add(node)
        if is_split(node):
            operand = node.inputs[0]
            shared.setdefault((depth, operand.shape), set()).update(x for x in loads[node] if x.size >= operand.size)
    found: dict[Node, int] = {}
    for (depth, shape), arrays in shared.items():
        later = {node for x in arrays for node in readers[x] if depths[node] < depth}
        joining = {node for node in later if _can_join(node, depth, shape, arrays, roots, depths)}
        while True:
            left = frozenset().union(*(loads[node] for node in later - joining))
            apart = {node for node in joining if not left.isdisjoint(arrays & loads[node])}
            if not apart:
                break
            joining -= apart
        found |= dict.fromkeys(joining, depth)
    return found


def _can_join(
    root: Node, depth: int, shape: tuple[int, ...], arrays: set[Value], roots: Roots, depths: Mapping[Node, int]
) -> bool:
    """Whether a root is elementwise and, at a depth, made of `arrays` and smaller ones.

    No producer that would have to move with it may be a long reduction: the root would be left behind.
    """
    if root.call or root.op in EXPENSIVE or root.outputs[0].shape != shape:
        return False
    if any(x.size >= math.prod(shape) and x not in arrays for x in _body(root, depth, roots, depths).loads):
        return False
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        if is_split(node):
            return False
        makers = {roots.makers[x] for x in roots.needs[node] if x in roots.makers} - seen
        seen |= makers
        stack += (maker for maker in makers if depths[maker] <= depth)
    return True


def form_kernels(
    roots: Roots, depths: Mapping[Node, int], most_buffers: int = MOST_BUFFERS, most_reductions: int = MOST_REDUCTIONS
) -> list[Step]:
    """The steps in order: of each depth the kernel ops, then the generated ones, each of as many roots as fit."""
    by_depth: dict[int, list[Node]] = {}
    for node in roots.needs:
        by_depth.setdefault(depths[node], []).append(node)
    deepest = max(by_depth, default=0)
    steps = []
    for depth in sorted(by_depth, reverse=True):
        level = deepest - depth
        steps += [Step(roots.needs[node], node.outputs, level, node=node) for node in by_depth[depth] if node.call]
        generated = [node for node in by_depth[depth] if not node.call]
        generated.sort(key=lambda node: node.inputs[0].shape if node.op in EXPENSIVE else ())
        bodies = [_body(node, depth, roots, depths) for node in generated]
        for body in _side_by_side(bodies, most_buffers, most_reductions):
            inputs, stores = tuple(sorted(body.loads, key=roots.order.__getitem__)), tuple(body.stores)
            nodes = sorted(body.nodes, key=roots.order.__getitem__)
            steps.append(Step(inputs, stores, level, graph=Graph(inputs, {}, nodes, stores)))
    return steps


class _Body(NamedTuple):
    """The work of one generated kernel. reductions: how many, products and sorts among them. code: bytes, roughly.

    loads: an ordered set, of one root in the graph's order.
    """

    nodes: set[Node]
    loads: dict[Value, None]
    stores: list[Value]
    reductions: int
    code: int

    def joined(self, other: "_Body") -> "_Body":
        return _Body(
            self.nodes | other.nodes,
            self.loads | other.loads,
            self.stores + other.stores,
            self.reductions + other.reductions,
            self.code + other.code,
        )

    def fits(self, most_buffers: int, most_reductions: int) -> bool:
        buffers = len(self.loads) + len(self.stores)
        return buffers <= most_buffers and self.reductions <= most_reductions and self.code <= _MOST_JOINED


def _body(root: Node, depth: int, roots: Roots, depths: Mapping[Node, int]) -> _Body:
    """A root by itself, at a depth: what is stored at that depth or later is computed again."""
    nodes, loads = {root}, set()
    stack = [*root.inputs]
    while stack:
        x = stack.pop()
        if isinstance(x, Literal) or x in loads:
            continue
        if x in roots.loaded or (x in roots.stored and depths[roots.makers[x]] > depth):
            loads.add(x)
        elif (maker := roots.makers[x]) not in nodes:
            nodes.add(maker)
            stack += maker.inputs
    stores = [out for out in root.outputs if out in roots.loaded or out in roots.stored]
    in_order = dict.fromkeys(sorted(loads, key=roots.order.__getitem__))
    return _Body(nodes, in_order, stores, int(root.op in EXPENSIVE), roots.code.of(nodes))


def _side_by_side(bodies: Sequence[_Body], most_buffers: int, most_reductions: int) -> list[_Body]:
    """Bodies that need nothing of each other as few kernels, those together that load the same arrays."""
    kernels: list[_Body] = []
    for group in _sharing(bodies):
        whole = functools.reduce(_Body.joined, group)
        for body in [whole] if whole.fits(most_buffers, most_reductions) else group:
            if kernels and (joined := kernels[-1].joined(body)).fits(most_buffers, most_reductions):
                kernels[-1] = joined
            else:
                kernels.append(body)
    return kernels


def _sharing(bodies: Sequence[_Body]) -> list[list[_Body]]:
    """Bodies in groups: those together that load the same arrays, of the size of what they store or larger; with the
    first such group, in the order of the arrays.

    An optimizer's new moments and parameter are one group: apart, each would read the gradient and the old moments, and
    where those are donated, be copied.
    """
    groups: dict[Value, list[_Body]] = {}  # by what is loaded
    found: list[list[_Body]] = []
    for body in bodies:
        size = max(2, *(out.size for out in body.stores))
        large = [x for x in body.loads if x.size >= size]
        group = next((groups[x] for x in large if x in groups), None)
        if group is None:
            group = []
            found.append(group)
        group.append(body)
        groups.update((x, group) for x in large if x not in groups)
    return found
