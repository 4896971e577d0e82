"""Primitives that move elements: each maps a place of its output to a place of an input.

The names and parameters are those of JAX's primitives, whose reference (jax.lax) says what each computes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vk_kernels.compiler.codegen.emitter import Coords, Emitter, handles, no_questions, shape_of, size_of
from vk_kernels.compiler.ir import Node
from vk_kernels.spirv.builder import Code, Id
from vk_kernels.spirv.spec import Ext, Op


def _offset(e: Emitter, c: Id, by: int) -> Id:
    return e.m.op(Op.I_ADD, c, e.m.constant(by))


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
    operand = node.inputs[0]
    place = [e.m.op(Op.U_MOD, c, e.m.constant(n)) for c, n in zip(coords, shape_of(operand), strict=True)]
    return (yield operand, place)


@handles("iota")
@no_questions
def _iota(e: Emitter, node: Node, k: int, coords: Coords) -> Id:
    return e.scalars.convert(coords[node.params["dimension"]], np.dtype(np.uint32), node.outputs[0].dtype)


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

    return (yield from m.branch(e.all(inside), within, no_questions(lambda: [fill])))[0]


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

    return (yield from m.branch(e.all(inside), new, old))[0]
