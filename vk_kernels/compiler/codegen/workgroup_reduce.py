"""Reductions that the threads of a workgroup share: each thread's part in a loop, then a tree in shared memory.

The order in which elements are combined is fixed by the shapes, so that every run gives the same bits.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vk_kernels.compiler.codegen.emitter import Emitter, no_questions
from vk_kernels.compiler.codegen.geometry import THREADS, Geometry
from vk_kernels.compiler.codegen.reductions import Reducer, by_reducer
from vk_kernels.compiler.ir import Node
from vk_kernels.spirv.builder import Code, Id, Module, Shared
from vk_kernels.spirv.spec import Ext, Op

_TREES = 8  # reductions that are brought to their ends together; each takes 1 or 2 KiB of shared memory

Totals = list[tuple[Reducer, list[Id]]]  # with each reduction, its accumulators


class Workspace:
    """Shared memory of a kernel, for all its sections: an array of one word a thread for each number asked for."""

    def __init__(self, module: Module):
        self._module = module
        self._arrays: list[Shared] = []

    def __getitem__(self, number: int) -> Shared:
        while len(self._arrays) <= number:
            self._arrays.append(self._module.shared(THREADS))
        return self._arrays[number]


class Lanes:
    """A thread's place in its workgroup's tile of a geometry: across the kept elements and along a reduction."""

    def __init__(self, m: Module, geometry: Geometry, tile: Id):
        self._m = m
        across, along = geometry.lanes
        if geometry.by_rows:
            self.across = m.op(Op.U_DIV, m.thread, m.constant(along))
            self.along = m.op(Op.U_MOD, m.thread, m.constant(along))
            self.first = m.op(Op.I_MUL, self.across, m.constant(along))  # the thread that leads this one's reduction
            self.stride = 1
        else:
            self.along = m.op(Op.U_DIV, m.thread, m.constant(across))
            self.across = m.op(Op.U_MOD, m.thread, m.constant(across))
            self.first, self.stride = self.across, across
        self.count = along
        k = m.op(Op.I_ADD, m.op(Op.I_MUL, tile, m.constant(across)), self.across)
        last = m.constant(math.prod(geometry.kept) - 1)
        self.inside = m.op(Op.U_LESS_EQUAL, k, last)
        self.k = m.ext(Ext.U_MIN, k, last)  # threads past the end do the last one's work again, and store nothing

    def leads(self) -> Id:
        """Whether the thread is the one of its reduction that stores the result."""
        m = self._m
        return m.op(Op.LOGICAL_AND, self.inside, m.op(Op.I_EQUAL, self.along, m.constant(0)))


@dataclass(frozen=True)
class Stretch:
    """The elements of a reduction that a thread takes: from `start` on, those of its neighbours in between, to `stop`.

    at_once: elements that are on their way at a time; they are combined in the order of one by one all the same.
    visit: makes more of an element at its place, and gives the code that stores it.
    """

    start: Id
    stop: Id
    at_once: int = 1
    visit: Callable[[Sequence[Id]], Code] | None = None


def reduce_in_workgroup(
    e: Emitter, lanes: Lanes, nodes: Sequence[Node], kept: Sequence[Id], stretch: Stretch, workspace: Workspace
) -> Code:
    """Totals of reductions of one geometry, known to every thread; `kept`: the place along the kept axes."""
    reducers = [Reducer(e.scalars, node) for node in nodes]
    parts = yield from _reduce_in_threads(e, lanes, list(zip(nodes, reducers, strict=True)), kept, stretch)
    own = list(zip(reducers, by_reducer(reducers, parts), strict=True))
    totals: Totals = []
    for first in range(0, len(own), _TREES):
        totals += yield from _combine_threads(e, lanes, own[first : first + _TREES], workspace)
    return totals


def _reduce_in_threads(
    e: Emitter, lanes: Lanes, reductions: list[tuple[Node, Reducer]], kept: Sequence[Id], stretch: Stretch
) -> Code:
    """The accumulators of all reductions over this thread's elements, in one list."""
    m, geometry = e.m, Geometry.of(reductions[0][0])
    reducers = [reducer for _, reducer in reductions]
    last = m.op(Op.I_SUB, stretch.stop, m.constant(1))

    def combine(r: Id, carried: list[Id]) -> Code:
        results, place = [], geometry.place(kept, e.place(r, geometry.reduced))
        for (node, reducer), accumulators in zip(reductions, by_reducer(reducers, carried), strict=True):
            x = yield node.inputs[0], place
            results += reducer.combine(accumulators, reducer.element(x, r))
        return results

    def body(r: Id, carried: list[Id]) -> Code:
        stores = []
        for i in range(stretch.at_once):
            at, inside, before = r, lanes.inside, carried
            if i:
                further = m.op(Op.I_ADD, r, m.constant(i * lanes.count))
                # Past the end, the last element (or what another thread has put in its place): it is thrown away.
                at = m.ext(Ext.U_MIN, further, last)
                inside = m.op(Op.LOGICAL_AND, inside, m.op(Op.U_LESS_EQUAL, further, last))
            carried = yield from combine(at, before)
            if i:
                carried = [m.select(inside, *both) for both in zip(carried, before, strict=True)]
            if stretch.visit:
                place = geometry.place(kept, e.place(at, geometry.reduced))
                stores.append((inside, (yield from stretch.visit(place))))
        for inside, store in stores:
            yield from m.branch(inside, store)
        return carried

    initial = [x for reducer in reducers for x in reducer.initial()]
    step = m.constant(stretch.at_once * lanes.count)
    return (yield from m.loop(stretch.start, stretch.stop, step, initial, body))


class _SharedAccumulators:
    """The accumulators of one reduction in shared memory: arrays of a word a thread, from number `first` on."""

    def __init__(self, e: Emitter, reducer: Reducer, workspace: Workspace, first: int):
        self._e, self._workspace = e, workspace
        self._numbers = dict(enumerate(reducer.dtypes, first))

    def load(self, thread: Id) -> list[Id]:
        from_word = self._e.scalars.from_word
        return [from_word(self._workspace[number].load(thread), dtype) for number, dtype in self._numbers.items()]

    def store(self, values: Sequence[Id]) -> None:
        """Stores those of this thread."""
        for x, (number, dtype) in zip(values, self._numbers.items(), strict=True):
            self._workspace[number].store(self._e.m.thread, self._e.scalars.to_word(x, dtype))


def _combine_threads(e: Emitter, lanes: Lanes, own: Totals, workspace: Workspace) -> Code:
    """Totals from the accumulators of each thread, `own`: half of the threads take over the other half's, and so on."""
    m = e.m
    first = itertools.accumulate((len(reducer.dtypes) for reducer, _ in own), initial=0)
    shared = [_SharedAccumulators(e, reducer, workspace, n) for (reducer, _), n in zip(own, first, strict=False)]
    for memory, (_, accumulators) in zip(shared, own, strict=True):
        memory.store(accumulators)
    m.barrier()

    def step(i: Id, carried: list[Id]) -> Code:
        half = m.op(Op.SHIFT_RIGHT_LOGICAL, m.constant(lanes.count // 2), i)

        @no_questions
        def join() -> None:
            other = m.op(Op.I_ADD, m.thread, m.op(Op.I_MUL, half, m.constant(lanes.stride)))
            for memory, (reducer, _) in zip(shared, own, strict=True):
                memory.store(reducer.combine(memory.load(m.thread), memory.load(other)))

        yield from m.branch(m.op(Op.U_LESS, lanes.along, half), join)
        m.barrier()
        return []

    # A loop, and one for all: some drivers take very long over code with many barriers.
    steps = m.constant(lanes.count.bit_length() - 1)
    yield from m.loop(m.constant(0), steps, m.constant(1), [], step)
    totals = [(reducer, memory.load(lanes.first)) for memory, (reducer, _) in zip(shared, own, strict=True)]
    m.barrier()  # before the next tree writes
    return totals
