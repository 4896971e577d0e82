"""How much code the kernels of a graph will have, before there is any: bytes of SPIR-V, roughly.

At one place, what several nodes need is computed once; at another place, or in another branch of the code, it is
computed again. So what an elementwise node is made of is a set of nodes, its own operands' sets together, and what any
other node asks for is code of its own for every operand.
"""

import functools
from collections.abc import Iterable

import numpy as np

from vk_kernels.compiler.codegen.emitter import dtype_of
from vk_kernels.compiler.codegen.scalars import ELEMENTWISE, Scalars
from vk_kernels.compiler.ir import Node, Value
from vk_kernels.spirv.builder import Module

_LOAD, _ROUND = 120, 20  # of an element from memory; of an instruction
_PLACE = 3 * _ROUND  # to find a place, for an axis
_BRANCH = 8 * _ROUND
_BASE = {"gather": 20, "dynamic_slice": 10, "dynamic_update_slice": 20, "dot_general": 25, "threefry2x32": 130}
_BRANCHES = frozenset(("concatenate", "stack", "pad", "gather", "dynamic_update_slice"))


class CodeSize:
    """The bytes that make each value of a graph, whose nodes are added in order."""

    def __init__(self) -> None:
        self._own: dict[Node, int] = {}
        self._nodes: dict[Value, frozenset[Node]] = {}  # that are computed at a value's own place
        self._bytes: dict[Value, int] = {}

    def __getitem__(self, x: object) -> int:
        """The bytes that make an element; of an array in memory, that load it."""
        return self._bytes.get(x, _LOAD) if isinstance(x, Value) else 0

    def of(self, nodes: Iterable[Node]) -> int:
        """The bytes of nodes each of which is computed at one place."""
        return sum(map(self._own.__getitem__, nodes))

    def store(self, value: Value) -> None:
        """From here on a value is in memory."""
        self._bytes.pop(value, None)
        self._nodes.pop(value, None)

    def add(self, node: Node) -> None:
        values = list(dict.fromkeys(x for x in node.inputs if isinstance(x, Value)))
        beside = [x for x in values if _is_beside(node, x)]
        apart = sum(self[x] for x in node.inputs if isinstance(x, Value) and x not in beside)
        self._own[node] = _own(node) + apart + sum(_LOAD for x in beside if x not in self._nodes)
        sets = sorted((self._nodes.get(x, frozenset()) for x in beside), key=len, reverse=True)
        nodes, size = (sets[0], max(self._bytes.get(x, 0) for x in beside)) if sets else (frozenset(), 0)
        if len(sets) > 1:
            nodes = frozenset().union(*sets)
            size = sum(map(self._own.__getitem__, nodes))
        for out in node.outputs:
            self._nodes[out] = nodes | {node}
            self._bytes[out] = size + self._own[node]


def _is_beside(node: Node, x: Value) -> bool:
    """Whether an operand is asked for at the place of the result, once for all who ask: the only place of a number is
    that of every other."""
    if node.op in ELEMENTWISE:
        return True
    return x.size == 1 and node.outputs[0].size == 1 and node.op not in _BRANCHES


def _own(node: Node) -> int:
    if node.op in ELEMENTWISE:
        params = tuple(sorted(node.params.items()))
        return _elementwise(node.op, tuple(map(dtype_of, node.inputs)), node.outputs[0].dtype, params)
    axes = max(len(x.shape) for x in (*node.inputs, *node.outputs))
    branches = len(node.inputs) if node.op in ("concatenate", "stack") else int(node.op in _BRANCHES)
    return _ROUND * _BASE.get(node.op, 5) + axes * _PLACE + branches * _BRANCH


@functools.lru_cache(maxsize=4096)
def _elementwise(op: str, dtypes: tuple[np.dtype, ...], out: np.dtype, params: tuple) -> int:
    """The bytes that are written for one element."""
    module = Module(1)
    scalars = Scalars(module)
    args = [scalars.from_word(module.shared(1 + i).load(module.thread), t) for i, t in enumerate(dtypes)]
    before = module.code_bytes
    scalars.apply(op, args, dtypes, out, dict(params))
    return module.code_bytes - before
