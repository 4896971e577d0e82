"""One kernel: the sections that write a stage's outputs, and their code."""

import functools
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vk_kernels.compiler.codegen.emitter import Emitter, dtype_of, size_of
from vk_kernels.compiler.codegen.geometry import THREADS, Geometry
from vk_kernels.compiler.codegen.heroes import Heroes, MapKey, RankKey, ReduceKey, SectionKey
from vk_kernels.compiler.codegen.kernel_stages import Stage, Write, numbers, without_common_arrays
from vk_kernels.compiler.codegen.primitives import EXPENSIVE
from vk_kernels.compiler.codegen.ranks import RankSection
from vk_kernels.compiler.codegen.scalars import bits_of
from vk_kernels.compiler.codegen.sections import (
    AT_ONCE,
    KernelSection,
    MapSection,
    Output,
    ReduceSection,
    SplitReductionSection,
)
from vk_kernels.compiler.codegen.workgroup_reduce import Workspace
from vk_kernels.compiler.ir import Graph, Node, Operand, Value
from vk_kernels.spirv.builder import Code, Id, Module, StorageBuffer
from vk_kernels.spirv.spec import Op

_MANY = 1 << 20  # elements of a kernel, of which a thread makes AT_ONCE: they fill a large GPU all the same
_LONG_CODE = EXPENSIVE | {"threefry2x32"}  # of which the code is not repeated for that, nor of more nodes than
_SHORT = 64
_MOST_GROUPS = 65_535  # along one axis of a dispatch; every device has that many


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
class EmittedKernel:
    """A kernel, the operands that it reads, and pairs of (read, written) operands that may share memory."""

    kernel: GeneratedKernel
    reads: set[int]
    may_share: set[tuple[int, int]]


class Bindings:
    """The buffers of a kernel, each bound when it is first used. As a mapping, those of the values in memory."""

    def __init__(self, module: Module, memory: Mapping[Value, int]):
        self._module, self.memory = module, memory
        self.operands: list[int] = []
        self.writes: list[bool] = []
        self.buffers: dict[int, StorageBuffer] = {}

    def _bind(self, operand: int, dtype: np.dtype, writable: bool) -> StorageBuffer:
        if operand not in self.buffers:
            self.buffers[operand] = self._module.buffer(len(self.operands), bits_of(dtype), writable)
            self.operands.append(operand)
            self.writes.append(writable)
        return self.buffers[operand]

    def output(self, write: Write) -> Output:
        """The buffer to write a value to."""
        value, operand = write
        return Output(value, self._bind(operand, dtype_of(value), True))

    def __contains__(self, value: Value) -> bool:
        return value in self.memory

    def __getitem__(self, value: Value) -> StorageBuffer:
        return self._bind(self.memory[value], value.dtype, False)


def emit_kernel(graph: Graph, heroes: Heroes, stage: Stage, memory: Mapping[Value, int], label: str) -> EmittedKernel:
    """The kernel of a stage. memory: the operands that the values in memory are in."""
    module = Module(THREADS)
    bindings = Bindings(module, memory)
    emitter = Emitter(module, graph, bindings)
    sections = lay_out(graph, heroes, stage, bindings, Workspace(module))
    total = sum(section.groups for section in sections)
    rows = -(-total // _MOST_GROUPS)
    group = module.group_x
    if rows > 1:
        group = module.op(Op.I_ADD, module.op(Op.I_MUL, module.group_y, module.constant(_MOST_GROUPS)), group)
    emitter.run(_dispatch(emitter, sections, group))
    may_share = _may_share(emitter, sections, bindings)
    for operand in {operand for pair in may_share for operand in pair}:
        bindings.buffers[operand].may_alias()
    groups = (total, 1, 1) if rows == 1 else (_MOST_GROUPS, rows, 1)
    kernel = GeneratedKernel(label, module.assemble(), tuple(bindings.operands), tuple(bindings.writes), groups)
    return EmittedKernel(kernel, {memory[value] for value in emitter.reads}, may_share)


def lay_out(
    graph: Graph, heroes: Heroes, stage: Stage, bindings: Bindings, workspace: Workspace
) -> list[KernelSection]:
    """The sections of a stage: what has one key, and arrays in common, is written by the same workgroups."""
    by_key: dict[SectionKey, list[Output]] = {}
    for write in dict.fromkeys([*stage.outputs, *stage.results]):
        by_key.setdefault(heroes.section_key(write[0]), []).append(bindings.output(write))
    pieces: dict[Geometry, list[Output]] = {}
    for hero, (partial, operand) in stage.pieces.items():
        buffer = bindings.output((partial, operand)).buffer
        pieces.setdefault(heroes.geometry[hero], []).append(Output(hero.outputs[0], buffer))

    of_numbers = numbers(graph)

    def apart(outputs: Sequence[Output]) -> list[list[Output]]:
        values = [value for value, _ in outputs]
        groups = without_common_arrays(values, heroes.producers, bindings.memory.keys(), of_numbers)
        return [[outputs[i] for i in group] for group in groups]

    sections: list[KernelSection] = []
    reduced = {hero.outputs[0]: hero for hero in stage.pieces}
    for geometry, of_geometry in pieces.items():
        alike = MapKey(geometry.shape)  # outputs that may read what the reductions read go with them, in one reading
        for together in apart([*of_geometry, *by_key.pop(alike, ())]):
            if any(value in reduced for value, _ in together):
                sections.append(_split_reductions(geometry, together, reduced, workspace))
            else:
                by_key.setdefault(alike, []).extend(together)
    at_once = _elements_at_once(graph.nodes, stage.outputs)
    for key, outputs in by_key.items():
        match key:
            case MapKey():
                for together in apart(outputs):
                    nodes = _makers(together, heroes.producers, bindings.memory.keys())
                    sections.append(MapSection(together, max(at_once, _elements_at_once(nodes, together))))
            case RankKey(node):
                sections.append(RankSection(node, {node.outputs.index(value): buffer for value, buffer in outputs}))
            case ReduceKey(geometry):
                sections += [_reductions(geometry, together, heroes, workspace) for together in apart(outputs)]
    return sections


def _split_reductions(
    geometry: Geometry, together: Sequence[Output], reduced: Mapping[Operand, Node], workspace: Workspace
) -> SplitReductionSection:
    """A section of the pieces of split reductions, `reduced` by their results, and of outputs of the whole shape."""
    pieces = [output for output in together if output.value in reduced]
    outputs = [output for output in together if output.value not in reduced]
    nodes = [reduced[value] for value, _ in pieces]
    return SplitReductionSection(geometry, nodes, [buffer for _, buffer in pieces], outputs, workspace)


def _reductions(geometry: Geometry, together: Sequence[Output], heroes: Heroes, workspace: Workspace) -> ReduceSection:
    """A section of outputs made of reductions, and of these."""
    whole = [output for output in together if output.value.shape == geometry.shape]
    kept = [output for output in together if output.value.shape != geometry.shape]
    return ReduceSection(geometry, heroes.levels([value for value, _ in together]), kept, whole, workspace)


def _elements_at_once(nodes: Collection[Node], outputs: Sequence[Output]) -> int:
    """Elements that a thread makes where it makes one after another, of a kernel or of a section that has so much."""
    many = sum(size_of(value) for value, _ in outputs) >= _MANY
    short = len(nodes) <= _SHORT and not any(node.op in _LONG_CODE for node in nodes)
    return AT_ONCE if many and short else 1


def _makers(outputs: Sequence[Output], producers: Mapping[Value, Node], loaded: Container[Operand]) -> set[Node]:
    """The nodes that compute some outputs from what is loaded."""
    found: set[Node] = set()
    stack: list[Operand] = [value for value, _ in outputs]
    while stack:
        x = stack.pop()
        maker = None if x in loaded else producers.get(x)
        if maker is not None and maker not in found:
            found.add(maker)
            stack += maker.inputs
    return found


def _may_share(emitter: Emitter, sections: Sequence[KernelSection], bindings: Bindings) -> set[tuple[int, int]]:
    """Inputs that are read only where, and by the same thread that, an output of the same width is written."""
    operands = {buffer: operand for operand, buffer in bindings.buffers.items()}
    return {
        (bindings.memory[value], operands[output.buffer])
        for section in sections
        if isinstance(section, MapSection | SplitReductionSection)
        for output in section.outputs
        for value, places in emitter.reads.items()
        if places <= section.indices
        and size_of(value) == size_of(output.value)
        and bits_of(value.dtype) == bits_of(dtype_of(output.value))
    }


def _dispatch(e: Emitter, sections: Sequence[KernelSection], group: Id) -> Code:
    """Finds the section of a workgroup by halves."""
    m = e.m
    starts = np.cumsum([0, *(section.groups for section in sections)]).tolist()

    def among(first: int, last: int) -> Code:
        if first == last:
            yield from sections[first].emit(e, m.op(Op.I_SUB, group, m.constant(starts[first])))
            return []
        middle = (first + last) // 2
        condition = m.op(Op.U_LESS, group, m.constant(starts[middle + 1]))
        below = functools.partial(among, first, middle)
        return (yield from m.branch(condition, below, functools.partial(among, middle + 1, last)))

    yield from among(0, len(sections) - 1)
