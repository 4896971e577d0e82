"""Cases of primitives that move elements, gathers and scatters among them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vk_kernels.tools.conformance.registry import (
    DTYPES,
    EXACT,
    F32,
    FLOATS,
    NUMBERS,
    PrimitiveCase,
    cases_of,
    draw,
    register,
    together,
)


def _moves(
    primitive: str, calls: Sequence[tuple[str, Callable[..., Any], tuple[int, ...]]], exact: bool = True
) -> None:
    """calls: (label, function of an array, its shape)."""

    def make(name: str, full: bool) -> Iterator[PrimitiveCase]:
        for dtype, (label, fn, shape) in together(DTYPES, calls, full):
            yield PrimitiveCase(name, label, fn, (draw(shape, dtype),), gradient=dtype in FLOATS, exact=exact)

    register([primitive], make)


def _in_dim(shape: tuple[int, ...], axes: tuple[int, ...]) -> Callable[..., Any]:
    return lambda x: lax.broadcast_in_dim(x, shape, axes)


_moves(
    "broadcast_in_dim",
    [
        ("of a scalar", _in_dim((3, 4), ()), ()),
        ("leading", _in_dim((4, 3), (1,)), (3,)),
        ("of length 1", _in_dim((3, 5), (0, 1)), (3, 1)),
        ("apart", _in_dim((2, 3, 5), (0, 2)), (2, 5)),
        ("to nothing", _in_dim((0, 3), (1,)), (3,)),
    ],
)
_moves(
    "reshape",
    [
        ("flat", lambda x: lax.reshape(x, (15,)), (3, 5)),
        ("merged", lambda x: lax.reshape(x, (6, 4)), (2, 3, 4)),
        ("regrouped", lambda x: lax.reshape(x, (4, 9)), (6, 6)),
        ("of nothing", lambda x: lax.reshape(x, (7, 0)), (0, 3)),
        ("of one", lambda x: lax.reshape(x, ()), (1, 1)),
    ],
)
_moves(
    "squeeze",
    [("axes 0, 2", lambda x: lax.squeeze(x, (0, 2)), (1, 5, 1)), ("all", lambda x: lax.squeeze(x, (0,)), (1,))],
)
_moves(
    "transpose",
    [
        ("of two", lambda x: x.T, (3, 5)),
        ("in turn", lambda x: lax.transpose(x, (2, 0, 1)), (2, 3, 4)),
        ("of four", lambda x: lax.transpose(x, (3, 1, 0, 2)), (2, 3, 4, 5)),
        ("of nothing", lambda x: x.T, (3, 0)),
    ],
)
_moves("rev", [("rows", lambda x: lax.rev(x, (0,)), (3, 5)), ("both", lambda x: lax.rev(x, (0, 2)), (2, 3, 4))])
_moves(
    "slice",
    [
        ("within", lambda x: lax.slice(x, (1, 2), (3, 4)), (3, 5)),
        ("by steps", lambda x: lax.slice(x, (0, 1), (7, 9), (3, 2)), (7, 9)),
        ("to nothing", lambda x: lax.slice(x, (2,), (2,)), (5,)),
    ],
)
_moves(
    "split",
    [("uneven", lambda x: lax.split(x, (1, 0, 4), 1), (3, 5)), ("rows", lambda x: lax.split(x, (2, 2)), (4, 2))],
)
_moves("tile", [("both", lambda x: lax.tile(x, (2, 3)), (3, 5)), ("none", lambda x: lax.tile(x, (0,)), (3,))])
_moves(
    "stack", [("last", lambda x: jnp.stack([x, x[::-1]], -1), (3, 5)), ("first", lambda x: jnp.stack([x, x, x]), (3,))]
)
_moves("unstack", [("rows", lambda x: jnp.unstack(x), (3, 5)), ("columns", lambda x: jnp.unstack(x, axis=1), (3, 2))])
_moves(
    "concatenate",
    [
        ("rows", lambda x: lax.concatenate([x, x[:1], x[:0], x[1:]], 0), (3, 5)),
        ("columns", lambda x: lax.concatenate([x[:, :2], x, x[:, 4:]], 1), (3, 5)),
        ("many", lambda x: lax.concatenate([x[i : i + 1] for i in (3, 1, 4, 1, 5, 9, 2, 6)], 0), (10,)),
    ],
)


def _pad_by(*config: tuple[int, int, int]) -> Callable[..., Any]:
    return lambda x: lax.pad(x, jnp.ones((), x.dtype), config)


_moves(
    "pad",
    [
        ("around", _pad_by((1, 2, 0), (0, 3, 0)), (3, 5)),
        ("between", _pad_by((0, 0, 1), (2, 1, 2)), (3, 5)),
        ("cut", _pad_by((-1, 1, 0), (2, -2, 0)), (3, 5)),
        (
            "cut between",
            _pad_by(
                (-2, -1, 2),
            ),
            (7,),
        ),
        ("of nothing", _pad_by((2, 1, 0), (0, 0, 0)), (0, 3)),
    ],
)


@cases_of("iota")
def _iota(full):
    for dtype, (shape, axis) in together(NUMBERS, (((7,), 0), ((3, 5), 1), ((2, 3, 4), 1), ((0, 3), 1)), full):
        yield (
            f"along {axis}",
            lambda dtype=dtype, shape=shape, axis=axis: lax.broadcasted_iota(dtype, shape, axis),
            [],
            EXACT,
        )


@cases_of("empty")
def _empty(full):
    yield "", lambda: jnp.where(False, lax.empty((3,), F32), 1.0), [], EXACT  # what is in it is nobody's business


@cases_of("dynamic_slice")
def _dynamic_slice(full):
    for dtype, start in together(DTYPES, ((1, 2), (-1, 9), (-20, -3), (2, 2)), full):
        start = np.array(start, np.int32)
        fn = lambda x, s: lax.dynamic_slice(x, (s[0], s[1]), (2, 3))  # noqa: E731
        yield "", fn, [draw((3, 5), dtype), start], {"exact": True, "gradient": dtype in FLOATS}
    yield "by uint8", lambda x, i: lax.dynamic_slice(x, (i,), (2,)), [draw((9,), F32), np.uint8(200)], EXACT
    yield "of nothing", lambda x, i: lax.dynamic_slice(x, (i,), (0,)), [draw((9,), F32), np.int32(3)], EXACT


@cases_of("dynamic_update_slice")
def _dynamic_update_slice(full):
    for dtype, start in together(DTYPES, ((1, 2), (-1, 9), (2, 2)), full):
        args = [draw((3, 5), dtype), draw((2, 3), dtype, 1), np.array(start, np.int32)]
        fn = lambda x, u, s: lax.dynamic_update_slice(x, u, (s[0], s[1]))  # noqa: E731
        yield "", fn, args, {"exact": True, "gradient": dtype in FLOATS}
    yield "by nothing", lambda x, u: lax.dynamic_update_slice(x, u, (1,)), [draw((9,), F32), draw((0,), F32)], EXACT


# Gathers and scatters.

_INDEXED: list[tuple[str, Callable[..., Any], tuple[int, ...], np.ndarray]] = [
    ("rows", lambda x, i: x[i], (5, 3), np.array([[0, 4], [-1, 2]], np.int32)),
    ("columns", lambda x, i: x[:, i], (3, 5), np.array([4, 0, 0], np.int32)),
    ("elements", lambda x, i: x[i, i[::-1]], (4, 4), np.array([1, 0, 3], np.int32)),
    ("apart", lambda x, i: x[i, :, i], (3, 2, 4), np.array([2, 0], np.int32)),
    ("fill", lambda x, i: x.at[i].get(mode="fill"), (5, 2), np.array([7, -9, 1], np.int32)),
    ("fill with 1", lambda x, i: x.at[i].get(mode="fill", fill_value=1), (5,), np.array([7, 1], np.int32)),
    ("clip", lambda x, i: x.at[i].get(mode="clip"), (5,), np.array([7, -9, 1], np.int32)),
    ("by uint8", lambda x, i: x.at[i].get(mode="clip"), (5,), np.array([255, 1], np.uint8)),
    ("along an axis", lambda x, i: jnp.take_along_axis(x, i, 1), (3, 5), np.array([[4], [0], [2]], np.int32)),
    ("one", lambda x, i: x[i[0]], (5, 3), np.array([3], np.int32)),
    ("none", lambda x, i: x[i], (5, 3), np.zeros((0,), np.int32)),
    (
        "windows",
        lambda x, i: jax.vmap(lambda j: lax.dynamic_slice(x, (j, 1), (2, 2)))(i),
        (5, 4),
        np.array([0, 9], np.int32),
    ),
    ("mapped", lambda x, i: jax.vmap(lambda row, j: row[j])(x, i), (3, 5), np.array([4, 1, 0], np.int32)),
]


@cases_of("gather")
def _gather(full):
    for dtype, (label, fn, shape, indices) in together(DTYPES, _INDEXED, full):
        yield label, fn, [draw(shape, dtype), indices], {"exact": True, "gradient": dtype in FLOATS}


def _scatters(primitive: str, method: str, dtypes: Sequence[np.dtype], repeats: bool, gradient: bool) -> None:
    """repeats: whether the result is defined where a place comes twice."""
    there = np.array([3, 0, 3 if repeats else 1], np.int32)

    def at(x, index, values, **mode):
        return getattr(x.at[index], method)(values, **mode)

    calls = [
        ("rows", lambda x, i, v: at(x, i, v), (5, 3), (3, 3), there),
        ("columns", lambda x, i, v: at(x, (slice(None), i), v), (2, 5), (2, 3), there),
        ("elements", lambda x, i, v: at(x, (i, i[::-1]), v), (4, 4), (3,), np.array([1, 0, 3], np.int32)),
        ("dropped", lambda x, i, v: at(x, i, v, mode="drop"), (5,), (3,), np.array([9, -7, 2], np.int32)),
        ("clipped", lambda x, i, v: at(x, i, v, mode="clip"), (5,), (2,), np.array([9, 2], np.int32)),
        ("one", lambda x, i, v: at(x, i[0], v), (5, 3), (3,), np.array([3], np.int32)),
        ("none", lambda x, i, v: at(x, i, v), (5, 3), (0, 3), np.zeros((0,), np.int32)),
        (
            "mapped",
            lambda x, i, v: jax.vmap(lambda r, j, u: at(r, j, u))(x, i, v),
            (3, 4),
            (3,),
            np.array([3, 1, 0], np.int32),
        ),
    ]

    def make(name: str, full: bool) -> Iterator[PrimitiveCase]:
        for dtype, (label, fn, shape, of_values, indices) in together(dtypes, calls, full):
            args = (draw(shape, dtype), indices, draw(of_values, dtype, 1))
            fn_of = lambda x, v, fn=fn, indices=indices: fn(x, indices, v)  # noqa: E731
            yield PrimitiveCase(
                name, label, fn_of, (args[0], args[2]), gradient and dtype in FLOATS, dtype not in FLOATS
            )

    register([primitive], make)


_scatters("scatter", "set", DTYPES, repeats=False, gradient=True)
_scatters("scatter-add", "add", NUMBERS, repeats=True, gradient=True)
_scatters("scatter-sub", "subtract", NUMBERS, repeats=True, gradient=True)
_scatters("scatter-mul", "multiply", NUMBERS, repeats=True, gradient=False)
_scatters("scatter-min", "min", NUMBERS, repeats=True, gradient=False)
_scatters("scatter-max", "max", NUMBERS, repeats=True, gradient=False)
