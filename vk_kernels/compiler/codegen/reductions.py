"""Primitives that combine many elements: reductions, running reductions and products, in one thread's loop.

A `Reducer` says how elements are combined; `sections` uses it too, for reductions by many threads.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from vk_kernels.compiler.codegen.emitter import Coords, Emitter, dtype_of, handles, shape_of
from vk_kernels.compiler.codegen.scalars import Scalars, kind
from vk_kernels.compiler.ir import Node
from vk_kernels.spirv.builder import Code, Id
from vk_kernels.spirv.spec import Ext, Op

T = TypeVar("T")

F32 = np.dtype(np.float32)

_COMBINED = {
    "reduce_sum": "add",
    "reduce_prod": "mul",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
    "reduce_xor": "xor",
}
REDUCTIONS = frozenset({*_COMBINED, "argmax", "argmin"})


def neutral(op: str, dtype: np.dtype) -> object:
    """The neutral element of add, mul, max, min, and, or or xor."""
    if op in ("add", "or", "xor"):
        return 0
    if op == "mul":
        return 1
    if kind(dtype) == "bool":
        return op in ("and", "min")
    if op == "and":
        return -1 if kind(dtype) == "signed" else np.iinfo(dtype).max
    if kind(dtype) == "float":
        return -math.inf if op == "max" else math.inf
    return np.iinfo(dtype).min if op == "max" else np.iinfo(dtype).max


def accumulator_dtype(node: Node) -> np.dtype:
    """The dtype of the values that a reduction combines: f32 for every float."""
    source = dtype_of(node.inputs[0])
    return F32 if kind(source) == "float" else source


class Reducer:
    """Combines what a reduction reduces: accumulators of one or two ids."""

    def __init__(self, scalars: Scalars, node: Node):
        self._s, self._m, self._node = scalars, scalars.m, node
        self._arg = node.op in ("argmax", "argmin")
        self._op = node.op[3:] if self._arg else _COMBINED[node.op]
        self._dtype = accumulator_dtype(node)
        # Of the accumulators, as words of shared memory or of a buffer.
        self.dtypes = (self._dtype, np.dtype(np.uint32)) if self._arg else (self._dtype,)

    def initial(self) -> list[Id]:
        first = self._s.constant(neutral(self._op, self._dtype), self._dtype)
        return [first, self._m.constant(-1)] if self._arg else [first]

    def element(self, x: Id, index: Id) -> list[Id]:
        """`x`, at `index` along the reduced axes."""
        return [x, index] if self._arg else [x]

    def combine(self, a: Sequence[Id], b: Sequence[Id]) -> list[Id]:
        if not self._arg:
            return [self._s.binary(self._op, a[0], b[0], self._dtype)]
        # The better value, or the first of equal ones; NaN is better than all.
        m, s = self._m, self._s
        (x, i), (y, j) = a, b
        better = s.binary("gt" if self._op == "max" else "lt", y, x, self._dtype)
        equal = s.binary("eq", x, y, self._dtype)
        if kind(self._dtype) == "float":
            nan_x, nan_y = s.math.is_nan(x), s.math.is_nan(y)
            better = m.op(Op.LOGICAL_OR, better, m.op(Op.LOGICAL_AND, nan_y, m.op(Op.LOGICAL_NOT, nan_x)))
            equal = m.op(Op.LOGICAL_OR, equal, m.op(Op.LOGICAL_AND, nan_x, nan_y))
        first = m.op(Op.LOGICAL_AND, equal, m.op(Op.U_LESS, j, i))
        take = m.op(Op.LOGICAL_OR, better, first)
        return [m.select(take, y, x), m.select(take, j, i)]

    def result(self, accumulators: Sequence[Id]) -> Id:
        out = self._node.outputs[0].dtype
        if self._arg:
            return self._s.convert(accumulators[1], np.dtype(np.uint32), out)
        return self._s.rounded(accumulators[0], out)


def by_reducer(reducers: Sequence[Reducer], accumulators: Sequence[Id]) -> list[list[Id]]:
    """Cuts accumulators in one list, as a loop carries them, into those of each reduction."""
    ends = itertools.accumulate(len(reducer.dtypes) for reducer in reducers)
    return [list(accumulators[end - len(reducer.dtypes) : end]) for end, reducer in zip(ends, reducers, strict=True)]


def reduced_axes(node: Node) -> tuple[int, ...]:
    return tuple(axis % len(shape_of(node.inputs[0])) for axis in node.params["axes"])


def merged_place(axes: Sequence[int], kept: Sequence[T], reduced: Sequence[T]) -> list[T]:
    """The place in the operand of a reduction over `axes`, from those along the axes that it keeps and reduces."""
    kept_iter, reduced_iter = iter(kept), iter(reduced)
    return [next(reduced_iter if axis in axes else kept_iter) for axis in range(len(kept) + len(reduced))]


@handles(*REDUCTIONS)
def _reduce(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    m, operand = e.m, node.inputs[0]
    reducer = Reducer(e.scalars, node)
    axes = reduced_axes(node)
    lengths = [shape_of(operand)[axis] for axis in sorted(axes)]
    count = math.prod(lengths)
    if count == 0:
        return reducer.result(reducer.initial())

    def body(r: Id, carried: list[Id]) -> Code:
        x = yield operand, merged_place(axes, coords, e.place(r, lengths))
        return reducer.combine(carried, reducer.element(x, r))

    found = yield from m.loop(m.constant(0), m.constant(count), m.constant(1), reducer.initial(), body)
    return reducer.result(found)


_CUMULATIVE = {"cumsum": "add", "cumprod": "mul", "cummax": "max", "cummin": "min"}


@handles(*_CUMULATIVE, "cumlogsumexp")
def _cumulative(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    m, s, operand = e.m, e.scalars, node.inputs[0]
    axis, out = node.params["axis"], node.outputs[0].dtype
    length = shape_of(operand)[axis]
    dtype = F32 if kind(out) == "float" else out
    op = _CUMULATIVE.get(node.op)
    start, stop = m.constant(0), m.op(Op.I_ADD, coords[axis], m.constant(1))
    if node.params["reverse"]:
        start, stop = coords[axis], m.constant(length)
    initial = s.constant(neutral(op or "max", dtype), dtype)

    def body(i: Id, carried: list[Id]) -> Code:
        x = yield operand, [i if at == axis else c for at, c in enumerate(coords)]
        if op:
            return [s.binary(op, carried[0], x, dtype)]
        # log(e^a + e^b) = max + log1p(e^-|a - b|); equal infinities have no difference
        high, low = s.math.max(carried[0], x), s.math.min(carried[0], x)
        more = s.math.log1p(s.math.exp(m.op(Op.F_SUB, low, high)))
        same = m.op(Op.LOGICAL_AND, m.op(Op.F_EQUAL, low, high), m.op(Op.LOGICAL_NOT, s.math.is_finite(high)))
        return [m.select(same, high, m.op(Op.F_ADD, high, more))]

    found = yield from m.loop(start, stop, m.constant(1), [initial], body)
    return s.rounded(found[0], out)


@handles("dot_general")
def _dot_general(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    """Output axes: the batch, then the free ones of the left operand, then those of the right one."""
    m, s = e.m, e.scalars
    operands, out = node.inputs, node.outputs[0].dtype
    contracted, batch = node.params["dimension_numbers"]
    lengths = [shape_of(operands[0])[axis] for axis in contracted[0]]
    count, floats = math.prod(lengths), kind(out) == "float"
    dtype = F32 if floats else out
    zero = s.constant(0, dtype)
    if count == 0:
        return zero
    free = iter(coords[len(batch[0]) :])
    fixed = []
    for side in range(2):
        place: list[Id | None] = [None] * len(shape_of(operands[side]))
        for at, axis in enumerate(batch[side]):
            place[axis] = coords[at]
        for axis in range(len(place)):
            if place[axis] is None and axis not in contracted[side]:
                place[axis] = next(free)
        fixed.append(place)

    def body(r: Id, carried: list[Id]) -> Code:
        along = e.place(r, lengths)
        factors = []
        for side in range(2):
            place = list(fixed[side])
            for axis, c in zip(contracted[side], along, strict=True):
                place[axis] = c
            x = yield operands[side], place
            factors.append(s.convert(x, dtype_of(operands[side]), dtype))
        if floats:
            return [m.ext(Ext.FMA, *factors, carried[0])]
        return [s.binary("add", carried[0], s.binary("mul", *factors, dtype), dtype)]

    found = yield from m.loop(m.constant(0), m.constant(count), m.constant(1), [zero], body)
    return s.rounded(found[0], out)
