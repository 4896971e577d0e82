"""The graph of a function: plain data, printable, that every pass takes and gives.

Values are dense arrays in row-major order; there are no views, PRNG key arrays (they are their uint32 bits here) or
weak types. Operations carry the names and the parameters of JAX's primitives.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vk_kernels.runtime.array_spec import ArraySpec


@dataclass(frozen=True, eq=False)
class Value:
    """An array that a node, an input or a constant gives. It is known by identity."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @functools.cached_property
    def spec(self) -> ArraySpec:
        return ArraySpec(self.shape, self.dtype)

    @property
    def size(self) -> int:
        """Elements."""
        return self.spec.size

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def __str__(self) -> str:
        return str(self.spec)


@dataclass(frozen=True, eq=False)
class Literal:
    """An operand known when the kernel is made; usually a scalar, always small."""

    value: np.ndarray

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec(self.shape, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    @property
    def size(self) -> int:
        return self.value.size

    @property
    def nbytes(self) -> int:
        return self.value.nbytes

    def __str__(self) -> str:
        text = np.array2string(self.value, separator=",", threshold=8, edgeitems=2).replace("\n", "")
        return f"{text}:{self.dtype.name}"


Operand = Value | Literal


@dataclass(eq=False)
class Node:
    """One operation: `op` is the name of a JAX primitive, `params` are its parameters.

    source: the user's file and line. scope: the stack of names around it (`jax.named_scope`), '/' between them.
    call: of a kernel op: the encoded call that `op_call.make_plan` makes its plan from.
    """

    op: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Value, ...]
    params: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    scope: str = ""
    call: bytes = b""


@dataclass
class Graph:
    """A pure function. `nodes` are in topological order; `constants` are values with known contents."""

    inputs: tuple[Value, ...]
    constants: dict[Value, np.ndarray]
    nodes: list[Node]
    outputs: tuple[Operand, ...]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


@dataclass(frozen=True, eq=False)
class Function:
    """A function of numbers, as a parameter of a node. It is known by identity."""

    graph: Graph

    def __repr__(self) -> str:
        return f"function {id(self):#x}"


def producers(nodes: Iterable[Node]) -> dict[Value, Node]:
    """The node that gives each value."""
    return {value: node for node in nodes for value in node.outputs}


def consumers(graph: Graph) -> dict[Value, list[Node]]:
    """The nodes that read each value, each once, in order; values that none reads are absent."""
    found: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        for value in dict.fromkeys(x for x in node.inputs if isinstance(x, Value)):
            found.setdefault(value, []).append(node)
    return found


def names(graph: Graph) -> dict[Value, str]:
    """Short names for a listing: inputs i0, i1, ..., constants c0, c1, ..., and the rest v0, v1, ..."""
    found = {value: f"i{i}" for i, value in enumerate(graph.inputs)}
    found |= {value: f"c{i}" for i, value in enumerate(graph.constants)}
    made = (value for node in graph.nodes for value in node.outputs)
    return found | {value: f"v{i}" for i, value in enumerate(made)}


def _lines(graph: Graph) -> Iterator[str]:
    name = names(graph)

    def shown(x: Operand) -> str:
        return name.get(x, "undefined") if isinstance(x, Value) else str(x)

    yield f"graph({', '.join(f'{name[value]}: {value}' for value in graph.inputs)})"
    for value in graph.constants:
        yield f"  {name[value]}: {value} = constant"
    for node in graph.nodes:
        gives = ", ".join(f"{name[value]}: {value}" for value in node.outputs)
        takes = ", ".join(map(shown, node.inputs))
        scope = f"  # {node.scope}" if node.scope else ""
        yield f"  {gives} = {node.op}{_parameters(node.params)}({takes}){scope}"
    yield f"  return {', '.join(map(shown, graph.outputs))}"


def _parameters(params: Mapping[str, Any]) -> str:
    """The parameters that are set, on one line."""
    text = ", ".join(f"{key}={value}" for key, value in params.items() if value is not None).replace("\n", " ")
    return f"[{text if len(text) <= 100 else text[:97] + '...'}]" if text else ""
