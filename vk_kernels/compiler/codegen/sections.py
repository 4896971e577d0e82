"""How the threads of a kernel share the work: sections, each of which fills some outputs with its own workgroups.

A kernel is a row of sections, so that outputs of different shapes need one dispatch (horizontal fusion). The order in
which elements are combined is fixed by the shapes, so that every run gives the same bits.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vk_kernels.compiler.codegen.emitter import Emitter, dtype_of, shape_of, size_of
from vk_kernels.compiler.codegen.reductions import Reducer, reduced_axes, whole_place
from vk_kernels.compiler.codegen.scalars import Scalars, kind
from vk_kernels.compiler.ir import Literal, Node, Value
from vk_kernels.spirv.builder import Buffer, Code, Id, Module, Shared
from vk_kernels.spirv.spec import Ext, Op

THREADS = 256  # of a workgroup
_COLUMNS = 32  # neighbouring outputs that a workgroup reduces together, where the last axis is kept
_SPLIT_GROUPS = 1024  # workgroups that a long reduction is cut into: what fills a large GPU
_SPLIT_LENGTH = 4096  # elements of a piece at least: 16 a thread take less time than another kernel
AT_ONCE = 4  # elements that a thread of such a piece has on their way: one by one, most of the time goes by waiting
_TREES = 8  # reductions that are brought to their ends together; each takes 1 or 2 KiB of shared memory
_LONG = 33  # a reduction of fewer elements is one thread's loop


class Output(NamedTuple):
    value: Value | Literal
    buffer: Buffer


def _words(e: Emitter, outputs: Sequence[Output], place: Sequence[Id]) -> Code:
    """The words of outputs of one shape at a place: all are made before any is stored, as an output may be an input's
    memory."""
    words = []
    for value, _ in outputs:
        x = yield value, place
        words.append(e.scalars.to_word(x, dtype_of(value)))
    return words


def _store(outputs: Sequence[Output], index: Id, words: Sequence[Id]) -> Code:
    for (_, buffer), word in zip(outputs, words, strict=True):
        buffer.store(index, word)
    return []
    yield


class Geometry(NamedTuple):
    """The axes that a reduction goes over."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def of(cls, node: Node) -> "Geometry":
        return cls(shape_of(node.inputs[0]), tuple(sorted(reduced_axes(node))))

    @property
    def reduced(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(n for axis, n in enumerate(self.shape) if axis not in self.axes)

    @property
    def is_long(self) -> bool:
        return math.prod(self.reduced) >= _LONG and math.prod(self.kept) > 0

    @property
    def by_rows(self) -> bool:
        """Whether neighbours in memory are reduced together."""
        last = max((axis for axis, n in enumerate(self.shape) if n > 1), default=0)
        return last in self.axes

    @property
    def lanes(self) -> tuple[int, int]:
        """Threads across the kept elements, and along each reduction: THREADS in all."""
        if self.by_rows:
            along = min(THREADS, max(32, _power_of_two(math.prod(self.reduced)) // 4))
            return THREADS // along, along
        across = min(_COLUMNS, _power_of_two(math.prod(self.kept)))
        return across, THREADS // across

    @property
    def tiles(self) -> int:
        return -(-math.prod(self.kept) // self.lanes[0])

    @property
    def splits(self) -> int:
        """Workgroups that share each reduction."""
        pieces = math.prod(self.reduced) // _SPLIT_LENGTH
        return max(1, min(_SPLIT_GROUPS // self.tiles, pieces)) if self.tiles else 1


def _power_of_two(n: int) -> int:
    """The least one from `n` on."""
    return 1 << max(n - 1, 0).bit_length()


class Workspace:
    """Shared memory of a kernel, for all its sections: an array of one word a thread for each number asked for."""

    def __init__(self, module: Module):
        self._module = module
        self._arrays: list[Shared] = []

    def __getitem__(self, number: int) -> Shared:
        while len(self._arrays) <= number:
            self._arrays.append(self._module.shared(THREADS))
        return self._arrays[number]


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
        lanes = _Lanes(m, geometry, group)
        kept = e.place(lanes.k, geometry.kept)
        count = m.constant(math.prod(geometry.reduced))
        for nodes in self.levels:
            totals = yield from _totals(e, lanes, nodes, kept, lanes.along, count, self.workspace)
            for node, (reducer, total) in zip(nodes, totals, strict=True):
                e.remember(node.outputs[0], kept, reducer.result(total))

        words = []
        for value, _ in self.kept:
            x = yield value, e.reshaped(kept, geometry.kept, shape_of(value))
            words.append(e.scalars.to_word(x, dtype_of(value)))

        def store_whole() -> Code:
            yield from m.loop(lanes.along, count, m.constant(geometry.lanes[1]), [], element)

        def element(r: Id, carried: list[Id]) -> Code:
            place = _whole(geometry, kept, e.place(r, geometry.reduced))
            made = yield from _words(e, self.whole, place)
            return (yield from _store(self.whole, e.linear(place, geometry.shape), made))

        if self.kept:
            yield from m.branch(lanes.leads(), lambda: _store(self.kept, lanes.k, words))
        if self.whole:
            yield from m.branch(lanes.inside, store_whole)


@dataclass
class PartialSection:
    """The first half of long reductions: `splits` of the geometry, each by a workgroup of its own.

    What goes into `buffers` is of the kept shape and one axis more, over the pieces. Outputs of the whole shape, which
    need no reduction, are stored on the way: an optimizer's update and its norm read the same arrays once.
    """

    geometry: Geometry
    nodes: list[Node]
    buffers: list[Buffer]
    outputs: list[Output]
    workspace: Workspace
    indices: set[Id] = field(default_factory=set)  # of the elements that a thread goes over, once emitted

    @property
    def groups(self) -> int:
        return self.geometry.tiles * self.geometry.splits

    def emit(self, e: Emitter, group: Id) -> Code:
        m, geometry = e.m, self.geometry
        count, along = math.prod(geometry.reduced), geometry.lanes[1]
        splits = m.constant(geometry.splits)
        piece_length = -(-count // geometry.splits // along) * along
        while piece_length * geometry.splits < count:
            piece_length += along
        piece = m.op(Op.U_MOD, group, splits)
        lanes = _Lanes(m, geometry, m.op(Op.U_DIV, group, splits))
        kept = e.place(lanes.k, geometry.kept)
        begin = m.op(Op.I_MUL, piece, m.constant(piece_length))
        start = m.op(Op.I_ADD, begin, lanes.along)
        stop = m.ext(Ext.U_MIN, m.op(Op.I_ADD, begin, m.constant(piece_length)), m.constant(count))

        def visit(place: Sequence[Id]) -> Code:
            index = e.linear(place, geometry.shape)
            self.indices.add(index)
            words = yield from _words(e, self.outputs, place)
            return lambda: _store(self.outputs, index, words)

        visits = visit if self.outputs else None
        totals = yield from _totals(e, lanes, self.nodes, kept, start, stop, self.workspace, AT_ONCE, visits)

        def store() -> Code:
            index = m.op(Op.I_ADD, m.op(Op.I_MUL, lanes.k, splits), piece)
            for buffer, (reducer, total) in zip(self.buffers, totals, strict=True):
                buffer.store(index, e.scalars.to_word(total[0], reducer.dtypes[0]))
            return []
            yield

        yield from m.branch(lanes.leads(), store)


class _Lanes:
    """A thread's place in its workgroup's part of a geometry."""

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
        m = self._m
        return m.op(Op.LOGICAL_AND, self.inside, m.op(Op.I_EQUAL, self.along, m.constant(0)))


def _whole(geometry: Geometry, kept: Sequence[Id], reduced: Sequence[Id]) -> list[Id]:
    kept_iter, reduced_iter = iter(kept), iter(reduced)
    return [next(reduced_iter if axis in geometry.axes else kept_iter) for axis in range(len(geometry.shape))]


def _totals(
    e: Emitter,
    lanes: _Lanes,
    nodes: list[Node],
    kept: Sequence[Id],
    start: Id,
    stop: Id,
    workspace: Workspace,
    at_once: int = 1,
    visit: Callable[[Sequence[Id]], Code] | None = None,
) -> Code:
    """[(reducer, totals)] of reductions of one geometry, known to every thread: each thread's part, then a tree.

    at_once: elements of a thread's part that are on their way at a time; the order in which they are combined is that
    of one by one. visit: makes more of an element at its place, and gives what stores it.
    """
    m = e.m
    reducers = [Reducer(e.scalars, node) for node in nodes]
    geometry = Geometry.of(nodes[0])

    def element(r: Id, carried: list[Id]) -> Code:
        left, results = iter(carried), []
        reduced = e.place(r, geometry.reduced)
        for node, reducer in zip(nodes, reducers, strict=True):
            x = yield node.inputs[0], whole_place(node, kept, reduced)
            results += reducer.combine([next(left) for _ in reducer.dtypes], reducer.element(x, r))
        return results

    last = m.op(Op.I_SUB, stop, m.constant(1))

    def body(r: Id, carried: list[Id]) -> Code:
        stores = []
        for i in range(at_once):
            at, inside, old = r, lanes.inside, carried
            if i:
                further = m.op(Op.I_ADD, r, m.constant(i * lanes.count))
                # Past the end, the last element (or what another thread has put in its place): it is thrown away.
                at = m.ext(Ext.U_MIN, further, last)
                inside = m.op(Op.LOGICAL_AND, inside, m.op(Op.U_LESS_EQUAL, further, last))
            carried = yield from element(at, old)
            if i:
                carried = [m.select(inside, *both) for both in zip(carried, old, strict=True)]
            if visit:
                stores.append((inside, (yield from visit(_whole(geometry, kept, e.place(at, geometry.reduced))))))
        for inside, store in stores:
            yield from m.branch(inside, store)
        return carried

    initial = [x for reducer in reducers for x in reducer.initial()]
    parts = iter((yield from m.loop(start, stop, m.constant(at_once * lanes.count), initial, body)))
    own = [(reducer, [next(parts) for _ in reducer.dtypes]) for reducer in reducers]
    totals = []
    while own:
        totals += yield from _tree(e, lanes, own[:_TREES], workspace)
        own = own[_TREES:]
    return totals


def _tree(e: Emitter, lanes: _Lanes, own: list[tuple[Reducer, list[Id]]], workspace: Workspace) -> Code:
    """[(reducer, totals)] from the parts of each thread, `own`."""
    m, s = e.m, e.scalars
    first = [0, *itertools.accumulate(len(reducer.dtypes) for reducer, _ in own)]  # each reducer's first array

    def load(k: int, index: Id) -> list[Id]:
        dtypes = own[k][0].dtypes
        return [s.from_word(workspace[first[k] + i].load(index), dtype) for i, dtype in enumerate(dtypes)]

    def store(k: int, values: Sequence[Id]) -> None:
        for i, (x, dtype) in enumerate(zip(values, own[k][0].dtypes, strict=True)):
            workspace[first[k] + i].store(m.thread, s.to_word(x, dtype))

    for k, (_, values) in enumerate(own):
        store(k, values)
    m.barrier()

    def step(i: Id, carried: list[Id]) -> Code:
        half = m.op(Op.SHIFT_RIGHT_LOGICAL, m.constant(lanes.count // 2), i)

        def join() -> Code:
            other = m.op(Op.I_ADD, m.thread, m.op(Op.I_MUL, half, m.constant(lanes.stride)))
            for k, (reducer, _) in enumerate(own):
                store(k, reducer.combine(load(k, m.thread), load(k, other)))
            return []
            yield

        yield from m.branch(m.op(Op.U_LESS, lanes.along, half), join)
        m.barrier()
        return []

    # A loop, and one for all: some drivers take very long over code with many barriers.
    steps = m.constant(lanes.count.bit_length() - 1)
    yield from m.loop(m.constant(0), steps, m.constant(1), [], step)
    totals = [(reducer, load(k, lanes.first)) for k, (reducer, _) in enumerate(own)]
    m.barrier()  # before the next tree writes
    return totals


@dataclass
class RankSection:
    """A sort or a top_k: a thread an element, which counts those that come before its own, and stores it there.

    Stable, and n reads for each of n elements.
    """

    node: Node
    outputs: dict[int, Buffer]  # by the number of the node's output

    @property
    def groups(self) -> int:
        return -(-size_of(self.node.inputs[0]) // THREADS)

    def emit(self, e: Emitter, group: Id) -> Code:
        m, node = e.m, self.node
        shape = shape_of(node.inputs[0])
        top = node.op == "top_k"
        axis = (node.params.get("axis", -1) if top else node.params["dimension"]) % len(shape)
        keys = node.inputs[: 1 if top else node.params["num_keys"]]
        index = m.op(Op.I_ADD, m.op(Op.I_MUL, group, m.constant(THREADS)), m.thread)

        def element() -> Code:
            place = e.place(index, shape)
            own = []
            for x in keys:
                own.append(sortable(e.scalars, (yield x, place), dtype_of(x), top))

            def count(i: Id, carried: list[Id]) -> Code:
                there = [i if at == axis else c for at, c in enumerate(place)]
                before, equal = m.boolean(False), m.boolean(True)
                for x, mine in zip(keys, own, strict=True):
                    other = sortable(e.scalars, (yield x, there), dtype_of(x), top)
                    less = m.op(Op.LOGICAL_AND, equal, m.op(Op.U_LESS, other, mine))
                    before = m.op(Op.LOGICAL_OR, before, less)
                    equal = m.op(Op.LOGICAL_AND, equal, m.op(Op.I_EQUAL, other, mine))
                earlier = m.op(Op.LOGICAL_AND, equal, m.op(Op.U_LESS, i, place[axis]))
                counted = m.op(Op.LOGICAL_OR, before, earlier)
                return [m.op(Op.I_ADD, carried[0], m.select(counted, m.constant(1), m.constant(0)))]

            zero, length = m.constant(0), m.constant(shape[axis])
            (rank,) = yield from m.loop(zero, length, m.constant(1), [zero], count)

            def store() -> Code:
                for k, buffer in self.outputs.items():
                    if top and k == 1:
                        word = place[axis]
                    else:
                        source = node.inputs[k]
                        word = e.scalars.to_word((yield source, place), dtype_of(source))
                    target = [rank if at == axis else c for at, c in enumerate(place)]
                    buffer.store(e.linear(target, node.outputs[k].shape), word)

            wanted = m.constant(node.outputs[0].shape[axis])
            yield from m.branch(m.op(Op.U_LESS, rank, wanted), store)

        yield from m.branch(m.op(Op.U_LESS, index, m.constant(math.prod(shape))), element)


def sortable(s: Scalars, x: Id, dtype: np.dtype, top: bool = False) -> Id:
    """An unsigned number that orders as `x` does in JAX's sort: NaN is the greatest, and the zeros are equal.

    top: as in its top_k, the other way round; and floats are in the order of their bits: -NaN, -inf, ..., -0, 0, ...
    """
    m = s.m
    match kind(dtype):
        case "float":
            bits = m.bits(x)
            if not top:
                bits = m.select(m.op(Op.F_EQUAL, x, m.real(0)), m.constant(0), bits)
                bits = m.select(s.math.is_nan(x), m.constant(0x7FC00000), bits)
            negative = m.op(Op.S_LESS, bits, m.constant(0))
            word = m.op(Op.XOR, bits, m.select(negative, m.constant(-1), m.constant(0x80000000)))
        case "signed":
            word = m.op(Op.XOR, x, m.constant(0x80000000))
        case _:
            word = s.to_word(x, dtype)
    return m.op(Op.NOT, word) if top else word


Section = MapSection | ReduceSection | PartialSection | RankSection


def levels(nodes: Sequence[Node], inner: dict[Node, set[Node]]) -> list[list[Node]]:
    """Reductions of one geometry, by how many others' results each one needs in turn. `inner`: those it needs."""
    depth: dict[Node, int] = {}
    chosen = set(nodes)
    for node in sorted(nodes, key=lambda node: len(inner[node] & chosen)):
        depth[node] = 1 + max((depth[other] for other in inner[node] & chosen), default=-1)
    return [[node for node in nodes if depth[node] == level] for level in range(max(depth.values()) + 1)]
