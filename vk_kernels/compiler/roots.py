"""Roots: the arrays of a graph that are stored in memory. Kernels are made of them, each with all that it alone needs.

A kernel op's operands and results are in memory. Of everything else only what must be is stored: what the caller reads;
what is made of many elements each (a reduction, a product, a sort); and what would be costly to compute again for every
place it is used at. All other nodes are computed inside the kernels of the roots that need them.

Code has a limit too, as drivers take a time and a memory for it that grow faster than its length: of what makes one
result too much, a part is stored (`_with_long`).
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from vk_kernels.compiler.codegen.code_size import CodeSize
from vk_kernels.compiler.codegen.primitives import EXPENSIVE
from vk_kernels.compiler.ir import Graph, Literal, Node, Operand, Value, consumers, producers

MOST_BUFFERS = 128  # that a generated kernel binds, roughly: what one root needs stays together
SPARE_BUFFERS = 2  # of a kernel for what it stores, and what it does in between

MOST_CODE = 1 << 16  # bytes that make what one thread stores, roughly: compilers' time grows faster than code
_SHARED_CODE = MOST_CODE // 4  # bytes of code that make a value which several nodes read, from which on it is stored

_BROADCAST = 32  # elements that use a value each, from which on it is stored if it cost _FEW
_FEW = 4  # operations: worth storing once where it is broadcast
_MANY = 100  # operations: worth storing once wherever several kernels need it

FREE = frozenset(
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

Values = AbstractSet[Value]


@dataclass(frozen=True, eq=False)
class Roots:
    """A graph, and which of its values are in memory. A node that gives such a value is a root.

    loaded: read from memory by whoever needs them. stored: written to memory for the caller and for kernel ops; loaded
    by later steps only, and computed again in a kernel beside the one that stores them. bases: of each view, the array
    in memory whose bytes it is. needs: of each root, in the graph's order, the arrays in memory that it is made of.
    order: the place of each value and each node in the graph.
    """

    graph: Graph
    makers: Mapping[Value, Node]
    bases: Mapping[Operand, Value]
    loaded: Values
    stored: Values
    needs: Mapping[Node, tuple[Value, ...]]
    order: Mapping[Value | Node, int]
    code: CodeSize

    def base(self, value: Operand) -> Operand:
        return self.bases.get(value, value)


def find_roots(graph: Graph, most_buffers: int = MOST_BUFFERS) -> Roots:
    """Decides which values are in memory; none is made of more arrays than a kernel of `most_buffers` can bind."""
    makers, bases = producers(graph.nodes), _find_bases(graph.nodes)
    loaded: Values = {*graph.inputs, *graph.constants}
    loaded |= {out for node in graph.nodes if node.call or node.op in EXPENSIVE for out in node.outputs}
    read = (*graph.outputs, *(x for node in graph.nodes if node.call for x in node.inputs))
    stored = {bases.get(x, x) for x in read}
    loaded, costs = _with_broadcast(graph, loaded)
    loaded = _with_shared(graph, loaded, stored, costs)
    if most_buffers < MOST_BUFFERS:
        loaded = _with_wide(graph, loaded, most_buffers - SPARE_BUFFERS)
    loaded, code = _with_long(graph, loaded, stored)
    in_memory = loaded | stored
    needs = {
        node: tuple(bases.get(x, x) for x in node.inputs) if node.call else _needs(node, makers, in_memory)
        for node in graph.nodes
        if not in_memory.isdisjoint(node.outputs)
    }
    order = {x: i for i, x in enumerate((*graph.inputs, *graph.constants, *makers, *graph.nodes))}
    return Roots(graph, makers, bases, loaded, stored, needs, order, code)


def _find_bases(nodes: Iterable[Node]) -> dict[Operand, Value]:
    bases: dict[Operand, Value] = {}
    for node in nodes:
        if _is_view(node):
            x = node.inputs[0]
            bases[node.outputs[0]] = bases.get(x, x)
    return bases


def _is_view(node: Node) -> bool:
    """Whether the result is the bytes of the operand."""
    if node.op not in ("reshape", "bitcast_convert_type") or isinstance(node.inputs[0], Literal):
        return False
    return node.inputs[0].nbytes == node.outputs[0].nbytes


def _needs(root: Node, makers: Mapping[Value, Node], in_memory: Values) -> tuple[Value, ...]:
    """The values in memory that a generated root is made of."""
    found: dict[Value, None] = {}
    stack, seen = [*root.inputs], set()
    while stack:
        x = stack.pop()
        if isinstance(x, Literal) or x in seen:
            continue
        seen.add(x)
        if x in in_memory:
            found[x] = None
        else:
            stack += makers[x].inputs
    return tuple(found)


def _with_broadcast(graph: Graph, loaded: Values) -> tuple[Values, dict[Value, int]]:
    """(`loaded` and what is used by many elements each, the operations that an element of each value takes)."""
    loaded, costs = set(loaded), {}
    for node in graph.nodes:
        values = [x for x in node.inputs if isinstance(x, Value)]
        if node.op not in FREE or node.op in ("broadcast_in_dim", "select_n"):
            size = max(out.size for out in node.outputs)
            loaded.update(x for x in values if costs.get(x, 0) >= _FEW and x.size * _BROADCAST <= size)
        own = 0 if node.op in FREE else _SLOW.get(node.op, 1)
        cost = own + sum(0 if x in loaded else costs.get(x, 0) for x in values)
        costs.update((out, 0 if out in loaded else min(cost, 10 * _MANY)) for out in node.outputs)
    return loaded, costs


def _with_shared(graph: Graph, loaded: Values, stored: Values, costs: Mapping[Value, int]) -> Values:
    """`loaded` and what takes many operations for several values in memory."""
    loaded = set(loaded)
    reached: dict[Value, set[Value]] = {}  # the values in memory that each is needed for
    for node in reversed(graph.nodes):
        for out in node.outputs:
            if out not in loaded and len(reached.get(out, ())) > 1 and costs[out] >= _MANY:
                loaded.add(out)
        through: set[Value] = set()
        for out in node.outputs:
            through |= {out} if out in loaded or out in stored else reached.get(out, set())
        for x in node.inputs:
            if isinstance(x, Value):
                reached.setdefault(x, set()).update(through)
    return loaded


def _with_wide(graph: Graph, loaded: Values, most: int) -> Values:
    """`loaded` and as much more as it takes for no value to be made of more than `most` arrays in memory."""
    loaded = set(loaded)
    made_of: dict[Value, frozenset[Value]] = {}
    for node in graph.nodes:
        operands = [x for x in node.inputs if isinstance(x, Value)]
        arrays = {x: frozenset([x]) if x in loaded else made_of[x] for x in operands}
        while len(whole := frozenset().union(*arrays.values())) > most:
            widest = max(arrays, key=lambda x: len(arrays[x]))
            if len(arrays[widest]) == 1:
                break  # as many operands
            loaded.add(widest)
            arrays[widest] = frozenset([widest])
        made_of.update(dict.fromkeys(node.outputs, whole))
    return loaded


def _with_long(graph: Graph, loaded: Values, stored: Values) -> tuple[Values, CodeSize]:
    """(`loaded` and what takes much code, so that no kernel has more than is good for a compiler; the code of each)."""
    largest = max((x.nbytes for x in loaded | stored), default=0)
    loaded, code = set(loaded), CodeSize()
    makers, readers = producers(graph.nodes), consumers(graph)

    def can_cut(x: Operand) -> bool:
        """Whether to store a value takes no more memory than any other array does, and saves more than a move."""
        return x in makers and x not in loaded and x.nbytes <= largest and makers[x].op not in _MOVES

    def cut(value: Value) -> None:
        loaded.add(value)
        code.store(value)

    for node in graph.nodes:
        if node.call:
            continue
        code.add(node)
        for x in sorted(node.inputs, key=code.__getitem__, reverse=True):
            if code[node.outputs[0]] <= MOST_CODE:
                break
            source, moves = _source(x, makers, loaded)
            if can_cut(source):
                cut(source)
                for moved in (*moves, node):
                    code.add(moved)
        for out in node.outputs:
            if out in loaded:
                code.store(out)
            elif code[out] > _SHARED_CODE and len(readers.get(out, ())) > 1 and can_cut(out):
                cut(out)
    return loaded, code


def _source(x: Operand, makers: Mapping[Value, Node], loaded: Values) -> tuple[Operand, list[Node]]:
    """The operand that another is only moved from, and the moves, in order."""
    moves: list[Node] = []
    while (node := makers.get(x)) and node.op in _MOVES and node.inputs and x not in loaded:
        moves.insert(0, node)
        x = node.inputs[0]
    return x, moves
