"""Primitives that move elements: which element of which operand a place of the result reads. Needs no device.

At constant places the module folds all arithmetic and knows each branch, so that what is read is known, too.
"""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from run_graph import graph_of

from vk_kernels.compiler.codegen.emitter import Emitter
from vk_kernels.compiler.ir import Graph, Value
from vk_kernels.spirv.builder import Module

FILL = -7.0
MOVES: dict[str, Callable] = {
    "broadcast_in_dim": lambda x, y: lax.broadcast_in_dim(x, (4, 2, 6), (0, 2)),
    "reshape": lambda x, y: x.reshape(3, 2, 4),
    "reshape of some axes": lambda x, y: x.reshape(4, 3, 2),
    "expand_dims": lambda x, y: lax.expand_dims(x, (1,)),
    "squeeze": lambda x, y: lax.squeeze(lax.slice(x, (1, 0), (2, 6)), (0,)),
    "transpose": lambda x, y: x.reshape(2, 2, 6).transpose(1, 2, 0),
    "rev": lambda x, y: lax.rev(x, (1,)),
    "slice": lambda x, y: x[1:4:2, 5:0:-2],
    "split": lambda x, y: lax.split(x, (1, 2, 3), 1),
    "tile": lambda x, y: jnp.tile(x, (2, 3)),
    "unstack": lambda x, y: jnp.unstack(x, axis=1),
    "concatenate": lambda x, y: lax.concatenate([y[:1], x, y, x[2:], y[:2]], 0),
    "concatenate beside nothing": lambda x, y: lax.concatenate([x[:0], x, y[:0], y], 0),
    "pad": lambda x, y: lax.pad(x, np.float32(FILL), ((1, 2, 0), (0, 0, 0))),
    "pad between": lambda x, y: lax.pad(x, np.float32(FILL), ((0, 0, 0), (0, 0, 2))),
    "pad that cuts": lambda x, y: lax.pad(x, np.float32(FILL), ((-1, -2, 0), (-2, 1, 0))),
    "pad of nothing": lambda x, y: lax.pad(x[:0], np.float32(FILL), ((1, 2, 0), (0, 0, 0))),
}


def ask(value: Value, *coords: int):
    return (yield value, coords)


def read(graph: Graph, value: Value, place: tuple[int, ...]) -> tuple[int, int] | float:
    """(the number of the input, the row-major index) that an element is, or the constant."""
    module = Module(1)
    buffers = {x: module.buffer(i, 32, False) for i, x in enumerate(graph.inputs)}
    e = Emitter(module, graph, buffers)
    found = e.run(ask(value, *map(module.constant, place)))
    if not e.reads:
        return module.known_real(found)
    ((x, (index,)),) = e.reads.items()
    return graph.inputs.index(x), module.known(index)


@pytest.mark.parametrize("move", MOVES)
def test_each_place_reads_its_element(move):
    x, y = np.arange(24, dtype=np.float32).reshape(4, 6), 100 + np.arange(18, dtype=np.float32).reshape(3, 6)
    graph, _ = graph_of(MOVES[move], x, y)
    results = MOVES[move](x, y)
    results = results if isinstance(results, (list, tuple)) else [results]
    for value, expected in zip(graph.outputs, map(np.asarray, results), strict=True):
        assert value.shape == expected.shape
        for place in itertools.product(*map(range, expected.shape)):
            found = read(graph, value, place)
            if expected[place] != FILL:
                found = [x, y][found[0]].flat[found[1]]
            assert found == expected[place]
