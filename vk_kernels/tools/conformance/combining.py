"""Cases of primitives that combine many elements: reductions, running ones, windows, products, orders."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax

from vk_kernels.tools.conformance.registry import (
    BOOL,
    DTYPES,
    EXACT,
    F32,
    FLOATS,
    GRADIENT,
    INTEGERS,
    NUMBERS,
    PrimitiveCase,
    cases_of,
    distinct,
    draw,
    register,
    together,
)

# (shape, axes): short and long, rows and columns, all, none, of nothing.
_REDUCED = (
    ((3, 5), (1,)),
    ((3, 5), (0, 1)),
    ((2, 3, 4), (0, 2)),
    ((3, 300), (1,)),
    ((70, 3), (0,)),
    ((2, 0, 3), (1,)),
    ((0, 3), (1,)),
    ((), ()),
    ((2500,), (0,)),
)

_MOST_FOR_GRADIENTS = 30  # elements: JAX's gradients of products and of running reductions are long programs


def _reductions(
    *primitives: str,
    fn: Callable[..., Any],
    dtypes: Sequence[np.dtype] = DTYPES,
    data: Callable[..., np.ndarray] = draw,
    gradient: bool = True,
    empty: bool = True,
) -> None:
    def make(name: str, full: bool) -> Iterator[PrimitiveCase]:
        given = [(shape, axes) for shape, axes in _REDUCED if empty or 0 not in shape]
        for dtype, (shape, axes) in together(dtypes, given, full):
            floats = dtype in FLOATS
            reduce = functools.partial(fn, name, axes=axes)
            wanted = gradient and floats and math.prod(shape) <= _MOST_FOR_GRADIENTS
            yield PrimitiveCase(name, f"over {axes}", reduce, (data(shape, dtype),), wanted, not floats)

    register(primitives, make)


def _sum(name: str, x: Any, axes: tuple[int, ...]) -> Any:
    """Sums in the dtype itself: jnp.sum takes wider ones for short integers."""
    return jax.extend.core.primitives.reduce_sum_p.bind(x, axes=axes, out_sharding=None)


def _by_lax(name: str, x: Any, axes: tuple[int, ...]) -> Any:
    functions = {"max": lax.max, "min": lax.min, "prod": lax.mul}
    functions |= {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor}
    name = name.removeprefix("reduce_")
    neutral = {"max": _extreme(x.dtype, "min"), "min": _extreme(x.dtype, "max"), "prod": 1}
    neutral |= {"and": _all_ones(x.dtype), "or": 0, "xor": 0}
    return lax.reduce(x, np.asarray(neutral[name], x.dtype), functions[name], axes)


def _extreme(dtype: Any, which: str) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.inf if which == "max" else -np.inf
    return which == "max" if dtype == np.bool_ else getattr(np.iinfo(dtype), which)


def _all_ones(dtype: Any) -> Any:
    return True if dtype == np.bool_ else -1 if np.dtype(dtype).kind == "i" else _extreme(dtype, "max")


_reductions("reduce_sum", fn=_sum, dtypes=NUMBERS)
_reductions("reduce_prod", fn=_by_lax, dtypes=NUMBERS, data=functools.partial(draw, low=0.9, high=1.1))
_reductions("reduce_max", "reduce_min", fn=_by_lax, data=lambda shape, t: draw(shape, t), gradient=False)
_reductions("reduce_and", "reduce_or", "reduce_xor", fn=_by_lax, dtypes=(*INTEGERS, BOOL), gradient=False)


def _arg(name: str, full: bool) -> Iterator[PrimitiveCase]:
    fn = getattr(lax, name)
    given = [(shape, axes) for shape, axes in _REDUCED if len(axes) == 1 and 0 not in shape]
    given += [((4, 6), (0,)), ((2, 3, 4), (1,)), ((9,), (0,))]
    for dtype, (shape, axes) in together(DTYPES, given, full):
        along = functools.partial(fn, axis=axes[0], index_dtype=np.int32)
        yield PrimitiveCase(name, f"over {axes}", along, (draw(shape, dtype),), exact=True)
    for odd in (np.array([1, np.nan, 3, np.nan], F32), np.array([2, 1, 2, 1], F32)):
        along = functools.partial(fn, axis=0, index_dtype=np.uint8)
        yield PrimitiveCase(name, "of NaN or equal ones", along, (odd,), exact=True)


register(("argmax", "argmin"), _arg)

_ALONG = (((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1), ((0, 3), 0), ((40, 2), 0))


def _cumulative(*primitives: str, dtypes: Sequence[np.dtype] = NUMBERS, **bounds: float) -> None:
    def make(name: str, full: bool) -> Iterator[PrimitiveCase]:
        for i, (dtype, (shape, axis)) in enumerate(together(dtypes, _ALONG, full)):
            for reverse in (False, True) if full else (i % 2 == 1,):
                fn = functools.partial(getattr(lax, name), axis=axis, reverse=reverse)
                floats = dtype in FLOATS
                wanted = floats and math.prod(shape) <= _MOST_FOR_GRADIENTS
                label = f"along {axis}" + (" in reverse" if reverse else "")
                yield PrimitiveCase(name, label, fn, (draw(shape, dtype, **bounds),), wanted, not floats)

    register(primitives, make)


_cumulative("cumsum", "cummax", "cummin")
_cumulative("cumprod", low=0.9, high=1.2)
_cumulative("cumlogsumexp", dtypes=FLOATS)


# Windows.

_WINDOWS = (
    ((5, 6), (2, 2), (1, 2), ((0, 1), (0, 0)), (1, 1), (1, 1)),
    ((5, 6), (3, 1), (2, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
    ((4, 5), (2, 3), (1, 1), ((1, 2), (0, 3)), (2, 1), (1, 2)),
    ((5, 6), (2, 2), (1, 1), ((-1, 0), (0, -1)), (1, 1), (1, 1)),
    ((2, 6, 4, 1), (1, 3, 2, 1), (1, 3, 2, 1), ((0, 0), (0, 0), (0, 0), (0, 0)), (1,) * 4, (1,) * 4),
    ((1, 6), (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
)


def _has_gradient(padding: Sequence[tuple[int, int]], *dilations: Sequence[int]) -> bool:
    """Whether JAX has one of extremes in such windows."""
    return all(n >= 0 for pair in padding for n in pair) and all(step == 1 for steps in dilations for step in steps)


def _windowed(*primitives: str, fn: Callable[..., Any], dtypes: Sequence[np.dtype], gradient: bool = True) -> None:
    def make(name: str, full: bool) -> Iterator[PrimitiveCase]:
        for dtype, (shape, *window) in together(dtypes, _WINDOWS, full):
            floats = dtype in FLOATS
            wanted = gradient and floats and (name == "reduce_window_sum" or _has_gradient(*window[2:]))
            call = functools.partial(fn, name, window=window)
            yield PrimitiveCase(
                name, f"{window[0]} by {window[1]}", call, (distinct(shape, dtype),), wanted, not floats
            )

    register(primitives, make)


def _reduce_window(name: str, x: Any, window: Sequence[Any]) -> Any:
    init, fn = {
        "reduce_window_sum": (0, lax.add),
        "reduce_window_max": (_extreme(x.dtype, "min"), lax.max),
        "reduce_window_min": (_extreme(x.dtype, "max"), lax.min),
        "reduce_window": (1, lambda a, b: a * b),
    }[name]
    return lax.reduce_window(x, np.asarray(init, x.dtype), fn, *window)


_windowed("reduce_window_sum", fn=_reduce_window, dtypes=(*FLOATS, *INTEGERS[:2]))
_windowed("reduce_window_max", "reduce_window_min", fn=_reduce_window, dtypes=NUMBERS)
_windowed("reduce_window", fn=_reduce_window, dtypes=(F32, INTEGERS[0]), gradient=False)


@cases_of("select_and_gather_add")
def _select_and_gather_add(full: bool) -> Iterator[tuple]:
    for name, (shape, *window) in together(("reduce_window_max", "reduce_window_min"), _WINDOWS, full):
        call = functools.partial(_reduce_window, name, window=window)
        yield name, lambda x, t, call=call: jax.jvp(call, (x,), (t,)), [distinct(shape, F32), draw(shape, F32)]


@cases_of("select_and_scatter_add")
def _select_and_scatter_add(full: bool) -> Iterator[tuple]:
    plain = [given for given in _WINDOWS if _has_gradient(*given[3:])]
    for name, (shape, *window) in together(("reduce_window_max", "reduce_window_min"), plain, full):
        call = functools.partial(_reduce_window, name, window=window)
        yield name, jax.grad(lambda x, call=call: (3 * call(x)).sum()), [distinct(shape, F32)]
    equal = np.array([[1, 1, 0], [1, 1, 0]], F32)
    call = functools.partial(_reduce_window, "reduce_window_max", window=((2, 2), (1, 1), "VALID"))
    yield "of equal ones", jax.grad(lambda x: call(x).sum()), [equal]


@cases_of("reduce")
def _reduce(full: bool) -> Iterator[tuple]:
    def log_add(x: Any, y: Any) -> Any:
        return jnp.logaddexp(x, y)

    def best(x: tuple, y: tuple) -> tuple:
        better = y[0] > x[0]
        return jnp.where(better, y[0], x[0]), jnp.where(better, y[1], x[1])

    def log_sum(x: Any, axes: tuple[int, ...]) -> Any:
        return lax.reduce(x, np.asarray(-1, x.dtype), log_add, axes)

    for shape, axes in (*_REDUCED[:3], *_REDUCED[5:8], ((2, 11), (1,))):
        yield f"over {axes}", functools.partial(log_sum, axes=axes), [draw(shape, F32)]
    args = [distinct((4, 6), F32), draw((4, 6), INTEGERS[0])]
    yield "of two", lambda x, i: lax.reduce((x, i), (np.float32(-9), np.int32(-1)), best, (1,)), args, EXACT


# Products.

_PRODUCTS = (
    ((3, 5), (5, 4), (((1,), (0,)), ((), ()))),
    ((5, 3), (4, 5), (((0,), (1,)), ((), ()))),
    ((2, 3, 5), (2, 5, 4), (((2,), (1,)), ((0,), (0,)))),
    ((3, 2, 5), (5, 4, 2), (((2,), (0,)), ((1,), (2,)))),
    ((2, 3, 4), (4, 3, 5), (((1, 2), (1, 0)), ((), ()))),
    ((3,), (4,), (((), ()), ((), ()))),
    ((7,), (7,), (((0,), (0,)), ((), ()))),
    ((3, 0), (0, 4), (((1,), (0,)), ((), ()))),
    ((0, 3), (3, 4), (((1,), (0,)), ((), ()))),
    ((33, 70), (70, 17), (((1,), (0,)), ((), ()))),
)


@cases_of("dot_general")
def _dot_general(full: bool) -> Iterator[tuple]:
    for dtype, (left, right, numbers) in together(NUMBERS, _PRODUCTS, full):
        fn = functools.partial(lax.dot_general, dimension_numbers=numbers)
        floats = dtype in FLOATS
        yield f"{numbers}", fn, [draw(left, dtype), draw(right, dtype, 1)], {"gradient": floats, "exact": not floats}
    left, right, numbers = _PRODUCTS[0]
    for dtype, wide in ((FLOATS[1], F32), (FLOATS[2], F32), (INTEGERS[1], INTEGERS[0])):
        fn = functools.partial(lax.dot_general, dimension_numbers=numbers, preferred_element_type=wide)
        yield f"to {wide.name}", fn, [draw(left, dtype), draw(right, dtype, 1)], {"exact": wide != F32}


_CONVOLUTIONS = (  # shapes, strides, padding, dilations, groups of features and of the batch, dimension numbers
    ((2, 3, 7), (4, 3, 3), (2,), ((1, 1),), (1,), (1,), 1, 1, ("NCH", "OIH", "NCH")),
    ((2, 5, 6, 3), (2, 3, 3, 4), (1, 2), ((0, 1), (1, 0)), (1, 1), (1, 1), 1, 1, ("NHWC", "HWIO", "NHWC")),
    ((1, 4, 5, 6), (6, 2, 3, 2), (1, 1), ((1, 2), (-1, 2)), (2, 1), (1, 2), 2, 1, ("NCHW", "OIHW", "NHWC")),
    ((4, 5, 5, 2), (3, 3, 2, 4), (2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1), 1, 2, ("NHWC", "HWIO", "NHWC")),
    ((3, 4, 4, 6), (1, 1, 6, 5), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, 1, ("NHWC", "HWIO", "NHWC")),
    ((1, 2, 4, 3, 4), (2, 2, 2, 1, 3), (1, 1, 1), ((0, 0), (1, 1), (1, 1)), (1,) * 3, (1,) * 3, 1, 1, None),
    ((0, 3, 7), (4, 3, 3), (1,), ((0, 0),), (1,), (1,), 1, 1, None),
    ((2, 3, 2), (4, 3, 5), (1,), ((0, 0),), (1,), (1,), 1, 1, None),  # no window fits
)


@cases_of("conv_general_dilated")
def _convolution(full: bool) -> Iterator[tuple]:
    for dtype, (left, right, *given) in together(FLOATS[:2], _CONVOLUTIONS, full):
        strides, padding, *dilations, features, batches, numbers = given
        fn = functools.partial(
            lax.conv_general_dilated,
            window_strides=strides,
            padding=padding,
            lhs_dilation=dilations[0],
            rhs_dilation=dilations[1],
            dimension_numbers=numbers,
            feature_group_count=features,
            batch_group_count=batches,
        )
        yield f"{numbers} by {strides}", fn, [draw(left, dtype), draw(right, dtype, 1)], GRADIENT


# Orders.


@cases_of("sort")
def _sort(full: bool) -> Iterator[tuple]:
    for dtype, (shape, axis) in together(DTYPES, _ALONG, full):
        args = [distinct(shape, dtype) if dtype in FLOATS else draw(shape, dtype)]
        options = {"exact": True, "gradient": dtype in FLOATS}
        yield f"along {axis}", functools.partial(lax.sort, dimension=axis), args, options
    keys, values = np.array([3, 1, 3, 1, 2], np.int32), draw((5,), F32)
    yield "by one key", lambda k, v: lax.sort((k, v), num_keys=1), [keys, values], EXACT
    yield "by two keys", lambda k, v: lax.sort((k, v), num_keys=2), [keys, values], EXACT
    odd = np.array([1, np.nan, -np.inf, 0.0, np.inf, -0.0, 2, -np.nan], F32)
    yield "of NaN", lambda x: (jnp.sort(x), jnp.argsort(x), jnp.argsort(x, descending=True)), [odd], EXACT


@cases_of("top_k")
def _top_k(full: bool) -> Iterator[tuple]:
    given = (((7,), 3), ((3, 5), 5), ((2, 3, 40), 1), ((0, 4), 2), ((3, 4), 0))
    for dtype, (shape, k) in together(NUMBERS, given, full):
        yield f"{k}", functools.partial(lax.top_k, k=k), [draw(shape, dtype)], EXACT
    yield "'s gradient", functools.partial(lax.top_k, k=2), [distinct((3, 6), F32)], EXACT | GRADIENT


@cases_of("approx_top_k")
def _approx_top_k(full: bool) -> Iterator[tuple]:
    for fn in (lax.approx_max_k, lax.approx_min_k):
        yield fn.__name__, lambda x, fn=fn: (fn(x, 3), fn(x, 2, reduction_dimension=0)), [distinct((4, 7), F32)], EXACT
