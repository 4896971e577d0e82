"""Decompositions: primitives rewritten in others, as functions of jax.lax.

A decomposition takes an equation and gives a function of its operands, which is traced and inlined in its place; or
None, where kernels are generated for the primitive as it is. PRNG keys come as the uint32 words that they are made of.
A ValueError says in a line what cannot be decomposed.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from vk_kernels.compiler import merge_sort
from vk_kernels.jax_compat import in_other_primitives

_MOST_PLACES = 1024  # of a window: each is a slice of the array
_LONGEST_RUN = 1024  # elements along which each thread goes from the first one on; longer runs are cut
_LONGEST_BLOCK = 512  # elements of what they are cut into


# PRNG.


def _over_keys(fn: Callable[..., Any], equation: JaxprEqn) -> Callable[..., Any]:
    """A PRNG's function of one key as one of arrays of keys, and of whatever else the primitive takes alike."""
    for _ in equation.invars[0].aval.shape:
        fn = jax.vmap(fn)
    return fn


def _generator(equation: JaxprEqn) -> Any:
    """The PRNG of the keys of an equation, which JAX keeps with their dtype."""
    return equation.invars[0].aval.dtype._impl


def _random_bits(equation: JaxprEqn) -> Callable[..., Any]:
    width, shape = equation.params["bit_width"], equation.params["shape"]
    generator = _generator(equation)
    return _over_keys(lambda key: generator.random_bits(key, width, shape), equation)


def _random_split(equation: JaxprEqn) -> Callable[..., Any]:
    generator, shape = _generator(equation), equation.params["shape"]
    return _over_keys(lambda key: generator.split(key, shape), equation)


def _random_fold_in(equation: JaxprEqn) -> Callable[..., Any]:
    data = equation.invars[1].aval
    fold_in = _generator(equation).fold_in
    if data.shape:
        return _over_keys(fold_in, equation)
    return lambda key, number: _over_keys(lambda one: fold_in(one, number), equation)(key)


def _random_seed(equation: JaxprEqn) -> Callable[..., Any]:
    return _over_keys(equation.params["impl"].seed, equation)


def _iota_2x32(equation: JaxprEqn) -> Callable[..., Any]:
    """The high and the low 32 bits of an array's row-major indices."""
    shape = equation.params["shape"]
    size = int(np.prod(shape, dtype=np.int64))
    if size > 2**31:
        raise ValueError(f"random bits for {size:,} elements in one draw")
    return lambda: (
        jnp.zeros(shape, jnp.uint32),
        lax.iota(jnp.uint32, size).reshape(shape),
    )


def _stack(equation: JaxprEqn) -> Callable[..., Any]:
    axis = equation.params["axis"]
    return lambda *xs: lax.concatenate([lax.expand_dims(x, (axis,)) for x in xs], axis)


def _bitcast(equation: JaxprEqn) -> Callable[..., Any] | None:
    """Between types of different width, by shifts. Of one width it is a primitive that kernels have."""
    (x,), to = equation.invars, np.dtype(equation.params["new_dtype"])
    source = x.aval.dtype
    words, parts = (np.dtype(f"uint{8 * t.itemsize}") for t in (source, to))
    bits = 8 * parts.itemsize

    def narrow(x):
        x = lax.bitcast_convert_type(x, words)[..., None]
        shifts = jnp.arange(words.itemsize // parts.itemsize, dtype=words) * words.type(bits)
        shifts = jnp.broadcast_to(shifts, (*x.shape[:-1], shifts.size))
        return lax.bitcast_convert_type((x >> shifts).astype(parts), to)

    def widen(x):
        x = lax.bitcast_convert_type(x, words).astype(parts)
        shifts = jnp.arange(x.shape[-1], dtype=parts) * parts.type(8 * words.itemsize)
        whole = (x << jnp.broadcast_to(shifts, x.shape)).sum(axis=-1, dtype=parts)
        return lax.bitcast_convert_type(whole, to)

    if source.itemsize == to.itemsize:
        return None
    return narrow if source.itemsize > to.itemsize else widen


# Runs: cumsum and the like.


def _running(
    combine: Callable[..., Any], identity: Callable[[np.dtype], Any], equation: JaxprEqn
) -> Callable[..., Any] | None:
    """A long run by blocks: each has a run of its own, and the blocks' last elements another, which comes before.

    In one run every element reads all before it, so that time would grow with the square of the length.
    """
    axis, reverse = equation.params["axis"], equation.params["reverse"]
    shape, dtype = equation.invars[0].aval.shape, np.dtype(equation.invars[0].aval.dtype)
    length = shape[axis]
    if length <= _LONGEST_RUN:
        return None
    block = min(_LONGEST_BLOCK, 1 << (length.bit_length() + 1) // 2)
    blocks = -(-length // block)
    # As in one run, what is in between is in f32.
    wide = np.dtype(np.float32) if jnp.issubdtype(dtype, np.floating) else dtype
    nothing = np.asarray(identity(wide), wide)

    def padded(x: jax.Array, low: int, high: int) -> jax.Array:
        return lax.pad(x, nothing, [(low, high, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])

    def run(x: jax.Array, along: int) -> jax.Array:
        return equation.primitive.bind(x, axis=along, reverse=reverse)

    def in_blocks(x: jax.Array) -> jax.Array:
        x = padded(x.astype(wide), 0, blocks * block - length)
        inside = run(x.reshape(*shape[:axis], blocks, block, *shape[axis + 1 :]), axis + 1)
        ends = lax.index_in_dim(inside, 0 if reverse else block - 1, axis + 1, keepdims=False)
        before = run(ends, axis)
        before = padded(before, -1, 1) if reverse else padded(before, 1, -1)  # of the blocks before each
        whole = combine(jnp.broadcast_to(jnp.expand_dims(before, axis + 1), inside.shape), inside)
        whole = whole.reshape(*shape[:axis], blocks * block, *shape[axis + 1 :])
        return lax.slice_in_dim(whole, 0, length, axis=axis).astype(dtype)

    return in_blocks


# Windows: every place of a window is a strided slice of the padded array.


def _places(equation: JaxprEqn) -> list[tuple[int, ...]]:
    """The places of a window, in row-major order."""
    window = equation.params["window_dimensions"]
    if math.prod(window) > _MOST_PLACES:
        raise ValueError(f"a window of {math.prod(window):,} elements; kernels take {_MOST_PLACES:,}")
    return list(itertools.product(*map(range, window)))


def _padded(x: jax.Array, fill: Any, equation: JaxprEqn) -> jax.Array:
    params = equation.params
    dilation = params.get("base_dilation", (1,) * x.ndim)
    config = [(low, high, step - 1) for (low, high), step in zip(params["padding"], dilation, strict=True)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), config)


def _at_place(padded: jax.Array, place: tuple[int, ...], out: tuple[int, ...], equation: JaxprEqn) -> jax.Array:
    """The elements that all windows have at one place. out: how many windows there are along each axis."""
    strides = equation.params["window_strides"]
    dilation = equation.params.get("window_dilation", (1,) * padded.ndim)
    start = [i * step for i, step in zip(place, dilation, strict=True)]
    limit = [low + (n - 1) * step + 1 for low, n, step in zip(start, out, strides, strict=True)]
    return lax.slice(padded, start, limit, strides)


def _window_extreme(fill: Callable[[Any], Any], combine: Callable[..., Any], equation: JaxprEqn) -> Callable[..., Any]:
    """A sum or an extreme: along one axis after another."""
    out = equation.outvars[0].aval.shape
    if 0 in out:
        return lambda x: jnp.zeros(out, x.dtype)
    params = equation.params
    window, strides, dilation = (params[f"window_{name}"] for name in ("dimensions", "strides", "dilation"))

    def reduce(x: jax.Array) -> jax.Array:
        x = _padded(x, fill(x.dtype), equation)
        for axis, size in enumerate(window):
            parts = (
                lax.slice_in_dim(x, i, i + (out[axis] - 1) * strides[axis] + 1, strides[axis], axis)
                for i in range(0, size * dilation[axis], dilation[axis])
            )
            x = functools.reduce(combine, parts)
        return x

    return reduce


def _window_sum(equation: JaxprEqn) -> Callable[..., Any]:
    """0 and what is in the window, so that no sum is -0."""
    of_windows = _window_extreme(lambda dtype: 0, lax.add, equation)
    return lambda x: of_windows(x) + jnp.zeros((), x.dtype)


def _least(dtype: Any) -> Any:
    """The value that loses to every other in a maximum."""
    if jnp.issubdtype(dtype, jnp.floating):
        return -np.inf
    return False if dtype == np.bool_ else jnp.iinfo(dtype).min


def _most(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.inf
    return True if dtype == np.bool_ else jnp.iinfo(dtype).max


def _scalar_function(equation: JaxprEqn) -> Callable[..., Any]:
    """The function of scalars that an equation reduces by, on arrays: two tuples of operands, one of results."""
    jaxpr = equation.params["jaxpr"]
    fn = jaxpr_as_fun(jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, equation.params["consts"]))

    def of_arrays(left: tuple, right: tuple) -> tuple:
        mapped = fn
        for _ in range(left[0].ndim):
            mapped = jax.vmap(mapped)
        return tuple(mapped(*left, *right))

    return of_arrays


def _reduce_window(equation: JaxprEqn) -> Callable[..., Any]:
    """By any function: place after place. As in XLA, elements alone are combined, and nothing that pads them."""
    out, combine, places = equation.outvars[0].aval.shape, _scalar_function(equation), _places(equation)
    pads = any(map(any, equation.params["padding"])) or set(equation.params["base_dilation"]) - {1}

    def reduce(*operands: jax.Array) -> tuple:
        xs, fills = operands[: len(operands) // 2], operands[len(operands) // 2 :]
        found = tuple(jnp.full(out, fill) for fill in fills)
        padded = [_padded(x, fill, equation) for x, fill in zip(xs, fills, strict=True)]
        if 0 in out:
            return found
        elements = _padded(jnp.ones(xs[0].shape, bool), False, equation)
        for place in places:
            new = combine(found, tuple(_at_place(x, place, out, equation) for x in padded))
            if pads:
                there = _at_place(elements, place, out, equation)
                new = tuple(lax.select(there, *both) for both in zip(new, found, strict=True))
            found = new
        return found

    return reduce


def _reduce(equation: JaxprEqn) -> Callable[..., Any]:
    """By any function: neighbours first, so that the elements stay in order."""
    combine, axes = _scalar_function(equation), equation.params["dimensions"]
    out = equation.outvars[0].aval.shape

    def reduce(*operands: jax.Array) -> tuple:
        xs, firsts = operands[: len(operands) // 2], operands[len(operands) // 2 :]
        if not axes:  # XLA leaves the first value out, too
            return xs
        kept = [axis for axis in range(xs[0].ndim) if axis not in axes]
        count = math.prod(xs[0].shape[axis] for axis in axes)
        rows = tuple(lax.transpose(x, [*axes, *kept]).reshape(count, math.prod(out)) for x in xs)
        while count > 1:
            left, right = (tuple(x[i : count - count % 2 : 2] for x in rows) for i in range(2))
            joined = combine(left, right)
            last = tuple(x[count - count % 2 :] for x in rows)
            rows = tuple(lax.concatenate([x, y], 0) for x, y in zip(joined, last, strict=True))
            count = len(rows[0])
        found = tuple(jnp.full(out, first) for first in firsts)
        return combine(found, tuple(x.reshape(out) for x in rows)) if count else found

    return reduce


def _select_and_gather_add(equation: JaxprEqn) -> Callable[..., Any]:
    """The tangents at the places of the windows' extremes."""
    params, out = equation.params, equation.outvars[0].aval.shape
    select, places = params["select_prim"].bind, _places(equation)

    def gather(tangents: jax.Array, x: jax.Array) -> jax.Array:
        fill = (_least if params["select_prim"].name == "ge" else _most)(x.dtype)
        found = jnp.full(out, fill, x.dtype), jnp.zeros(out, tangents.dtype)
        if 0 in out:
            return found[1]
        padded = _padded(x, fill, equation), _padded(tangents, 0, equation)
        for place in places:
            new = tuple(_at_place(y, place, out, equation) for y in padded)
            keeps = select(found[0], new[0])
            found = tuple(lax.select(keeps, old, other) for old, other in zip(found, new, strict=True))
        return found[1]

    return gather


def _select_and_scatter_add(equation: JaxprEqn) -> Callable[..., Any]:
    """Each window's element is added at the place of its extreme, the first of equal ones."""
    params, windows = equation.params, equation.invars[0].aval.shape
    select, places, strides = params["select_prim"].bind, _places(equation), params["window_strides"]

    def scatter(source: jax.Array, x: jax.Array) -> jax.Array:
        if 0 in windows:
            return jnp.zeros_like(x)
        padded = _padded(x, (_least if params["select_prim"].name == "ge" else _most)(x.dtype), equation)
        best, chosen = _at_place(padded, places[0], windows, equation), jnp.zeros(windows, jnp.int32)
        for i, place in enumerate(places[1:], 1):
            new = _at_place(padded, place, windows, equation)
            keeps = select(best, new)
            best, chosen = lax.select(keeps, best, new), lax.select(keeps, chosen, jnp.full(windows, i, jnp.int32))
        zero = jnp.zeros((), source.dtype)
        total = jnp.zeros(padded.shape, source.dtype)
        for i, place in enumerate(places):
            own = lax.select(chosen == i, source, jnp.zeros_like(source))
            ends = zip(place, padded.shape, windows, strides, strict=True)
            config = [(low, n - low - (count - 1) * step - 1, step - 1) for (low, n, count, step) in ends]
            total += lax.pad(own, zero, config)
        return lax.pad(total, zero, [(-low, -high, 0) for low, high in params["padding"]])

    return scatter


def _windows_of(x: jax.Array, axis: int, window: int, out: int, stride: int, step: int) -> jax.Array:
    """Cuts an axis into windows: it becomes two, of the windows and of the places in one, `step` elements apart."""
    if window == 1:
        return lax.expand_dims(lax.slice_in_dim(x, 0, (out - 1) * stride + 1, stride, axis), (axis + 1,))
    first, place = (lax.broadcasted_iota(np.int32, (out, window, 1), i) for i in range(2))
    others = [i for i in range(x.ndim + 1) if i not in (axis, axis + 1)]
    return lax.gather(
        x,
        stride * first + step * place,
        lax.GatherDimensionNumbers(tuple(others), (axis,), (axis,)),
        [1 if i == axis else n for i, n in enumerate(x.shape)],
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _convolution(equation: JaxprEqn) -> Callable[..., Any]:
    """A product of the windows' elements, side by side, with the filters: im2col.

    Source: Chellapilla, Puri and Simard, "High performance convolutional neural networks for document processing"
    (2006). With B batch groups and F feature groups, one of which is 1, it is a batch of G = B F products.
    """
    params, out = equation.params, equation.outvars[0].aval
    numbers, batches, features = (
        params[name] for name in ("dimension_numbers", "batch_group_count", "feature_group_count")
    )
    groups = batches * features

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        if 0 in (*out.shape, *x.shape, *w.shape):
            return jnp.zeros(out.shape, out.dtype)
        x, w = lax.transpose(x, numbers.lhs_spec), lax.transpose(w, numbers.rhs_spec)
        config = [(low, high, n - 1) for (low, high), n in zip(params["padding"], params["lhs_dilation"], strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *config])
        n, channels, *spatial = x.shape
        x = x.reshape(batches, n // batches, features, channels // features, *spatial).swapaxes(1, 2)
        x = x.reshape(groups, n // batches, channels // features, *spatial)
        w = w.reshape(groups, len(w) // groups, *w.shape[1:])  # (G, O / G, C / F, window)
        places = [out.shape[i] for i in numbers.out_spec[2:]]
        for i in reversed(range(len(places))):
            strides, steps = params["window_strides"], params["rhs_dilation"]
            x = _windows_of(x, 3 + i, w.shape[3 + i], places[i], strides[i], steps[i])
        inside = (2, *range(4, x.ndim, 2)), tuple(range(2, w.ndim))
        found = lax.dot_general(
            x, w, (inside, ((0,), (0,))), params["precision"], params["preferred_element_type"] or out.dtype
        )  # (G, N / B, places, O / G)
        found = jnp.moveaxis(jnp.moveaxis(found, -1, 2), 0, 1).reshape(n // batches, -1, *places)
        return lax.transpose(found.astype(out.dtype), np.argsort(numbers.out_spec))

    return convolve


# Order.


def _total_order(compare: Callable[..., Any], equation: JaxprEqn) -> Callable[..., Any]:
    """-NaN, -inf, ..., -0, 0, ..., inf, NaN: the order of a float's bits."""
    dtype = equation.invars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return compare
    words = np.dtype(f"int{8 * dtype.itemsize}")

    def ordered(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x, words)
        return jnp.where(bits < 0, bits ^ np.iinfo(words).max, bits)

    return lambda x, y: compare(ordered(x), ordered(y))


def _approx_top_k(equation: JaxprEqn) -> Callable[..., Any]:
    """Exactly, as XLA does on a processor."""
    params = equation.params
    if not params["aggregate_to_topk"]:
        raise ValueError("approx_top_k has no kernel without aggregate_to_topk")
    axis, sign = params["reduction_dimension"], 1 if params["is_max_k"] else -1

    def top(x: jax.Array) -> tuple:
        values, places = lax.top_k(sign * jnp.moveaxis(x, axis, -1), params["k"])
        return jnp.moveaxis(sign * values, -1, axis), jnp.moveaxis(places, -1, axis)

    return top


# The rest.


def _reshape(equation: JaxprEqn) -> Callable[..., Any] | None:
    """Reshapes; with `dimensions`, after a transpose."""
    sizes, dimensions = equation.params["new_sizes"], equation.params["dimensions"]
    if dimensions is None:
        return None
    return lambda x: lax.reshape(lax.transpose(x, dimensions), sizes)


def _empty(equation: JaxprEqn) -> Callable[..., Any]:
    aval = equation.outvars[0].aval
    return lambda: jnp.zeros(aval.shape, aval.dtype)


def _log2(equation: JaxprEqn) -> Callable[..., Any]:
    """jax 0.11."""
    dtype = equation.outvars[0].aval.dtype
    return lambda x: (lax.log(x.astype(np.float32)) / np.log(np.float32(2))).astype(dtype)


def _over_positions(reduce: Callable[..., Any], equation: JaxprEqn) -> Callable[..., Any] | None:
    """A reduction: jax.vmap makes one of a collective over its own axis."""
    axes, groups = equation.params["axes"], equation.params.get("axis_index_groups")
    if groups is not None or not all(isinstance(axis, int) for axis in axes):
        return None
    return lambda *xs: [reduce(x, axes) for x in xs]


def _platform_index(equation: JaxprEqn) -> Callable[..., Any]:
    """Vulkan is no platform of XLA: the default, or else what the processor takes."""
    platforms = equation.params["platforms"]
    found = [i for i, names in enumerate(platforms) if names is None or "cpu" in names]
    if not found:
        raise ValueError(f"lax.platform_dependent with neither a default nor a branch for cpu, but {platforms}")
    return lambda: np.int32(found[-1])


def _polynomial(_: JaxprEqn) -> Callable[..., Any]:
    """jax 0.12: coefficients from the lowest degree on, by Horner's rule."""
    return lambda x, *coefficients: functools.reduce(lambda result, c: result * x + c, reversed(coefficients))


DECOMPOSITIONS: dict[str, Callable[[JaxprEqn], Callable[..., Any] | None]] = {
    "one_minus_square": lambda _: lambda x: (1 + x) * (1 - x),  # jax 0.11
    "approx_top_k": _approx_top_k,
    "bitcast_convert_type": _bitcast,
    "conv_general_dilated": _convolution,
    "call_hi_primitive": in_other_primitives,  # jax 0.12: searchsorted, nonzero, ldexp, frexp
    "empty": _empty,
    "empty2": _empty,
    "eq_to": functools.partial(_total_order, lax.eq),
    "iota_2x32_shape": _iota_2x32,
    "log2": _log2,
    "le_to": functools.partial(_total_order, lax.le),
    "lt_to": functools.partial(_total_order, lax.lt),
    "platform_index": _platform_index,
    "polynomial": _polynomial,
    "pmax": functools.partial(_over_positions, lax.reduce_max),
    "pmin": functools.partial(_over_positions, lax.reduce_min),
    "psum": functools.partial(_over_positions, lax.reduce_sum),
    "random_bits": _random_bits,
    "random_fold_in": _random_fold_in,
    "random_seed": _random_seed,
    "random_split": _random_split,
    "reduce": _reduce,
    "cumlogsumexp": functools.partial(_running, jnp.logaddexp, _least),
    "cummax": functools.partial(_running, lax.max, _least),
    "cummin": functools.partial(_running, lax.min, _most),
    "cumprod": functools.partial(_running, lax.mul, lambda _: 1),
    "cumsum": functools.partial(_running, lax.add, lambda _: 0),
    "reduce_window": _reduce_window,
    "reduce_window_max": functools.partial(_window_extreme, _least, lax.max),
    "reduce_window_min": functools.partial(_window_extreme, _most, lax.min),
    "reduce_window_sum": _window_sum,
    "reshape": _reshape,
    "select_and_gather_add": _select_and_gather_add,
    "select_and_scatter_add": _select_and_scatter_add,
    "sort": merge_sort.sort,
    "stack": _stack,
    "top_k": merge_sort.top_k,
}
