"""Shares of threads and workgroups in reductions, as numbers: needs no device."""

import math
from itertools import product

import numpy as np
import pytest

from vk_kernels.compiler.codegen.geometry import THREADS, Geometry, is_split
from vk_kernels.compiler.codegen.reductions import Reducer, by_reducer
from vk_kernels.compiler.codegen.scalars import Scalars
from vk_kernels.compiler.codegen.sections import MapSection, Output, ReduceSection, SplitReductionSection
from vk_kernels.compiler.ir import Node, Value
from vk_kernels.spirv.builder import Module

F32 = np.dtype(np.float32)
SHAPES = [(33,), (1000,), (90001,), (3, 500), (500, 3), (4, 20000), (20000, 4), (70, 1, 300), (5, 100, 7)]
GEOMETRIES = [Geometry(shape, axes) for shape in SHAPES for axes in [(0,), (len(shape) - 1,), tuple(range(len(shape)))]]


def reduction(op: str, shape: tuple[int, ...], *axes: int) -> Node:
    return Node(op, (Value(shape, F32),), (Value((), F32),), {"axes": axes})


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_element_has_one_thread(geometry):
    """A thread's elements, as `Lanes` and `Stretch` cut them: across the kept ones, along the pieces, in steps."""
    across, along = geometry.lanes
    assert across * along == THREADS
    kept, count = math.prod(geometry.kept), math.prod(geometry.reduced)
    assert geometry.tiles * across >= kept > (geometry.tiles - 1) * across
    length = geometry.piece_length
    assert length % along == 0
    taken = np.zeros(count, int)
    for piece, lane in product(range(geometry.splits), range(along)):
        taken[piece * length + lane : min((piece + 1) * length, count) : along] += 1
    assert (taken == 1).all()


@pytest.mark.parametrize(
    ("shape", "axes", "by_rows"),
    [((3, 500), (1,), True), ((3, 500), (0,), False), ((500, 1), (0,), True), ((4, 5, 6), (0, 2), True)],
)
def test_neighbours_in_memory_are_reduced_together_where_the_last_long_axis_is(shape, axes, by_rows):
    assert Geometry(shape, axes).by_rows == by_rows


def test_a_short_reduction_is_one_threads_and_a_very_long_one_several_workgroups():
    assert not Geometry((7, 32), (1,)).is_long
    assert Geometry((7, 33), (1,)).is_long
    assert not Geometry((0, 33), (1,)).is_long
    assert Geometry((8191,), (0,)).splits == 1
    assert Geometry((8192,), (0,)).splits == 2
    assert Geometry((1 << 30,), (0,)).splits == 1024
    assert is_split(reduction("reduce_sum", (8192,), 0))
    assert not is_split(reduction("argmax", (8192,), 0))  # no two accumulators go through memory


def test_a_place_is_put_together_from_kept_and_reduced_axes():
    geometry = Geometry((2, 3, 4, 5), (1, 3))
    assert (geometry.kept, geometry.reduced) == ((2, 4), (3, 5))
    assert geometry.place(["k0", "k2"], ["r1", "r3"]) == ["k0", "r1", "k2", "r3"]


def test_accumulators_in_one_list_are_cut_by_reduction():
    scalars = Scalars(Module(1))
    reducers = [Reducer(scalars, reduction(op, (40,), 0)) for op in ("reduce_sum", "argmax", "reduce_max")]
    assert by_reducer(reducers, [1, 2, 3, 4]) == [[1], [2, 3], [4]]


def test_a_section_has_the_workgroups_that_its_elements_take():
    rows, whole = Geometry((100, 70), (1,)), Geometry((90001,), (0,))
    output = Output(Value((1000, 3), F32), None)
    assert MapSection([output], at_once=1).groups == 12  # of 256 threads for 3,000 elements
    assert MapSection([output], at_once=4).groups == 3
    assert ReduceSection(rows, [], [], [], None).groups == 13  # 8 rows a workgroup, 32 threads a row
    assert SplitReductionSection(whole, [], [], [], None).groups == 21  # pieces of 4,096 elements or more
