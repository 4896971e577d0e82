"""The axes of gathers and scatters, against JAX's own on the processor; and how a handler asks. Needs no device."""

import itertools
import textwrap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from run_graph import graph_of

from vk_kernels.compiler.codegen import emitter
from vk_kernels.compiler.codegen.emitter import Emitter, no_questions
from vk_kernels.compiler.codegen.gather_scatter import GatherDims, fill_value
from vk_kernels.compiler.ir import Graph, Node, Value
from vk_kernels.spirv.builder import Module
from vk_kernels.spirv.spec import Op

X = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
WINDOWS = lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(2, 0))
GATHERS: dict[str, tuple[Callable, np.ndarray]] = {
    "columns": (lambda x, i: x[:, i], np.array([1, 3])),
    "rows of the last axis": (lambda x, i: x[..., i], np.array([[1, 3], [0, 4]])),
    "two axes at once": (lambda x, i: x[i, :, i], np.array([2, 0])),
    "along an axis": (lambda x, i: jnp.take_along_axis(x, i, 1), np.arange(30).reshape(3, 2, 5) % 4),
    "a row each": (jax.vmap(lambda row, i: row[i]), np.array([[0, 1], [3, 3], [2, 0]])),
    "of two axes each": (jax.vmap(jax.vmap(lambda row, i: row[i])), np.arange(24).reshape(3, 4, 2) % 5),
    "windows": (lambda x, i: lax.gather(x, i, WINDOWS, (2, 4, 3)), np.array([[1, 0], [2, 1], [0, 0]])),
}


def only_node(fn: Callable, op: str, *args: np.ndarray) -> Node:
    """The gather or scatter that a function comes to."""
    graph, _ = graph_of(fn, *args)
    (node,) = (node for node in graph.nodes if node.op.startswith(op))
    return node


def gather(dims: GatherDims, operand: np.ndarray, indices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A gather in bounds, an element at a time, as the generated code goes."""
    found = np.empty(shape, operand.dtype)
    for place in itertools.product(*map(range, shape)):
        row = dims.row(place)
        starts = dict(zip(dims.start_index_map, indices[tuple(row)], strict=True))
        at = [starts.get(axis, 0) for axis in dims.axes]
        for axis, offset in zip(dims.window_axes, dims.offset_dims, strict=True):
            at[axis] += place[offset]
        for row_axis, axis in dims.batch_axes.items():
            at[axis] = row[row_axis]
        found[place] = operand[tuple(at)]
    return found


def drawn(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """An operand, and indices in bounds, for a gather."""
    dims, rng = GatherDims.of_gather(node), np.random.default_rng(3)
    starts = [rng.integers(0, dims.greatest_starts[axis] + 1, dims.rows) for axis in dims.start_index_map]
    return rng.normal(size=dims.shape).astype(np.float32), np.stack(starts, -1)


def parameters(node: Node) -> dict:
    return {name: node.params[name] for name in ("dimension_numbers", "slice_sizes", "mode")}


@pytest.fixture(params=GATHERS)
def node(request) -> Node:
    fn, indices = GATHERS[request.param]
    return only_node(fn, "gather", X, indices)


def test_a_gather_by_these_axes_is_jaxs(node):
    operand, indices = drawn(node)
    expected = np.asarray(lax.gather(operand, indices, **parameters(node)))
    found = gather(GatherDims.of_gather(node), operand, indices, expected.shape)
    np.testing.assert_array_equal(found, expected)


def test_the_axes_of_a_scatter_are_those_of_the_gather_that_reads_what_it_writes(node):
    operand, indices = drawn(node)

    def gradient(x, weights):
        return jax.vjp(lambda x: lax.gather(x, indices, **parameters(node)), x)[1](weights)

    scatter = only_node(gradient, "scatter", operand, np.ones(node.outputs[0].shape, np.float32))
    assert GatherDims.of_scatter(scatter) == GatherDims.of_gather(node)


def test_a_place_in_the_windows_joined_is_one_of_a_row_and_one_of_its_window(node):
    dims = GatherDims.of_gather(node)
    joined = [f"c{axis}" for axis in range(len(node.outputs[0].shape))]
    window = [joined[axis] for axis in dims.offset_dims]
    assert dims.joined(dims.row(joined), window) == joined
    assert {*dims.row(joined), *window} == {*joined}
    assert len(dims.row(joined)) == len(dims.rows) == len(dims.free_row_axes) + len(dims.batch_axes)


def test_two_columns_as_the_docstring_has_them():
    indices = np.array([[1], [3]])
    columns = lax.GatherDimensionNumbers(offset_dims=(0,), collapsed_slice_dims=(1,), start_index_map=(1,))
    x = np.arange(12.0).reshape(3, 4)
    node = only_node(lambda x, i: lax.gather(x, i, columns, (3, 1), mode="clip"), "gather", x, indices)
    dims = GatherDims.of_gather(node)
    assert (dims.window_axes, dims.batch_axes, dims.free_row_axes, dims.greatest_starts) == ([0], {}, [0], {1: 3})
    np.testing.assert_array_equal(gather(dims, x, indices, (3, 2)), x[:, [1, 3]])


def test_what_is_out_of_bounds_is_filled_as_jax_fills_it():
    dtypes = [np.float32, ml_dtypes.bfloat16, np.int8, np.int32, np.uint16, np.uint32, bool]
    filled = jax.jit(lambda: [jnp.ones(2, dtype).at[7].get(mode="fill") for dtype in dtypes])()
    for x, dtype in zip(filled, dtypes, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(fill_value(np.dtype(dtype)), dtype).tobytes()
        assert fill_value(np.dtype(dtype), 1) == 1


def test_a_handler_asks_as_the_docstring_has_it(monkeypatch):
    given = {"handles": lambda name: lambda handler: given.setdefault(name, handler)}
    text = "@handles" + emitter.__doc__.split("@handles")[1]
    exec(textwrap.dedent(" " * 4 + text), given | {"no_questions": no_questions, "Op": Op})

    x, y = Value((9,), np.dtype(np.float32)), Value((9,), np.dtype(np.float32))
    node = Node("shift", (x,), (y,))
    module = Module(9)
    e = Emitter(module, Graph((x,), {}, [node], (y,)), {x: module.buffer(0, 32, False)})
    monkeypatch.setitem(emitter.HANDLERS, "shift", given["shift"])
    e.run(ask(y, module.thread))
    assert e.reads == {x: {module.op(Op.I_ADD, module.thread, module.constant(1))}}


def ask(value: Value, *coords: int):
    return (yield value, coords)
