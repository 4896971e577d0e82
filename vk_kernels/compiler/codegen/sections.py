"""How the threads of a kernel share the work: sections, each of which fills some outputs with its own workgroups.

A kernel is a row of sections, so that outputs of different shapes need one dispatch (horizontal fusion).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vk_kernels.compiler.codegen.emitter import Emitter, dtype_of, no_questions, shape_of, size_of
from vk_kernels.compiler.codegen.geometry import THREADS, Geometry
from vk_kernels.compiler.codegen.ranks import RankSection
from vk_kernels.compiler.codegen.workgroup_reduce import Lanes, Stretch, Workspace, reduce_in_workgroup
from vk_kernels.compiler.ir import Node, Operand
from vk_kernels.spirv.builder import Code, Id, StorageBuffer
from vk_kernels.spirv.spec import Ext, Op

AT_ONCE = 4  # elements that a thread has on their way together: one by one, most of the time goes by waiting


class Output(NamedTuple):
    value: Operand
    buffer: StorageBuffer


def _words(e: Emitter, outputs: Sequence[Output], place: Sequence[Id]) -> Code:
    """The words of outputs of one shape at a place: all are made before any is stored, as an output may be an input's
    memory."""
    words = []
    for value, _ in outputs:
        x = yield value, place
        words.append(e.scalars.to_word(x, dtype_of(value)))
    return words


@no_questions
def _store(outputs: Sequence[Output], index: Id, words: Sequence[Id]) -> None:
    for (_, buffer), word in zip(outputs, words, strict=True):
        buffer.store(index, word)


@dataclass
class MapSection:
    """A thread an element, or a few elements, of one or several outputs of one shape."""

    outputs: list[Output]
    at_once: int  # elements of a thread, which are on their way together
    indices: set[Id] = field(default_factory=set)  # of the elements that a thread makes, once emitted

    @property
    def groups(self) -> int:
        return -(-size_of(self.outputs[0].value) // (self.at_once * THREADS))

    def emit(self, e: Emitter, group: Id) -> Code:
        m, shape = e.m, shape_of(self.outputs[0].value)
        first = m.op(Op.I_ADD, m.op(Op.I_MUL, group, m.constant(self.at_once * THREADS)), m.thread)
        last = m.constant(math.prod(shape) - 1)

        def elements() -> Code:
            stores = []
            for i in range(self.at_once):
                index = m.op(Op.I_ADD, first, m.constant(i * THREADS))
                inside = m.op(Op.U_LESS_EQUAL, index, last)
                if i:  # past the end, the last element (or what another thread has put in its place): it is thrown away
                    index = m.ext(Ext.U_MIN, index, last)
                self.indices.add(index)
                words = yield from _words(e, self.outputs, e.place(index, shape))
                stores.append((inside, index, words))
            for inside, index, words in stores:
                yield from m.branch(inside, functools.partial(_store, self.outputs, index, words))

        yield from m.branch(m.op(Op.U_LESS_EQUAL, first, last), elements)


@dataclass
class ReduceSection:
    """Reductions of one geometry, and outputs made of their results: of the kept shape or of the whole one.

    A workgroup takes `lanes` of the geometry: it goes over its part of the operands once for all the reductions that
    need no other's result, and again for those that do, and once more for the outputs of the whole shape.
    """

    geometry: Geometry
    levels: list[list[Node]]
    kept: list[Output]
    whole: list[Output]
    workspace: Workspace

    @property
    def groups(self) -> int:
        return self.geometry.tiles

    def emit(self, e: Emitter, group: Id) -> Code:
        m, geometry = e.m, self.geometry
        lanes = Lanes(m, geometry, group)
        kept = e.place(lanes.k, geometry.kept)
        count = m.constant(math.prod(geometry.reduced))
        for nodes in self.levels:
            stretch = Stretch(lanes.along, count)
            totals = yield from reduce_in_workgroup(e, lanes, nodes, kept, stretch, self.workspace)
            for node, (reducer, total) in zip(nodes, totals, strict=True):
                e.remember(node.outputs[0], kept, reducer.result(total))

        words = []
        for value, _ in self.kept:
            x = yield value, e.reshaped(kept, geometry.kept, shape_of(value))
            words.append(e.scalars.to_word(x, dtype_of(value)))

        def store_whole() -> Code:
            yield from m.loop(lanes.along, count, m.constant(geometry.lanes[1]), [], element)

        def element(r: Id, carried: list[Id]) -> Code:
            place = geometry.place(kept, e.place(r, geometry.reduced))
            made = yield from _words(e, self.whole, place)
            yield from _store(self.whole, e.linear(place, geometry.shape), made)
            return []

        if self.kept:
            yield from m.branch(lanes.leads(), lambda: _store(self.kept, lanes.k, words))
        if self.whole:
            yield from m.branch(lanes.inside, store_whole)


@dataclass
class SplitReductionSection:
    """The first half of long reductions: `splits` of the geometry, each by a workgroup of its own.

    What goes into `buffers` is of the kept shape and one axis more, over the pieces. Outputs of the whole shape, which
    need no reduction, are stored on the way: an optimizer's update and its norm read the same arrays once.
    """

    geometry: Geometry
    nodes: list[Node]
    buffers: list[StorageBuffer]
    outputs: list[Output]
    workspace: Workspace
    indices: set[Id] = field(default_factory=set)  # of the elements that a thread goes over, once emitted

    @property
    def groups(self) -> int:
        return self.geometry.tiles * self.geometry.splits

    def emit(self, e: Emitter, group: Id) -> Code:
        m, geometry = e.m, self.geometry
        splits = m.constant(geometry.splits)
        piece = m.op(Op.U_MOD, group, splits)
        lanes = Lanes(m, geometry, m.op(Op.U_DIV, group, splits))
        kept = e.place(lanes.k, geometry.kept)
        length = m.constant(geometry.piece_length)
        begin = m.op(Op.I_MUL, piece, length)
        start = m.op(Op.I_ADD, begin, lanes.along)
        stop = m.ext(Ext.U_MIN, m.op(Op.I_ADD, begin, length), m.constant(math.prod(geometry.reduced)))

        def visit(place: Sequence[Id]) -> Code:
            index = e.linear(place, geometry.shape)
            self.indices.add(index)
            words = yield from _words(e, self.outputs, place)
            return functools.partial(_store, self.outputs, index, words)

        stretch = Stretch(start, stop, AT_ONCE, visit if self.outputs else None)
        totals = yield from reduce_in_workgroup(e, lanes, self.nodes, kept, stretch, self.workspace)

        @no_questions
        def store() -> None:
            index = m.op(Op.I_ADD, m.op(Op.I_MUL, lanes.k, splits), piece)
            for buffer, (reducer, total) in zip(self.buffers, totals, strict=True):
                buffer.store(index, e.scalars.to_word(total[0], reducer.dtypes[0]))

        yield from m.branch(lanes.leads(), store)


KernelSection = MapSection | ReduceSection | SplitReductionSection | RankSection
