"""Gather and scatter: windows of an operand that begin where rows of indices say.

A gather reads windows; a scatter writes them, and is computed from the side of its result. Which axis is which is the
hard part, and `GatherDims` says it for both.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vk_kernels.compiler.codegen.emitter import Coords, Emitter, dtype_of, handles, no_questions, shape_of, size_of
from vk_kernels.compiler.codegen.scalars import kind
from vk_kernels.compiler.ir import Node, Operand
from vk_kernels.spirv.builder import Code, Id
from vk_kernels.spirv.spec import Ext, Op


@dataclass(frozen=True)
class GatherDims:
    """The axes of a gather, named as in `jax.lax.GatherDimensionNumbers`; of a scatter, those of the gather that would
    read what it writes: its updates are the windows.

    shape: of the operand. slice_sizes: of a window along each axis of it. rows: the shape of the indices but for their
    last axis, along which a row has one start for each axis in start_index_map.

    Two windows of a column of `x` (3, 4), `x[:, indices]` with indices [[1], [3]]: windows of (3, 1) that begin at the
    columns 1 and 3, joined to (3, 2). The axes of x: 0 runs along the window, and is axis 0 of the windows joined
    (offset_dims (0,)); 1 is indexed (start_index_map (1,)), has length 1 in the window and is dropped
    (collapsed_slice_dims (1,)). The other axis of the windows joined, 1, runs over the rows, (2,).
    """

    shape: tuple[int, ...]
    slice_sizes: tuple[int, ...]
    rows: tuple[int, ...]
    offset_dims: tuple[int, ...]
    collapsed_slice_dims: tuple[int, ...]
    start_index_map: tuple[int, ...]
    operand_batching_dims: tuple[int, ...]
    start_indices_batching_dims: tuple[int, ...]

    @classmethod
    def of_gather(cls, node: Node) -> "GatherDims":
        operand, indices = node.inputs
        numbers = node.params["dimension_numbers"]
        return cls(
            shape_of(operand),
            tuple(node.params["slice_sizes"]),
            shape_of(indices)[:-1],
            numbers.offset_dims,
            numbers.collapsed_slice_dims,
            numbers.start_index_map,
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
        )

    @classmethod
    def of_scatter(cls, node: Node) -> "GatherDims":
        operand, indices, updates = node.inputs
        numbers = node.params["dimension_numbers"]
        dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        lengths = iter([shape_of(updates)[axis] for axis in numbers.update_window_dims])
        return cls(
            shape_of(operand),
            tuple(1 if axis in dropped else next(lengths) for axis in range(len(shape_of(operand)))),
            shape_of(indices)[:-1],
            numbers.update_window_dims,
            numbers.inserted_window_dims,
            numbers.scatter_dims_to_operand_dims,
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
        )

    @property
    def axes(self) -> range:
        """The axes of the operand."""
        return range(len(self.shape))

    @property
    def window_axes(self) -> list[int]:
        """The axes of the operand that the windows joined have too: there they are offset_dims, in this order."""
        dropped = (*self.collapsed_slice_dims, *self.operand_batching_dims)
        return [axis for axis in self.axes if axis not in dropped]

    @property
    def batch_axes(self) -> dict[int, int]:
        """The axis of the operand that goes with an axis of the rows: there a row has windows of its own."""
        return dict(zip(self.start_indices_batching_dims, self.operand_batching_dims, strict=True))

    @property
    def free_row_axes(self) -> list[int]:
        """The axes of the rows that no axis of the operand goes with."""
        return [axis for axis in range(len(self.rows)) if axis not in self.start_indices_batching_dims]

    @property
    def greatest_starts(self) -> dict[int, int]:
        """The last start along each indexed axis with which a window is in bounds."""
        return {axis: self.shape[axis] - self.slice_sizes[axis] for axis in self.start_index_map}

    def row(self, joined: Sequence[Id]) -> list[Id]:
        """The place in the rows of a place in the windows joined."""
        return [c for axis, c in enumerate(joined) if axis not in self.offset_dims]

    def joined(self, row: Sequence[Id], window: Sequence[Id]) -> list[Id]:
        """The place in the windows joined of one in a row's window: `window` along window_axes."""
        of_rows, of_window = iter(row), iter(window)
        rank = len(row) + len(window)
        return [next(of_window if axis in self.offset_dims else of_rows) for axis in range(rank)]


def _clips(node: Node) -> bool:
    """Whether a window that sticks out of the operand is moved into it; else it is filled, or dropped.

    What is promised to be in bounds and is not, XLA does as it is quickest: it moves what it reads, and drops what it
    writes. JAX's derivatives count on that.
    """
    mode = node.params["mode"].name  # of lax.GatherScatterMode
    return mode == "CLIP" or (mode == "PROMISE_IN_BOUNDS" and node.op == "gather")


def fill_value(dtype: np.dtype, given: Any = None) -> Any:
    """Stands for a window out of bounds: NaN, the smallest signed or the greatest unsigned integer, or True, as in JAX;
    or `given`, if it is."""
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


def _window_starts(e: Emitter, indices: Operand, row: Sequence[Id], dims: GatherDims, clips: bool) -> Code:
    """({indexed axis: where a row's window begins there}, the conditions for that to be in bounds).

    A start out of bounds becomes the nearest in bounds. clips: whether that is wanted, so that there are no conditions.
    """
    m, greatest = e.m, dims.greatest_starts
    starts, inside = {}, []
    for i, axis in enumerate(dims.start_index_map):
        start = yield from e.index(indices, (*row, m.constant(i)))
        clipped = m.ext(Ext.S_MIN, m.ext(Ext.S_MAX, start, m.constant(0)), m.constant(greatest[axis]))
        if not clips:
            inside.append(m.op(Op.I_EQUAL, start, clipped))
        starts[axis] = clipped
    return starts, inside


@handles("gather")
def _gather(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    m, dims, out = e.m, GatherDims.of_gather(node), node.outputs[0]
    operand, indices = node.inputs
    fill = fill_value(out.dtype, node.params.get("fill_value"))
    if size_of(operand) == 0:  # only with windows of no element, or all out of bounds
        return e.scalars.constant(fill, out.dtype)
    row = dims.row(coords)
    starts, inside = yield from _window_starts(e, indices, row, dims, _clips(node))
    place = [starts.get(axis, m.constant(0)) for axis in dims.axes]
    for axis, offset in zip(dims.window_axes, dims.offset_dims, strict=True):
        place[axis] = m.op(Op.I_ADD, place[axis], coords[offset])
    for row_axis, axis in dims.batch_axes.items():
        place[axis] = row[row_axis]
    if not inside:
        return (yield operand, place)

    def within() -> Code:
        return [(yield operand, place)]

    filled = e.scalars.constant(fill, out.dtype)
    return (yield from m.branch(e.all(inside), within, no_questions(lambda: [filled])))[0]


_COMBINERS = {"scatter": None} | {
    f"scatter{dash}{name}": name for dash, name in itertools.product("-_", ("add", "sub", "mul", "min", "max"))
}


@handles(*_COMBINERS)
def _scatter(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    """From the result's side: goes through all rows in order, and takes the updates that fall on this place.

    No atomics, and the same result every time; it costs a look at every row of the indices that is not fixed by a
    batch axis, for every element.
    """
    m, dims = e.m, GatherDims.of_scatter(node)
    operand, indices, updates = node.inputs
    old = yield operand, coords
    if size_of(updates) == 0:
        return old
    batch, lengths = dims.batch_axes, [dims.rows[axis] for axis in dims.free_row_axes]

    def visit(number: Id, carried: list[Id]) -> Code:
        free = iter(e.place(number, lengths))
        row = [coords[batch[axis]] if axis in batch else next(free) for axis in range(len(dims.rows))]
        starts, inside = yield from _window_starts(e, indices, row, dims, _clips(node))
        offsets = {  # of this place in the row's window
            axis: m.op(Op.I_SUB, coords[axis], starts[axis]) if axis in starts else coords[axis]
            for axis in dims.axes
            if axis not in dims.operand_batching_dims
        }
        inside += [m.op(Op.U_LESS, offset, m.constant(dims.slice_sizes[axis])) for axis, offset in offsets.items()]

        def taken() -> Code:
            update = yield updates, dims.joined(row, [offsets[axis] for axis in dims.window_axes])
            return [(yield from _combined(e, node, carried[0], update))]

        return (yield from m.branch(e.all(inside), taken, no_questions(lambda: carried)))

    found = yield from m.loop(m.constant(0), m.constant(math.prod(lengths)), m.constant(1), [old], visit)
    return found[0]


def _combined(e: Emitter, node: Node, old: Id, update: Id) -> Code:
    """The element that a scatter makes of an old one and an update."""
    function, combine = node.params.get("update"), _COMBINERS[node.op]
    if function:
        return (yield from e.applied(function, (old, update)))
    return e.scalars.binary(combine, old, update, dtype_of(node.inputs[0])) if combine else update
