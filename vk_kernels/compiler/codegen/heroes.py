"""Heroes, the operations that the threads of a kernel are laid out for, and what one kernel can therefore write.

A hero (XLA's word) is a long reduction, whose elements several threads share, or a sort, which looks at all of an axis
for each element. All else is computed by one thread wherever it is asked for. The heroes of a value are those that it
is made of, through any number of other operations, up to what is in memory.

A kernel writes a value whose heroes all have one geometry, in the section of its key. What has others waits for the
next kernel; of its heroes, this one stores the frontier: those that it can make by themselves. Of

    y = sort(x); z = y / y.sum()

the heroes of z are the sort and the sum, which needs the sort; so one kernel stores the frontier of z, which is y, and
in the next one, where y is in memory, z has one hero.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from vk_kernels.compiler.codegen.emitter import shape_of, size_of
from vk_kernels.compiler.codegen.geometry import Geometry, is_split
from vk_kernels.compiler.codegen.ranks import RANKS
from vk_kernels.compiler.codegen.reductions import REDUCTIONS
from vk_kernels.compiler.ir import Graph, Literal, Node, Operand, Value, producers


@dataclass(frozen=True)
class MapKey:
    """Section key of values without heroes, of one shape: a thread an element."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class ReduceKey:
    """Section key of values made of reductions of one geometry."""

    geometry: Geometry


@dataclass(frozen=True)
class RankKey:
    """Section key of the results of one sort or top_k."""

    node: Node


SectionKey = MapKey | ReduceKey | RankKey


class Heroes:
    """The heroes of a graph of which the values in `memory` are there already."""

    def __init__(self, graph: Graph, memory: Container[Value]):
        self._memory = memory
        self.producers = producers(graph.nodes)
        geometries = {node: Geometry.of(node) for node in graph.nodes if node.op in REDUCTIONS}
        self.geometry = {node: geometry for node, geometry in geometries.items() if geometry.is_long}
        self.split = set(filter(is_split, geometries))
        self.all = [node for node in graph.nodes if self._is_hero(node)]
        self.inner: dict[Node, frozenset[Node]] = {}  # the heroes of a node's operands
        for node in graph.nodes:
            self.inner[node] = frozenset().union(*map(self.of, node.inputs))

    def _is_hero(self, node: Node) -> bool:
        return node.op in RANKS or node in self.geometry

    def of(self, value: Operand) -> frozenset[Node]:
        """The heroes of a value."""
        if isinstance(value, Literal) or value in self._memory:
            return frozenset()
        node = self.producers[value]
        return self.inner[node] | {node} if self._is_hero(node) else self.inner[node]

    def section_key(self, value: Operand) -> SectionKey | None:
        """The key of the section that writes a value: values of one key share a section. None: no kernel writes it
        before more is in memory."""
        heroes = self.of(value)
        if not heroes:
            return MapKey(shape_of(value))
        if len(heroes) == 1 and value in (hero := next(iter(heroes))).outputs and hero.op in RANKS:
            return RankKey(hero)
        geometries = {self.geometry.get(hero) for hero in heroes}  # None: of a sort
        if len(geometries) > 1 or None in geometries or heroes & self.split:
            return None
        key = ReduceKey(geometries.pop())
        fits = value.shape == key.geometry.shape or size_of(value) == math.prod(key.geometry.kept)
        return key if fits else None

    def frontier(self, value: Operand) -> list[Node]:
        """The heroes of a value that a kernel can make, or the pieces of them, and that no other of those needs."""
        heroes, found, stack, seen = self.of(value), {}, [value], set()
        while stack:
            value = stack.pop()
            if isinstance(value, Literal) or value in self._memory or value in seen:
                continue
            seen.add(value)
            node = self.producers[value]
            if node in heroes and self.is_closed(node):
                found[node] = None
            else:
                stack += node.inputs
        return list(found)

    def is_closed(self, hero: Node) -> bool:
        """Whether one kernel can make a hero, all or its pieces."""
        inner = self.inner[hero]
        if hero.op in RANKS or hero in self.split:
            return not inner
        geometries = {self.geometry.get(other) for other in (hero, *inner)}  # None: of a sort
        return len(geometries) == 1 and not inner & self.split

    def levels(self, values: Sequence[Operand]) -> list[list[Node]]:
        """The heroes of values, all of one geometry, by how many others' results each one needs in turn."""
        needed = frozenset().union(*map(self.of, values))
        nodes = [hero for hero in self.all if hero in needed]
        depth: dict[Node, int] = {}
        for node in nodes:  # an inner hero stands before
            depth[node] = 1 + max((depth[other] for other in self.inner[node] & needed), default=-1)
        return [[node for node in nodes if depth[node] == level] for level in range(max(depth.values()) + 1)]
