"""Graphs made smaller, to the same bits: each pass takes a graph and gives another.

constant_fold: what is known now is computed now, and what changes nothing goes. cse: what is computed twice is computed
once. dce: what nobody reads goes. drop_barriers: in the end.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from vk_kernels.compiler.ir import Graph, Literal, Node, Operand, Value

BARRIER = "optimization_barrier"

# On scalars that are known: these are exact in numpy, as they are in XLA.
_FOLDED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
_FOLDED_FLOATS = frozenset(map(np.dtype, (np.float32,)))


def simplify(graph: Graph) -> Graph:
    """All passes, in the order that serves."""
    return dce(drop_barriers(dce(cse(constant_fold(graph)))))


def substitute(node: Node, known: dict[Value, Operand]) -> Node:
    """The node with the operands that are `known` to be others."""
    if not any(x in known for x in node.inputs):
        return node
    return replace(node, inputs=tuple(known.get(x, x) for x in node.inputs))


def constant_fold(graph: Graph) -> Graph:
    """Computes scalars of literals, takes reshapes of reshapes together, and drops what gives its own operand."""
    known: dict[Value, Operand] = {}
    made: dict[Value, Node] = {}
    nodes = []
    for old in graph.nodes:
        node = substitute(old, known)
        if _is_reshape(node):
            node = _reshape(node, made)
        elif node.op == "slice":
            node = _slice(node, made)
        same = _same(node)
        if same is None:
            same = _computed(node)
        if same is not None:
            known[node.outputs[0]] = same
            continue
        made.update(dict.fromkeys(node.outputs, node))
        nodes.append(node)
    return Graph(graph.inputs, graph.constants, nodes, tuple(known.get(x, x) for x in graph.outputs))


def _is_reshape(node: Node) -> bool:
    """Whether the elements stay in their order: axes of length 1 may come, go and change places."""
    match node.op:
        case "reshape" | "squeeze" | "expand_dims":
            return True
        case "broadcast_in_dim":
            return node.inputs[0].size == node.outputs[0].size and isinstance(node.inputs[0], Value)
        case "transpose":
            long = [axis for axis in node.params["permutation"] if node.inputs[0].shape[axis] != 1]
            return long == sorted(long)
    return False


def _reshape(node: Node, made: dict[Value, Node]) -> Node:
    """The reshape of the first array in a chain of them."""
    x = node.inputs[0]
    while isinstance(x, Value) and x in made and made[x].op == "reshape":
        x = made[x].inputs[0]
    params = {"new_sizes": node.outputs[0].shape, "dimensions": None}
    return replace(node, op="reshape", inputs=(x,), params=params)


def _slice(node: Node, made: dict[Value, Node]) -> Node:
    """Slices the one array of a concatenation that has it all: one loop's rows, which another takes one by one."""
    while node.inputs[0] in made and made[node.inputs[0]].op == "concatenate":
        whole = made[node.inputs[0]]
        axis, start, limit = whole.params["dimension"], node.params["start_indices"], node.params["limit_indices"]
        first = 0
        for x in whole.inputs:
            if first <= start[axis] and limit[axis] <= first + x.shape[axis]:
                break
            first += x.shape[axis]
        else:
            break
        moved = {
            "start_indices": (*start[:axis], start[axis] - first, *start[axis + 1 :]),
            "limit_indices": (*limit[:axis], limit[axis] - first, *limit[axis + 1 :]),
        }
        node = replace(node, inputs=(x,), params=node.params | moved)
    return node


def _same(node: Node) -> Operand | None:
    """The operand that a node gives as it is, if it does."""
    if len(node.outputs) != 1 or not node.inputs or node.call:
        return None
    x, out = node.inputs[0], node.outputs[0]
    alike = x.shape == out.shape and x.dtype == out.dtype
    match node.op:
        case "reshape" | "broadcast_in_dim" | "convert_element_type" | "bitcast_convert_type" | "slice" if alike:
            steps = node.params.get("strides")
            return x if not steps or set(steps) == {1} else None
        case "concatenate" if len(node.inputs) == 1:
            return x
        case "integer_pow" if node.params["y"] == 1:
            return x
        case "select_n" if isinstance(x, Literal) and x.shape == ():
            return node.inputs[1 + int(x.value)]
    return None


def _computed(node: Node) -> Literal | None:
    """The result of a node of known scalars."""
    scalars = all(isinstance(x, Literal) and x.shape == () for x in node.inputs)
    if not scalars or not node.inputs or len(node.outputs) != 1 or node.outputs[0].shape != ():
        return None
    out, values = node.outputs[0].dtype, [x.value for x in node.inputs]
    dtypes = {out, *(x.dtype for x in node.inputs)}
    if any(dtype.kind not in "biu" and dtype not in _FOLDED_FLOATS for dtype in dtypes):
        return None
    with np.errstate(all="ignore"):
        if node.op in _FOLDED:
            return Literal(np.asarray(_FOLDED[node.op](*values), out))
        if node.op == "convert_element_type" and not (values[0].dtype.kind == "f" and out.kind in "iu"):
            return Literal(values[0] != 0 if out.kind == "b" else values[0].astype(out))
    return None


def cse(graph: Graph) -> Graph:
    """One node for all that do the same with the same operands."""
    known: dict[Value, Operand] = {}
    found: dict[Any, Node] = {}
    nodes = []
    for old in graph.nodes:
        node = substitute(old, known)
        key = _key(node)
        twin = None if key is None else found.setdefault(key, node)
        if twin is None or twin is node:
            nodes.append(node)
        else:
            known |= zip(node.outputs, twin.outputs, strict=True)
    return Graph(graph.inputs, graph.constants, nodes, tuple(known.get(x, x) for x in graph.outputs))


def _key(node: Node) -> Any:
    """Equal for two nodes that do the same; None where that cannot be told."""
    if node.op == BARRIER:
        return None
    inputs = tuple(x if isinstance(x, Value) else (x.value.tobytes(), x.dtype, x.shape) for x in node.inputs)
    outputs = tuple((x.shape, x.dtype) for x in node.outputs)
    params = tuple(sorted((name, _frozen(value)) for name, value in node.params.items()))
    return node.op, node.call, inputs, outputs, params


def _frozen(value: Any) -> Any:
    return repr(value)


def dce(graph: Graph) -> Graph:
    """Without the nodes and the constants that no output needs."""
    needed = set(graph.outputs)
    nodes = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            nodes.append(node)
    constants = {value: array for value, array in graph.constants.items() if value in needed}
    return Graph(graph.inputs, constants, nodes[::-1], graph.outputs)


def drop_barriers(graph: Graph) -> Graph:
    """Without barriers: kernels have none, and from here on nothing that was computed twice is merged again."""
    known: dict[Value, Operand] = {}
    nodes = []
    for old in graph.nodes:
        node = substitute(old, known)
        if node.op == BARRIER:
            known |= zip(node.outputs, node.inputs, strict=True)
        else:
            nodes.append(node)
    return Graph(graph.inputs, graph.constants, nodes, tuple(known.get(x, x) for x in graph.outputs))
