"""Kernels made to measure: a graph of primitives becomes SPIR-V.

`generate` takes any graph of supported primitives. Elementwise and shape primitives cost no memory of their own. What
a graph becomes is one kernel, or several where a long reduction feeds something that needs all of it:

- outputs of one shape, without long reductions, are one section: a thread an element;
- long reductions over the same axes, what comes before them, and outputs made of their results of the kept or the
  whole shape (a softmax, a layer norm) are one section, with several threads for each reduction;
- sort and top_k are sections of their own, and so are the pieces of a reduction that is too long for one workgroup;
  outputs of the whole shape that are made of the same arrays go with the pieces, so that those are read once;
- what needs the result of a section of other axes, of pieces or of a sort is in the next kernel.

A reduction of few elements, a product, a running sum, a gather and a scatter are computed by one thread wherever an
element of them is asked for: right everywhere, but `EXPENSIVE` ones are best outputs, not inputs of something that asks
for them often.
"""

import functools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vk_kernels.compiler.codegen import gather_scatter, movement  # noqa: F401  (they register their handlers)
from vk_kernels.compiler.codegen.emitter import HANDLERS, Emitter, dtype_of, shape_of, size_of
from vk_kernels.compiler.codegen.geometry import THREADS, Geometry, is_split
from vk_kernels.compiler.codegen.ranks import RANKS, RankSection
from vk_kernels.compiler.codegen.reductions import REDUCTIONS, accumulator_dtype
from vk_kernels.compiler.codegen.scalars import ELEMENTWISE, bits_of, kind
from vk_kernels.compiler.codegen.sections import (
    AT_ONCE,
    MapSection,
    Output,
    ReduceSection,
    Section,
    SplitReductionSection,
)
from vk_kernels.compiler.codegen.workgroup_reduce import Workspace
from vk_kernels.compiler.ir import Graph, Literal, Node, Value
from vk_kernels.spirv.builder import Buffer, Code, Id, Module
from vk_kernels.spirv.spec import Op

# Made of many elements each.
EXPENSIVE = REDUCTIONS | RANKS | {op for op in HANDLERS if op.startswith(("scatter", "cum"))} | {"dot_general"}
# The primitives of JAX that kernels are generated for.
SUPPORTED = ELEMENTWISE | HANDLERS.keys() | RANKS

_MANY = 1 << 20  # elements of a kernel, of which a thread makes AT_ONCE: they fill a large GPU all the same
_LONG_CODE = EXPENSIVE | {"threefry2x32"}  # of which the code is not repeated for that, nor of more nodes than
_SHORT = 64

_MOST_GROUPS = 65_535  # along one axis of a dispatch; every device has that many
_MOST_ELEMENTS = 2**31 - THREADS


@dataclass(frozen=True)
class GeneratedKernel:
    """One dispatch. `operands` index into (*inputs, *outputs, *scratch) of the graph, in binding order.

    writes: of each operand, whether the kernel writes it.
    """

    label: str
    spirv: bytes
    operands: tuple[int, ...]
    writes: tuple[bool, ...]
    groups: tuple[int, int, int]


@dataclass(frozen=True)
class Generated:
    """Kernels in order, each after the ones whose results it reads; `scratch` holds bytes a buffer, undefined at first.

    `in_place`: (input, output) numbers that may be the same memory. An input may share with one output at most.
    No kernels: the outputs have no elements.
    """

    kernels: tuple[GeneratedKernel, ...]
    scratch: tuple[int, ...]
    in_place: frozenset[tuple[int, int]]


def check(node: Node) -> None:
    """Raises ValueError, in one line, for a node that no kernel can be generated for."""
    if node.op not in SUPPORTED:
        raise ValueError(f"no kernel is generated for the primitive {node.op}")
    for x in (*node.inputs, *node.outputs):
        kind(dtype_of(x))
        if size_of(x) > _MOST_ELEMENTS:
            raise ValueError(f"{node.op}: an array of {size_of(x):,} elements; kernels take {_MOST_ELEMENTS:,}")
    if node.op == "bitcast_convert_type" and shape_of(node.inputs[0]) != node.outputs[0].shape:
        raise ValueError("bitcast_convert_type between types of different width has no kernel")


def is_elementwise(node: Node) -> bool:
    """Whether an element of the result is made of one element of each operand."""
    single = all(x.size == 1 for x in (*node.inputs, *node.outputs))
    return node.op in ELEMENTWISE or (node.op in HANDLERS and single)


def generate(graph: Graph, label: str | None = None) -> Generated:
    """The kernels of a graph, whose constants must be inputs. Raises ValueError for what `check` refuses."""
    if graph.constants:
        raise ValueError("constants of a graph to generate must be inputs")
    for node in graph.nodes:
        check(node)
    label = label or _label(graph.nodes)
    count = len(graph.inputs)
    stored = {value: i for i, value in enumerate(graph.inputs)}
    left = [(value, count + i) for i, value in enumerate(graph.outputs) if size_of(value)]
    scratch: list[int] = []

    def new_scratch(value: Value) -> int:
        scratch.append(value.nbytes)
        return count + len(graph.outputs) + len(scratch) - 1

    kernels, reads, in_place = [], [], set()
    while left:
        stage = _KernelBuilder(graph, stored)
        for value, operand in left:
            stage.add(value, operand)
        graph = stage.cut(new_scratch)
        kernel, read, pairs = stage.emit(label if not kernels else f"{label}, part {len(kernels) + 1}")
        kernels.append(kernel)
        reads.append(read)
        in_place |= {(i, o - count) for i, o in pairs if i < count <= o < count + len(graph.outputs)}
        stored |= stage.made
        left = [(value, operand) for value, operand in left if operand not in stage.written]
    once = {i for i in range(count) if sum(i in read for read in reads) == 1}
    return Generated(tuple(kernels), tuple(scratch), frozenset((i, o) for i, o in in_place if i in once))


def _label(nodes: Iterable[Node]) -> str:
    names = list(dict.fromkeys(node.op for node in nodes))
    telling = [name for name in names if name in EXPENSIVE] or names
    return "+".join(telling[:4]) + ("+..." if len(telling) > 4 else "") if names else "copy"


class _KernelBuilder:
    """One kernel of several: the outputs that it can make from what is `stored`, and what the others need first."""

    def __init__(self, graph: Graph, stored: dict[Value, int]):
        self._graph, self._stored = graph, stored
        self._producers = {out: node for node in graph.nodes for out in node.outputs}
        # Heroes take several threads for an element, or all of an axis at once.
        reductions = [node for node in graph.nodes if node.op in REDUCTIONS]
        self._geometry = {node: g for node in reductions if (g := Geometry.of(node)).is_long}
        self._all_heroes = [node for node in graph.nodes if node.op in RANKS or node in self._geometry]
        self._split = set(filter(is_split, reductions))
        self._inner: dict[Node, frozenset[Node]] = {}  # the heroes that a node needs
        for node in graph.nodes:
            needed = [self._heroes(x) for x in node.inputs]
            self._inner[node] = frozenset().union(*needed)
        self._uniform: set[Value] = set()  # arrays of one number
        for node in graph.nodes:
            if node.inputs and all(map(self._is_number, node.inputs)):
                self._uniform.update(node.outputs)
        self._outputs: list[tuple[Value | Literal, int]] = []  # to be written by this stage
        self._frontier: dict[Node, None] = {}  # whose results must be stored for the next one
        self._partials: dict[Node, Value] = {}
        self.made: dict[Value, int] = {}

    @property
    def written(self) -> set[int]:
        return {operand for _, operand in self._outputs}

    def _heroes(self, value: Value | Literal) -> frozenset[Node]:
        if isinstance(value, Literal) or value in self._stored:
            return frozenset()
        node = self._producers[value]
        is_hero = node.op in RANKS or node in self._geometry
        return self._inner[node] | {node} if is_hero else self._inner[node]

    def _is_number(self, x: Value | Literal) -> bool:
        return isinstance(x, Literal) or x.size <= 1 or x in self._uniform

    def add(self, value: Value | Literal, operand: int) -> None:
        """Writes `value` to an operand in this stage if it can be, or else what it needs."""
        if self._section_of(value) is not None:
            self._outputs.append((value, operand))
            return
        heroes, stack, seen = self._heroes(value), [value], set()
        while stack:
            value = stack.pop()
            if isinstance(value, Literal) or value in self._stored or value in seen:
                continue
            seen.add(value)
            node = self._producers[value]
            if node in heroes and self._is_closed(node):
                self._frontier[node] = None
            else:
                stack += node.inputs

    def _is_closed(self, hero: Node) -> bool:
        """Whether this stage can make a hero, all or its pieces."""
        inner = self._inner[hero]
        if hero.op in RANKS or hero in self._split:
            return not inner
        geometries = {self._geometry.get(other) for other in (hero, *inner)}  # None: a sort
        return len(geometries) == 1 and not inner & self._split

    def _section_of(self, value: Value | Literal) -> tuple | None:
        """The key of the section that an output can be written with in this stage; None if in no way."""
        heroes = self._heroes(value)
        if not heroes:
            return "map", shape_of(value)
        first = next(iter(heroes))
        if len(heroes) == 1 and first.op in RANKS and value in first.outputs:
            return "rank", first
        geometries = {self._geometry.get(hero) for hero in heroes}
        if len(geometries) > 1 or None in geometries or heroes & self._split:
            return None
        (geometry,) = geometries
        size = math.prod(geometry.kept)
        fits = value.shape == geometry.shape or size_of(value) == size
        return ("reduce", geometry) if fits else None

    def cut(self, new_scratch) -> Graph:
        """Chooses where the results that the next stage needs go. Gives the graph with pieces put together there."""
        direct = {value: operand for value, operand in self._outputs if isinstance(value, Value)}
        replaced: dict[Node, Node] = {}
        for hero in self._frontier:
            if hero in self._split:
                geometry = self._geometry[hero]
                partial = Value((*geometry.kept, geometry.splits), accumulator_dtype(hero))
                self._partials[hero] = partial
                self.made[partial] = new_scratch(partial)
                replaced[hero] = replace(hero, inputs=(partial,), params={"axes": (len(geometry.kept),)})
                continue
            for value in hero.outputs:
                self.made[value] = direct[value] if value in direct else new_scratch(value)
        nodes = [replaced.get(node, node) for node in self._graph.nodes]
        return replace(self._graph, nodes=nodes)

    @property
    def _at_once(self) -> int:
        """Elements that a thread makes where it makes one after another."""
        nodes = self._graph.nodes
        many = sum(size_of(value) for value, _ in self._outputs) >= _MANY
        short = len(nodes) <= _SHORT and not any(node.op in _LONG_CODE for node in nodes)
        return AT_ONCE if many and short else 1

    def _sections(self, module: Module, bindings: "_Bindings") -> list[Section]:
        workspace = Workspace(module)
        groups: dict[tuple, list[Output]] = {}
        targets = dict.fromkeys(self._outputs)
        for hero in self._frontier:
            if hero not in self._partials:
                targets |= dict.fromkeys((value, self.made[value]) for value in hero.outputs)
        for value, operand in targets:
            output = Output(value, bindings.output(operand, dtype_of(value)))
            groups.setdefault(self._section_of(value), []).append(output)
        sections: list[Section] = []
        pieces: dict[Geometry, list[Output]] = {}
        made = {hero.outputs[0]: hero for hero in self._partials}
        for value, hero in made.items():
            partial = self._partials[hero]
            buffer = bindings.output(self.made[partial], partial.dtype)
            pieces.setdefault(self._geometry[hero], []).append(Output(value, buffer))
        for geometry, partials in pieces.items():
            alike = "map", geometry.shape
            for together in self._components([*partials, *groups.pop(alike, ())]):
                nodes = [made[output.value] for output in together if output.value in made]
                if nodes:
                    buffers = [output.buffer for output in together if output.value in made]
                    outputs = [output for output in together if output.value not in made]
                    sections.append(SplitReductionSection(geometry, nodes, buffers, outputs, workspace))
                else:
                    groups.setdefault(alike, []).extend(together)
        for (sort, what), outputs in groups.items():
            if sort == "map":
                sections += [MapSection(together, self._at_once) for together in self._components(outputs)]
            elif sort == "rank":
                numbers = {value: k for k, value in enumerate(what.outputs)}
                sections.append(RankSection(what, {numbers[value]: buffer for value, buffer in outputs}))
            else:
                for together in self._components(outputs):
                    needed = frozenset().union(*(self._heroes(value) for value, _ in together))
                    nodes = [hero for hero in self._all_heroes if hero in needed]
                    whole = [output for output in together if output.value.shape == what.shape]
                    kept = [output for output in together if output.value.shape != what.shape]
                    sections.append(ReduceSection(what, levels(nodes, self._inner), kept, whole, workspace))
        return sections

    def _components(self, outputs: Sequence[Output]) -> list[list[Output]]:
        """Outputs of one section in groups that have no array in common, so that other threads take other groups."""
        first: dict[Value, int] = {}  # array -> the first output that needs it
        parent = list(range(len(outputs)))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for i, output in enumerate(outputs):
            stack = [] if isinstance(output.value, Literal) else [output.value]
            while stack:
                value = stack.pop()
                if first.get(value) == i:
                    continue
                if value in first:  # what it is made of belongs to that output already
                    parent[root(i)] = root(first[value])
                    continue
                first[value] = i
                if value not in self._stored:
                    stack += (x for x in self._producers[value].inputs if not self._is_number(x))
        groups: dict[int, list[Output]] = {}
        for i, output in enumerate(outputs):
            groups.setdefault(root(i), []).append(output)
        return list(groups.values())

    def emit(self, label: str) -> tuple[GeneratedKernel, set[int], set[tuple[int, int]]]:
        """(the kernel, the operands it reads, (input, output) operands that may share memory)."""
        module = Module(THREADS)
        bindings = _Bindings(module, self._stored)
        emitter = Emitter(module, self._graph, bindings)
        sections = self._sections(module, bindings)
        total = sum(section.groups for section in sections)
        rows = -(-total // _MOST_GROUPS)
        group = module.group_x
        if rows > 1:
            group = module.op(Op.I_ADD, module.op(Op.I_MUL, module.group_y, module.constant(_MOST_GROUPS)), group)
        emitter.run(_dispatch(emitter, sections, group))
        shared = self._shared_memory(emitter, sections, bindings)
        for operand in {operand for pair in shared for operand in pair}:
            bindings.buffers[operand].may_alias()
        groups = (total, 1, 1) if rows == 1 else (_MOST_GROUPS, rows, 1)
        kernel = GeneratedKernel(label, module.assemble(), tuple(bindings.operands), tuple(bindings.writes), groups)
        return kernel, {self._stored[value] for value in emitter.reads}, shared

    def _shared_memory(
        self, emitter: Emitter, sections: Sequence[Section], bindings: "_Bindings"
    ) -> set[tuple[int, int]]:
        """Inputs that are read only where, and by the same thread that, an output of the same width is written."""
        operands = {buffer: operand for operand, buffer in bindings.buffers.items()}
        return {
            (self._stored[value], operands[output.buffer])
            for section in sections
            if isinstance(section, MapSection | SplitReductionSection)
            for output in section.outputs
            for value, places in emitter.reads.items()
            if places <= section.indices
            and size_of(value) == size_of(output.value)
            and bits_of(value.dtype) == bits_of(dtype_of(output.value))
        }


class _Bindings:
    """The buffers of a kernel, each bound when it is first used. As a container, those of the values in memory."""

    def __init__(self, module: Module, stored: dict[Value, int]):
        self._module, self._stored = module, stored
        self.operands: list[int] = []
        self.writes: list[bool] = []
        self.buffers: dict[int, Buffer] = {}

    def _bind(self, operand: int, dtype: np.dtype, writable: bool) -> Buffer:
        if operand not in self.buffers:
            self.buffers[operand] = self._module.buffer(len(self.operands), bits_of(dtype), writable)
            self.operands.append(operand)
            self.writes.append(writable)
        return self.buffers[operand]

    def output(self, operand: int, dtype: np.dtype) -> Buffer:
        return self._bind(operand, dtype, True)

    def __contains__(self, value: Value) -> bool:
        return value in self._stored

    def __getitem__(self, value: Value) -> Buffer:
        return self._bind(self._stored[value], value.dtype, False)


def _dispatch(e: Emitter, sections: Sequence[Section], group: Id) -> Code:
    """Finds the section of a workgroup by halves."""
    m = e.m
    starts = np.cumsum([0, *(section.groups for section in sections)]).tolist()

    def among(first: int, last: int) -> Generator:
        if first == last:
            yield from sections[first].emit(e, m.op(Op.I_SUB, group, m.constant(starts[first])))
            return []
        middle = (first + last) // 2
        condition = m.op(Op.U_LESS, group, m.constant(starts[middle + 1]))
        below = functools.partial(among, first, middle)
        return (yield from m.branch(condition, below, functools.partial(among, middle + 1, last)))

    yield from among(0, len(sections) - 1)


def levels(nodes: Sequence[Node], inner: dict[Node, set[Node]]) -> list[list[Node]]:
    """Reductions of one geometry, by how many others' results each one needs in turn. `inner`: those it needs."""
    depth: dict[Node, int] = {}
    chosen = set(nodes)
    for node in sorted(nodes, key=lambda node: len(inner[node] & chosen)):
        depth[node] = 1 + max((depth[other] for other in inner[node] & chosen), default=-1)
    return [[node for node in nodes if depth[node] == level] for level in range(max(depth.values()) + 1)]
