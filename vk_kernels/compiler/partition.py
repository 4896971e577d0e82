"""Which nodes become one kernel.

A kernel op is a step of its own. Of everything else only what must be is stored: what a kernel op or the
caller reads; what is made of many elements each (a reduction, a product, a sort); and what would be costly to compute
again for every place it is used at. Each of these is a target; all other nodes are computed inside the kernels of the
targets that need them.

Code has a limit too, as drivers take a time and a memory for it that grow faster than its length: of what makes one
result too much, a part is stored (`_cut_long`), and no more results stand side by side than fit (`_Part.fits`).

The height of a target is the longest way from it to the end of the program, counted in steps. Targets of one height
need nothing of each other, and become one step together (horizontal fusion): each is computed as late as it can be.
But inputs that are only converted to a smaller type, as a model's parameters to bfloat16, are all converted first; and
elementwise targets come forward to the long reductions of all that they load (an optimizer's update to its norms), so
that it is read once.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vk_kernels.compiler.codegen.code_size import CodeSize
from vk_kernels.compiler.codegen.kernels import EXPENSIVE, is_split
from vk_kernels.compiler.ir import Graph, Literal, Node, Operand, Value, consumers, producers

MOST_BUFFERS = 128  # that a generated kernel binds, roughly: what one target needs stays together
MOST_REDUCTIONS = 64  # that a generated kernel does, or products or sorts

_SPARE = 2  # buffers of a kernel for what it stores, and what it does in between

MOST_CODE = 1 << 16  # bytes that make what one thread stores, roughly: compilers' time grows faster than code
_MOST_JOINED = 4 * MOST_CODE  # of all that a generated kernel stores, side by side
_SHARED_CODE = MOST_CODE // 4  # bytes of code that make a value which several nodes read, from which on it is stored

_MOST_PARTS = 32  # of a concatenation, in one piece of code

_BROADCAST = 32  # elements that use a value each, from which on it is stored if it took more than a few operations
_FEW, _MANY = 4, 100  # operations: worth storing once where it is broadcast; wherever several kernels need it

_FREE = frozenset(
    (
        *("broadcast_in_dim", "reshape", "transpose", "slice", "rev", "concatenate", "pad", "iota", "split"),
        *("convert_element_type", "bitcast_convert_type", "select_n", "unstack"),
    )
)
_MOVES = frozenset(("broadcast_in_dim", "reshape", "transpose", "slice", "rev", "iota", "split", "unstack"))
_SLOW = {
    **dict.fromkeys(("div", "rem", "sqrt", "rsqrt", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic"), 4),
    **dict.fromkeys(("gather", "dynamic_slice", "dynamic_update_slice", "sin", "cos", "tan", "erf", "cbrt"), 8),
    **dict.fromkeys(("pow", "erf_inv", "erfc", "atan2", "lgamma", "digamma", "asin", "acos", "sinh", "cosh"), 16),
    "threefry2x32": _MANY,
}


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
        nodes = [node for node in self.graph.nodes if node.op not in _FREE] or self.graph.nodes
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


def partition(graph: Graph, most_buffers: int = MOST_BUFFERS, most_reductions: int = MOST_REDUCTIONS) -> Partition:
    """Cuts a graph into steps; a generated one binds `most_buffers` and has `most_reductions` at most.

    What one target needs may be more than MOST_BUFFERS, but never more than fewer `most_buffers`: a device's limit.
    """
    most = min(_MOST_PARTS, most_buffers - _SPARE)
    graph = _with_constants(graph)
    graph = replace(graph, nodes=[part for node in graph.nodes for part in _in_a_tree(node, most)])
    return _Partitioner(graph, most_buffers, most_reductions).run()


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


class _Part(NamedTuple):
    """The work of one generated kernel. reductions: how many, products and sorts among them. code: bytes, roughly."""

    nodes: set[Node]
    loads: set[Value]
    stores: list[Value]
    reductions: int
    code: int

    def joined(self, other: "_Part") -> "_Part":
        return _Part(
            self.nodes | other.nodes,
            self.loads | other.loads,
            self.stores + other.stores,
            self.reductions + other.reductions,
            self.code + other.code,
        )

    def fits(self, most_buffers: int, most_reductions: int) -> bool:
        buffers = len(self.loads) + len(self.stores)
        return buffers <= most_buffers and self.reductions <= most_reductions and self.code <= _MOST_JOINED


class _Partitioner:
    def __init__(self, graph: Graph, most_buffers: int, most_reductions: int):
        self._graph = graph
        self._limits = most_buffers, most_reductions
        self._producers = producers(graph.nodes)
        self._inputs = frozenset(graph.inputs)
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        made = (out for node in graph.nodes for out in node.outputs)
        self._numbers = {value: i for i, value in enumerate((*graph.inputs, *graph.constants, *made))}
        self._roots: dict[Value, Value] = {}
        for node in graph.nodes:
            if _is_view(node):
                x = node.inputs[0]
                self._roots[node.outputs[0]] = self._roots.get(x, x)
        # Loaded by whoever needs it; stored by its step, and computed again beside it.
        self._loaded = {*graph.inputs, *graph.constants}
        self._loaded.update(out for node in graph.nodes if node.call or node.op in EXPENSIVE for out in node.outputs)
        self._stored = {self._root(value) for value in graph.outputs}
        self._stored.update(self._root(x) for node in graph.nodes if node.call for x in node.inputs)
        self._cut_costly()
        if most_buffers < MOST_BUFFERS:
            self._cut_wide(most_buffers - _SPARE)
        self._cut_long()
        self._heights = self._find_heights({})
        self._heights = self._find_heights(self._join_reductions())

    def _root(self, value: Value) -> Value:
        """The array in memory that a view is of."""
        return self._roots.get(value, value)

    def _cut_costly(self) -> None:
        """Adds to what is loaded: see the module."""
        costs: dict[Value, int] = {}
        for node in self._graph.nodes:
            values = [x for x in node.inputs if isinstance(x, Value)]
            if node.op not in _FREE or node.op in ("broadcast_in_dim", "select_n"):
                size = max(out.size for out in node.outputs)
                self._loaded.update(x for x in values if costs.get(x, 0) >= _FEW and x.size * _BROADCAST <= size)
            own = 0 if node.op in _FREE else _SLOW.get(node.op, 1)
            cost = own + sum(0 if x in self._loaded else costs.get(x, 0) for x in values)
            costs.update((out, 0 if out in self._loaded else min(cost, 10 * _MANY)) for out in node.outputs)
        reached: dict[Value, set[Value]] = {}
        for node in reversed(self._graph.nodes):
            for out in node.outputs:
                targets = reached.get(out, set())
                if out not in self._loaded and len(targets) > 1 and costs[out] >= _MANY:
                    self._loaded.add(out)
            through: set[Value] = set()
            for out in node.outputs:
                through |= {out} if out in self._loaded or out in self._stored else reached.get(out, set())
            for x in node.inputs:
                if isinstance(x, Value):
                    reached.setdefault(x, set()).update(through)

    def _cut_wide(self, most: int) -> None:
        """Adds to what is loaded, until no value is made of more than `most` arrays in memory."""
        made_of: dict[Value, frozenset[Value]] = {}
        for node in self._graph.nodes:
            operands = [x for x in node.inputs if isinstance(x, Value)]
            arrays = {x: frozenset([x]) if x in self._loaded else made_of[x] for x in operands}
            while len(whole := frozenset().union(*arrays.values())) > most:
                widest = max(arrays, key=lambda x: len(arrays[x]))
                if len(arrays[widest]) == 1:
                    break  # as many operands
                self._loaded.add(widest)
                arrays[widest] = frozenset([widest])
            made_of.update(dict.fromkeys(node.outputs, whole))

    def _cut_long(self) -> None:
        """Adds to what is loaded what takes much code, so that no kernel has more than is good for a compiler."""
        largest = max((x.nbytes for x in (*self._loaded, *self._stored)), default=0)
        self._size = size = CodeSize()
        readers = consumers(self._graph)

        def cut(value: Value) -> None:
            self._loaded.add(value)
            size.store(value)

        for node in self._graph.nodes:
            if node.call:
                continue
            size.add(node)
            for x in sorted(node.inputs, key=size.__getitem__, reverse=True):
                if size[node.outputs[0]] <= MOST_CODE:
                    break
                source, moves = self._source(x)
                if self._can_cut(source, largest):
                    cut(source)
                    for move in (*moves, node):
                        size.add(move)
            for out in node.outputs:
                if out in self._loaded:
                    size.store(out)
                elif size[out] > _SHARED_CODE and len(readers.get(out, ())) > 1 and self._can_cut(out, largest):
                    cut(out)

    def _source(self, x: Operand) -> tuple[Operand, list[Node]]:
        """The operand that another is only moved from, and the moves, in order."""
        moves: list[Node] = []
        while (node := self._producers.get(x)) and node.op in _MOVES and node.inputs and x not in self._loaded:
            moves.insert(0, node)
            x = node.inputs[0]
        return x, moves

    def _can_cut(self, x: Operand, largest: int) -> bool:
        """Whether to store a value would take no more memory than any other array does, and save more than a move."""
        node = self._producers.get(x)
        if node is None or x in self._loaded or x.nbytes > largest:
            return False
        return node.op not in _MOVES

    def _is_target(self, node: Node) -> bool:
        return any(out in self._loaded or out in self._stored for out in node.outputs)

    def _find_heights(self, least: dict[Node, int]) -> dict[Node, int]:
        """The heights of kernel ops and of the nodes that give targets; `least`: how high some are at least."""
        heights: dict[Node, int] = {}
        needed = dict(least)
        for node in reversed(self._graph.nodes):
            if not (node.call or self._is_target(node)):
                continue
            height = heights[node] = needed.get(node, 0)
            for value in self._needs(node):
                producer = self._producers.get(value)
                if producer is not None:
                    step = 1 if value in self._loaded or node.call else 0
                    needed[producer] = max(needed.get(producer, 0), height + step)
        highest = max(heights.values(), default=0)
        return {node: highest if self._is_conversion(node) else height for node, height in heights.items()}

    def _is_conversion(self, node: Node) -> bool:
        """Whether a node gives a program's input in a smaller type."""
        if node.op != "convert_element_type" or self._root(node.inputs[0]) not in self._inputs:
            return False
        return node.outputs[0].nbytes < node.inputs[0].nbytes

    def _join_reductions(self) -> dict[Node, int]:
        """Elementwise targets that come forward to where long reductions of their shape load all arrays that they load.

        But only if nothing else loads those arrays later, so that an output can still be written over one of them.
        """
        joint: dict[tuple[int, tuple[int, ...]], set[Value]] = {}  # the arrays, by the reductions' height and shape
        readers: dict[Value, set[Node]] = {}
        loads: dict[Node, set[Value]] = {}
        for node, height in self._heights.items():
            loads[node] = set(self._needs(node)) if node.call else self._part(node, height).loads
            for x in loads[node]:
                readers.setdefault(x, set()).add(node)
            if is_split(node):
                operand = node.inputs[0]
                arrays = (x for x in loads[node] if x.size >= operand.size)
                joint.setdefault((height, operand.shape), set()).update(arrays)
        found: dict[Node, int] = {}
        for (height, shape), arrays in joint.items():
            later = {node for x in arrays for node in readers[x] if self._heights[node] < height}
            joining = {node for node in later if self._can_join(node, height, shape, arrays)}
            while True:
                left = frozenset().union(*(loads[node] for node in later - joining))
                apart = {node for node in joining if not left.isdisjoint(arrays & loads[node])}
                if not apart:
                    break
                joining -= apart
            found |= dict.fromkeys(joining, height)
        return found

    def _can_join(self, node: Node, height: int, shape: tuple[int, ...], arrays: set[Value]) -> bool:
        """Whether a target is elementwise and, at a height, made of `arrays` and smaller ones. Nothing that must be
        raised above it then may be a long reduction: the target would be left behind."""
        if node.call or node.op in EXPENSIVE or node.outputs[0].shape != shape:
            return False
        if any(x.size >= math.prod(shape) and x not in arrays for x in self._part(node, height).loads):
            return False
        stack, seen = [node], set()
        while stack:
            node = stack.pop()
            if is_split(node):
                return False
            made = {self._producers[x] for x in self._needs(node) if x in self._producers} - seen
            seen |= made
            stack += (producer for producer in made if self._heights[producer] <= height)
        return True

    def _needs(self, node: Node) -> list[Value]:
        """The values that a target loads, and those that are stored."""
        if node.call:
            return [self._root(x) for x in node.inputs]
        found: dict[Value, None] = {}
        stack, seen = [*node.inputs], set()
        while stack:
            x = stack.pop()
            if isinstance(x, Literal) or x in seen:
                continue
            seen.add(x)
            if x in self._loaded or x in self._stored:
                found[x] = None
            else:
                stack += self._producers[x].inputs
        return list(found)

    def run(self) -> Partition:
        heights = self._heights
        last = max(heights.values(), default=0)
        by_height: dict[int, list[Node]] = {}
        for node in self._graph.nodes:
            if node in heights:
                by_height.setdefault(heights[node], []).append(node)
        steps = []
        for height in sorted(by_height, reverse=True):
            level, targets = last - height, []
            for node in by_height[height]:
                if node.call:
                    inputs = tuple(self._root(x) for x in node.inputs)
                    steps.append(Step(inputs, node.outputs, level, node=node))
                else:
                    targets.append(node)
            steps += self._generated(targets, height, level)
        outputs = tuple(self._root(value) for value in self._graph.outputs)
        read = {x for step in steps for x in step.inputs} | set(outputs)
        constants = {value: array for value, array in self._graph.constants.items() if value in read}
        return Partition(self._graph.inputs, constants, steps, outputs)

    def _generated(self, targets: Sequence[Node], height: int, level: int) -> Iterable[Step]:
        """Steps for targets of one height, each of as many targets as a kernel has buffers for."""
        targets = sorted(targets, key=lambda node: node.inputs[0].shape if node.op in EXPENSIVE else ())
        parts: list[_Part] = []
        for group in _sharing([self._part(target, height) for target in targets]):
            whole = functools.reduce(_Part.joined, group)
            for part in [whole] if whole.fits(*self._limits) else group:
                if parts and (joined := parts[-1].joined(part)).fits(*self._limits):
                    parts[-1] = joined
                else:
                    parts.append(part)
        for part in parts:
            inputs, stores = tuple(sorted(part.loads, key=self._numbers.__getitem__)), tuple(part.stores)
            body = Graph(inputs, {}, sorted(part.nodes, key=self._order.__getitem__), stores)
            yield Step(inputs, stores, level, graph=body)

    def _part(self, target: Node, height: int) -> _Part:
        """A target by itself."""
        nodes, loads = {target}, set()
        stack = [*target.inputs]
        while stack:
            x = stack.pop()
            if isinstance(x, Literal) or x in loads:
                continue
            producer = self._producers.get(x)
            earlier = producer is not None and x in self._stored and self._heights[producer] > height
            if x in self._loaded or earlier:
                loads.add(x)
            elif producer not in nodes:
                nodes.add(producer)
                stack += producer.inputs
        stores = [out for out in target.outputs if out in self._loaded or out in self._stored]
        return _Part(nodes, loads, stores, int(target.op in EXPENSIVE), self._size.of(nodes))


def _sharing(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Parts in groups: those together that load the same arrays, of the size of what they store or larger. An
    optimizer's new moments and parameter are one group: apart, each would read the gradient and the old moments, and
    where those are donated, be copied.
    """
    groups: dict[Value, list[_Part]] = {}  # by what is loaded
    found: list[list[_Part]] = []
    for part in parts:
        size = max(2, *(out.size for out in part.stores))
        large = [x for x in part.loads if x.size >= size]
        group = next((groups[x] for x in large if x in groups), None)
        if group is None:
            group = []
            found.append(group)
        group.append(part)
        groups.update((x, group) for x in large if x not in groups)
    return found


def _is_view(node: Node) -> bool:
    """Whether the result is the bytes of the operand."""
    if node.op not in ("reshape", "bitcast_convert_type") or isinstance(node.inputs[0], Literal):
        return False
    return node.inputs[0].nbytes == node.outputs[0].nbytes
