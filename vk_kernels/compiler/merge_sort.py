"""Sorts and top_k of long axes, as functions of jax.lax: blocks, whose kernel compares all with all, merged in pairs.

In a merge every element of the result finds where it comes from by bisection, so that n elements take n log^2 n steps
beside those of the blocks, and none waits for another one. Source: Odeh, Green, Mwassi, Shmueli and Birk, "Merge path:
parallel merging made simple" (2012).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

BLOCK = 1024  # elements that are sorted by comparing all with all; a power of two
_LAST = np.uint32(0xFFFFFFFF)  # a key that nothing comes behind


def sort(equation: JaxprEqn) -> Callable[..., Any] | None:
    """The sort of a long axis; None where the axis is short."""
    axis, num_keys = equation.params["dimension"], equation.params["num_keys"]
    if equation.invars[0].aval.shape[axis] <= BLOCK:
        return None

    def sort_all(*xs: jax.Array) -> list[jax.Array]:
        rows = [jnp.moveaxis(x, axis, -1) for x in xs]
        places = _order([_sortable(x) for x in rows[:num_keys]])
        return [jnp.moveaxis(_along(x, places), -1, axis) for x in rows]

    return sort_all


def top_k(equation: JaxprEqn) -> Callable[..., Any] | None:
    """The greatest elements of a long axis, and their places; None where the axis is short."""
    k, axis = equation.params["k"], equation.params.get("axis", -1)
    if equation.invars[0].aval.shape[axis] <= BLOCK:
        return None

    def top(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.moveaxis(x, axis, -1)
        places = _order([~_sortable(rows, by_bits=True)])[..., :k]
        return jnp.moveaxis(_along(rows, places), -1, axis), jnp.moveaxis(places, -1, axis)

    return top


def _sortable(x: jax.Array, by_bits: bool = False) -> jax.Array:
    """Unsigned words that are in the order of `x`: NaN is the greatest, and the zeros are equal.

    by_bits: floats are in the order of their bits, as top_k has them: -NaN, -inf, ..., -0, 0, ..., inf, NaN.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(np.float32)
        bits = lax.bitcast_convert_type(x, np.int32)
        if not by_bits:
            bits = jnp.where(x == 0, 0, jnp.where(jnp.isnan(x), np.int32(0x7FC00000), bits))
        words = lax.bitcast_convert_type(bits, np.uint32)
        return jnp.where(bits < 0, ~words, words ^ np.uint32(1 << 31))
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        return lax.bitcast_convert_type(x.astype(np.int32), np.uint32) ^ np.uint32(1 << 31)
    return x.astype(np.uint32)


def _order(keys: Sequence[jax.Array]) -> jax.Array:
    """The places along the last axis of the elements in the order of some keys, the first one first; stable."""
    places = _order_of(keys[-1])
    for key in reversed(keys[:-1]):  # equal ones keep the order that they have
        places = _along(places, _order_of(_along(key, places)))
    return places


def _order_of(key: jax.Array) -> jax.Array:
    """The places along the last axis of the elements in the order of one key."""
    rows, length = math.prod(key.shape[:-1]), key.shape[-1]
    whole = BLOCK << max(0, (length - 1).bit_length() - (BLOCK - 1).bit_length())  # blocks are a power of two
    if rows * whole > 2**31:
        raise ValueError(f"a sort of {rows * length:,} elements")
    blocks = lax.pad(key.reshape(rows, length), _LAST, [(0, 0, 0), (0, whole - length, 0)]).reshape(-1, BLOCK)
    places = lax.broadcasted_iota(np.int32, (rows, whole), 1).reshape(-1, BLOCK)
    sorted_key, places = (x.reshape(-1) for x in lax.sort((blocks, places), num_keys=1, is_stable=True))
    run = BLOCK
    while run < whole:
        source = _merge(sorted_key, run)
        sorted_key, places = _at(sorted_key, source), _at(places, source)
        run *= 2
    return places.reshape(rows, whole)[:, :length].reshape(key.shape)


def _merge(key: jax.Array, run: int) -> jax.Array:
    """The place that each element comes from when sorted runs, two by two, become one.

    key: flat. run: elements of each, a power of two.

    Of the first p elements of a pair, i come from its first run: the largest i whose last element does not come behind
    element p - i of the second one.
    """
    place = lax.iota(np.int32, key.size)
    p = place & np.int32(2 * run - 1)
    first, second = place - p, place - p + run

    def in_order(i: jax.Array, j: jax.Array) -> jax.Array:
        """Whether element i of the first run does not come behind element j of the second one."""
        return _at(key, first + jnp.clip(i, 0, run - 1)) <= _at(key, second + jnp.clip(j, 0, run - 1))

    i, most, step = jnp.maximum(p - run, 0), jnp.minimum(p, run), run
    while step:
        more = jnp.minimum(i + step, most)
        i, step = jnp.where(in_order(more - 1, p - more), more, i), step // 2
    j = p - i
    return jnp.where((i < run) & ((j >= run) | in_order(i, j)), first + i, second + j)


def _along(x: jax.Array, places: jax.Array) -> jax.Array:
    """The elements at some places along the last axis."""
    return jnp.take_along_axis(x, places, -1, mode="promise_in_bounds")


def _at(x: jax.Array, places: jax.Array) -> jax.Array:
    """The elements of a flat array at some places of it."""
    return x.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)
