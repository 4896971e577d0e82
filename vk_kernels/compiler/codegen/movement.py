"""Primitives that move elements: each maps a place of its output to a place of an input.

The names and parameters are those of JAX's primitives, whose reference (jax.lax) says what each computes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vk_kernels.compiler.codegen.emitter import Coords, Emitter, dtype_of, handles, shape_of, size_of
from vk_kernels.compiler.codegen.scalars import kind
from vk_kernels.compiler.ir import Literal, Node, Value
from vk_kernels.spirv.builder import Code, Id
from vk_kernels.spirv.spec import Ext, Op


def _offset(e: Emitter, c: Id, by: int) -> Id:
    return e.m.op(Op.I_ADD, c, e.m.constant(by))


def _all(e: Emitter, conditions: Sequence[Id]) -> Id:
    """Whether all hold."""
    found = e.m.boolean(True)
    for i, condition in enumerate(conditions):
        found = condition if i == 0 else e.m.op(Op.LOGICAL_AND, found, condition)
    return found


@handles("broadcast_in_dim")
def _broadcast_in_dim(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    return (yield node.inputs[0], [coords[axis] for axis in node.params["broadcast_dimensions"]])


@handles("reshape", "squeeze", "expand_dims")
def _reshape(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    source = node.inputs[0]
    return (yield source, e.reshaped(coords, node.outputs[0].shape, shape_of(source)))


@handles("transpose")
def _transpose(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    permutation = node.params["permutation"]
    return (yield node.inputs[0], [coords[permutation.index(axis)] for axis in range(len(permutation))])


@handles("rev")
def _rev(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    m, shape = e.m, node.outputs[0].shape
    turned = [
        m.op(Op.I_SUB, m.constant(n - 1), c) if axis in node.params["dimensions"] else c
        for axis, (c, n) in enumerate(zip(coords, shape, strict=True))
    ]
    return (yield node.inputs[0], turned)


@handles("slice")
def _slice(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    strides = node.params["strides"] or (1,) * len(coords)
    moved = [
        _offset(e, e.m.op(Op.I_MUL, c, e.m.constant(stride)), start)
        for c, start, stride in zip(coords, node.params["start_indices"], strides, strict=True)
    ]
    return (yield node.inputs[0], moved)


@handles("split")
def _split(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    axis, before = node.params["axis"], sum(node.params["sizes"][:k])
    return (yield node.inputs[0], [_offset(e, c, before) if i == axis else c for i, c in enumerate(coords)])


@handles("tile")
def _tile(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    shape = shape_of(node.inputs[0])
    return (
        yield (
            node.inputs[0],
            [e.m.op(Op.U_MOD, c, e.m.constant(n)) for c, n in zip(coords, shape, strict=True)],
        )
    )


@handles("iota")
def _iota(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    return e.scalars.convert(coords[node.params["dimension"]], np.dtype(np.uint32), node.outputs[0].dtype)
    yield


@handles("concatenate")
def _concatenate(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    """A search by halves for the operand, so that a place costs one read however many operands there are."""
    axis = node.params["dimension"]
    operands = [x for x in node.inputs if shape_of(x)[axis]]
    ends = np.cumsum([shape_of(x)[axis] for x in operands]).tolist()

    def among(first: int, last: int) -> Code:
        if first == last:
            start = ends[first - 1] if first else 0
            place = [_offset(e, c, -start) if i == axis else c for i, c in enumerate(coords)]
            return [(yield operands[first], place)]
        middle = (first + last) // 2
        condition = e.m.op(Op.U_LESS, coords[axis], e.m.constant(ends[middle]))
        return (yield from e.m.branch(condition, lambda: among(first, middle), lambda: among(middle + 1, last)))

    return (yield from among(0, len(operands) - 1))[0]


@handles("unstack")
def _unstack(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    axis = node.params["axis"]
    return (yield node.inputs[0], [*coords[:axis], e.m.constant(k), *coords[axis:]])


@handles("pad")
def _pad(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    m = e.m
    operand, value = node.inputs
    fill = yield value, ()
    if size_of(operand) == 0:
        return fill
    inside, place = [], []
    config = node.params["padding_config"]
    for c, n, (low, high, interior) in zip(coords, shape_of(operand), config, strict=True):
        moved = _offset(e, c, -low)  # a place before the first wraps around, and is past the last
        if interior:
            step = m.constant(interior + 1)
            inside.append(m.op(Op.I_EQUAL, m.op(Op.U_MOD, moved, step), m.constant(0)))
            inside.append(m.op(Op.U_LESS, moved, m.constant((n - 1) * (interior + 1) + 1)))
            moved = m.op(Op.U_DIV, moved, step)
        elif low or high:
            inside.append(m.op(Op.U_LESS, moved, m.constant(n)))
        place.append(moved)
    if not inside:
        return (yield operand, place)

    def within() -> Code:
        return [(yield operand, place)]

    return (yield from m.branch(_all(e, inside), within, lambda: _given(fill)))[0]


def _given(x: Id) -> Code:
    return [x]
    yield


def _starts(e: Emitter, starts: Sequence[Any], shape: Sequence[int], window: Sequence[int]) -> Code:
    """The start of a window, moved into bounds."""
    m, found = e.m, []
    for start, n, size in zip(starts, shape, window, strict=True):
        x = yield from e.index(start)
        x = m.ext(Ext.S_MIN, m.ext(Ext.S_MAX, x, m.constant(0)), m.constant(n - size))
        found.append(x)
    return found


@handles("dynamic_slice")
def _dynamic_slice(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    operand, *starts = node.inputs
    begin = yield from _starts(e, starts, shape_of(operand), node.params["slice_sizes"])
    return (yield operand, [e.m.op(Op.I_ADD, c, b) for c, b in zip(coords, begin, strict=True)])


@handles("dynamic_update_slice")
def _dynamic_update_slice(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    m = e.m
    operand, update, *starts = node.inputs
    if size_of(update) == 0:
        return (yield operand, coords)
    begin = yield from _starts(e, starts, shape_of(operand), shape_of(update))
    place = [m.op(Op.I_SUB, c, b) for c, b in zip(coords, begin, strict=True)]
    inside = [m.op(Op.U_LESS, c, m.constant(n)) for c, n in zip(place, shape_of(update), strict=True)]

    def new() -> Code:
        return [(yield update, place)]

    def old() -> Code:
        return [(yield operand, coords)]

    return (yield from m.branch(_all(e, inside), new, old))[0]


# Gather and scatter. The axes of the operand are those of the window, those that the window has with length 1 and drops
# ("collapsed", "inserted"), and those of the batch.


def _moves_into_bounds(node: Node) -> bool:
    """Whether a window out of bounds is moved into them; else it is filled, or dropped.

    What is promised to be in bounds and is not, XLA does as it is quickest: it moves what it reads, and drops what it
    writes. JAX's derivatives count on that.
    """
    mode = node.params["mode"].name  # of lax.GatherScatterMode
    return mode == "CLIP" or (mode == "PROMISE_IN_BOUNDS" and node.op == "gather")


def _fill_value(dtype: np.dtype, given: Any) -> Any:
    if given is not None:
        return given
    match kind(dtype):
        case "float":
            return float("nan")
        case "bool":
            return True
        case "signed":
            return np.iinfo(dtype).min
    return np.iinfo(dtype).max


def _window_starts(
    e: Emitter,
    indices: Value | Literal,
    place: Sequence[Id],
    axes: Sequence[int],
    room: dict[int, int],
    moved: bool,
) -> Code:
    """({axis: where the window begins there}, the conditions for it to be in bounds).

    `place`: of a row of `indices`, whose last axis is over `axes`. `room`: the greatest start in bounds, by axis.
    moved: whether it is moved there, so that there are no conditions.
    """
    m, starts, inside = e.m, {}, []
    for i, axis in enumerate(axes):
        start = yield from e.index(indices, (*place, m.constant(i)))
        clipped = m.ext(Ext.S_MIN, m.ext(Ext.S_MAX, start, m.constant(0)), m.constant(room[axis]))
        if not moved:
            inside.append(m.op(Op.I_EQUAL, start, clipped))
        starts[axis] = clipped
    return starts, inside


@handles("gather")
def _gather(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    m = e.m
    operand, indices = node.inputs
    numbers, sizes, moved = node.params["dimension_numbers"], node.params["slice_sizes"], _moves_into_bounds(node)
    shape, out = shape_of(operand), node.outputs[0]
    if size_of(operand) == 0:  # only with windows of no element, or all out of bounds
        return e.scalars.constant(_fill_value(out.dtype, node.params.get("fill_value")), out.dtype)
    batch = [c for axis, c in enumerate(coords) if axis not in numbers.offset_dims]
    window_axes = [
        axis
        for axis in range(len(shape))
        if axis not in numbers.collapsed_slice_dims and axis not in numbers.operand_batching_dims
    ]
    room = {axis: shape[axis] - sizes[axis] for axis in numbers.start_index_map}
    starts, inside = yield from _window_starts(e, indices, batch, numbers.start_index_map, room, moved)
    place = [starts.get(axis, m.constant(0)) for axis in range(len(shape))]
    for axis, offset in zip(window_axes, numbers.offset_dims, strict=True):
        place[axis] = m.op(Op.I_ADD, place[axis], coords[offset])
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for axis, of_indices in pairs:
        place[axis] = batch[of_indices]
    if not inside:
        return (yield operand, place)

    def within() -> Code:
        return [(yield operand, place)]

    fill = e.scalars.constant(_fill_value(out.dtype, node.params.get("fill_value")), out.dtype)
    return (yield from m.branch(_all(e, inside), within, lambda: _given(fill)))[0]


_COMBINERS = {
    "scatter": None,
    "scatter-add": "add",
    "scatter_add": "add",
    "scatter-sub": "sub",
    "scatter_sub": "sub",
    "scatter-mul": "mul",
    "scatter_mul": "mul",
    "scatter_min": "min",
    "scatter-min": "min",
    "scatter_max": "max",
    "scatter-max": "max",
}


@handles(*_COMBINERS)
def _scatter(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    """From the output's side: goes through all updates in order, and takes those that fall on this place.

    No atomics, and the same result every time; it costs a look at every row of the indices that is not fixed by a
    batch axis, for every element.
    """
    m, combine, function = e.m, _COMBINERS[node.op], node.params.get("update")
    operand, indices, updates = node.inputs
    numbers, moved, dtype = node.params["dimension_numbers"], _moves_into_bounds(node), dtype_of(operand)
    old = yield operand, coords
    if size_of(updates) == 0:
        return old
    shape, rows = shape_of(operand), shape_of(indices)[:-1]
    batch_of = dict(
        zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )  # axis of the rows -> axis of the operand
    free = [axis for axis in range(len(rows)) if axis not in batch_of]
    window_axes = [
        axis
        for axis in range(len(shape))
        if axis not in numbers.inserted_window_dims and axis not in numbers.operand_batching_dims
    ]
    window = dict.fromkeys(range(len(shape)), 1)
    for axis, of_updates in zip(window_axes, numbers.update_window_dims, strict=True):
        window[axis] = shape_of(updates)[of_updates]
    room = {axis: shape[axis] - window[axis] for axis in numbers.scatter_dims_to_operand_dims}

    def row(number: Id, carried: list[Id]) -> Code:
        freely = iter(e.place(number, [rows[axis] for axis in free]))
        place = [coords[batch_of[axis]] if axis in batch_of else next(freely) for axis in range(len(rows))]
        starts, inside = yield from _window_starts(e, indices, place, numbers.scatter_dims_to_operand_dims, room, moved)
        offsets = {
            axis: m.op(Op.I_SUB, coords[axis], starts[axis]) if axis in starts else coords[axis]
            for axis in range(len(shape))
            if axis not in numbers.operand_batching_dims
        }
        inside += [m.op(Op.U_LESS, offset, m.constant(window[axis])) for axis, offset in offsets.items()]

        def taken() -> Code:
            of_rows, of_window = iter(place), iter(offsets[axis] for axis in window_axes)
            at = [
                next(of_window if axis in numbers.update_window_dims else of_rows)
                for axis in range(len(shape_of(updates)))
            ]
            update = yield updates, at
            if function:
                return [(yield from e.applied(function, (carried[0], update)))]
            return [e.scalars.binary(combine, carried[0], update, dtype) if combine else update]

        return (yield from m.branch(_all(e, inside), taken, lambda: _given(carried[0])))

    count = math.prod(rows[axis] for axis in free)
    found = yield from m.loop(m.constant(0), m.constant(count), m.constant(1), [old], row)
    return found[0]
