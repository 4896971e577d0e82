"""Functions put together at random from what JAX programs are made of, under vk_kernels.jit and under jax.jit.

A drawn program is a list of steps; each makes one more array out of those there are. Steps are total: any step fits any
arrays. They are continuous where they meet computed floats, so that a rounding cannot become another branch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import NIGHT, PROFILE
from vulkan_devices import SELECTOR, needs_vulkan

from vk_kernels.tools.conformance.compare import check
from vk_kernels.tools.conformance.registry import PrimitiveCase, draw

pytestmark = needs_vulkan

MOST = 200  # elements of an array
TOGETHER = 3  # programs in one, whose kernels are shared
INTEGERS = np.array([3, -1, 0, 7, 3, -6], np.int32)

STEPS: dict[str, Callable[..., Any]] = {
    "sin": lambda x, y, k: jnp.sin(2 * x),
    "tanh": lambda x, y, k: jnp.tanh(x),
    "exp": lambda x, y, k: jnp.exp(-jnp.square(x)),
    "log": lambda x, y, k: jnp.log1p(jnp.abs(x)),
    "rsqrt": lambda x, y, k: x * jax.lax.rsqrt(1 + x**2),
    "pow": lambda x, y, k: (1 + x**2) ** 0.3 - 1,
    "erf": lambda x, y, k: jax.scipy.special.erf(x),
    "relu": lambda x, y, k: jax.nn.relu(x),
    "gelu": lambda x, y, k: jax.nn.gelu(x, approximate=bool(k % 2)),
    "clip": lambda x, y, k: jnp.clip(x, -0.5, 0.25 * k),
    "add": lambda x, y, k: x + like(y, x),
    "sub": lambda x, y, k: like(y, x) - 0.5 * x,
    "mul": lambda x, y, k: jnp.tanh(x * like(y, x)),
    "div": lambda x, y, k: x / (1 + like(y, x) ** 2),
    "maximum": lambda x, y, k: jnp.maximum(x, like(y, x)),
    "atan2": lambda x, y, k: jnp.arctan2(x, 1.5 + like(y, x) ** 2),
    "where": lambda x, y, k: jnp.where(jnp.arange(x.size).reshape(x.shape) % 3 == k % 3, x, like(y, x)),
    "select": lambda x, y, k: jax.lax.select_n(places(x, k) % 3, x, like(y, x), -x),
    "sum": lambda x, y, k: x.sum(axis(x, k)) / max(x.size, 1) ** 0.5,
    "mean": lambda x, y, k: x - mean(x, axis(x, k)),
    "max": lambda x, y, k: filled(x).max(axis(filled(x), k)),
    "min": lambda x, y, k: filled(x).min(),
    "logsumexp": lambda x, y, k: jax.nn.logsumexp(filled(x), axis(filled(x), k)) / 4,
    "softmax": lambda x, y, k: jax.nn.softmax(filled(x), axis(filled(x), k)),
    "standardize": lambda x, y, k: jax.nn.standardize(ranked(filled(x)), epsilon=0.1),
    "cumsum": lambda x, y, k: jnp.cumsum(ranked(x), axis(ranked(x), k)) / max(x.size, 1) ** 0.5,
    "sort": lambda x, y, k: jnp.sort(ranked(x), axis(ranked(x), k)),
    "reverse": lambda x, y, k: jnp.flip(x, axis(x, k)),
    "transpose": lambda x, y, k: x.transpose(np.roll(np.arange(x.ndim), k)),
    "flat": lambda x, y, k: x.reshape(-1),
    "expand": lambda x, y, k: jnp.broadcast_to(jnp.expand_dims(x, k % (x.ndim + 1)), spread(x, k)),
    "slice": lambda x, y, k: ranked(x)[k % 3 :],
    "stride": lambda x, y, k: ranked(x)[:: 1 + k % 3],
    "nothing": lambda x, y, k: ranked(x)[:0].sum(0),
    "pad": lambda x, y, k: jnp.pad(ranked(x), [(k % 3, k % 2)] + [(0, 0)] * (ranked(x).ndim - 1), constant_values=0.5),
    "concatenate": lambda x, y, k: jnp.concatenate([ranked(x), like(y, ranked(x)), ranked(x)[:1]]),
    "stack": lambda x, y, k: jnp.stack([x, like(y, x)], axis=k % (x.ndim + 1)),
    "tile": lambda x, y, k: jnp.tile(ranked(x), (2,) + (1,) * (ranked(x).ndim - 1)),
    "gather": lambda x, y, k: filled(ranked(x))[INTEGERS % len(filled(ranked(x)))],
    "gather out": lambda x, y, k: filled(ranked(x)).at[INTEGERS].get(mode="fill", fill_value=0.25),
    "scatter": lambda x, y, k: ranked(x).at[INTEGERS].add(rows(y, x) / 4, mode="drop"),
    "dynamic": lambda x, y, k: jax.lax.dynamic_slice_in_dim(filled(ranked(x)), jnp.int32(k - 3), 1),
    "update": lambda x, y, k: update(filled(ranked(x)), k),
    "dot": lambda x, y, k: jnp.tanh(jnp.einsum("i...,j...->ij", ranked(x), ranked(x)[::-1])),
    "product": lambda x, y, k: jnp.tensordot(ranked(x), like(y, ranked(x)), axes=1 if ranked(x).ndim == 1 else 0) / 9,
    "one hot": lambda x, y, k: jax.nn.one_hot(INTEGERS % 5, 5) @ jnp.broadcast_to(mean(x), (5,)),
    "scan": lambda x, y, k: jax.lax.scan(turn, ranked(x).sum(0) / 9, ranked(x)[:4], reverse=k > 3)[k % 2],
    "cond": lambda x, y, k: jax.lax.cond(jnp.asarray(INTEGERS)[k] > 0, jnp.sin, lambda x: like(y, x), x),
    "loop": lambda x, y, k: jax.lax.fori_loop(0, k % 4, lambda i, x: jnp.sin(x) + 0.1 * i, x),
    "map": lambda x, y, k: jax.vmap(lambda row: row - 0.3 * mean(row))(ranked(x)),
    "checkpoint": lambda x, y, k: jax.checkpoint(lambda x: jnp.sin(jnp.cos(x)))(x),
    "random": lambda x, y, k: x * jax.random.bernoulli(jax.random.key(k), 0.5, x.shape),
    "stop": lambda x, y, k: x - jax.lax.stop_gradient(0.5 * x),
    "gradient": lambda x, y, k: jax.grad(lambda x: (jnp.sin(x) * like(y, x)).sum())(x),
}


def axis(x: Any, k: int) -> int | None:
    return k % x.ndim if x.ndim else None


def mean(x: Any, axis: int | None = None) -> Any:
    """The mean, 0 of nothing. With `axis`, of length 1 there."""
    count = x.size if axis is None else x.shape[axis]
    return x.sum(axis) / max(count, 1) if axis is None else x.sum(axis, keepdims=True) / max(count, 1)


def like(y: Any, x: Any) -> Any:
    """An array of the shape of `x`, from `y`."""
    return y if y.shape == x.shape else jnp.broadcast_to(mean(y), x.shape)


def ranked(x: Any) -> Any:
    return x if x.ndim else x[None]


def filled(x: Any) -> Any:
    return x if x.size else jnp.zeros([max(n, 1) for n in x.shape])


def rows(y: Any, x: Any) -> Any:
    return jnp.broadcast_to(mean(y), (len(INTEGERS), *ranked(x).shape[1:]))


def update(x: Any, k: int) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(x, x[-1:] * 0.5, jnp.int32(k), 0)


def turn(carry: Any, row: Any) -> tuple[Any, Any]:
    return jnp.tanh(carry + row), carry * row


def places(x: Any, k: int) -> Any:
    return jnp.broadcast_to(jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape) + k, x.shape)


def spread(x: Any, k: int) -> tuple[int, ...]:
    at = k % (x.ndim + 1)
    return (*x.shape[:at], 3, *x.shape[at:])


Program = list[tuple[str, int, int, int]]


def function_of(program: Program) -> Callable[..., Any]:
    """A function of two arrays, which gives what the last steps give."""

    def run(*values: Any) -> Any:
        values = list(values)
        for name, i, j, k in program:
            made = STEPS[name](values[-1 - i % len(values)], values[-1 - j % len(values)], k)
            values.append(made if made.size <= MOST else made.reshape(-1)[: MOST // 4])
        return values[-2:]

    return run


STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5))
PROGRAMS = st.lists(st.lists(STEP, min_size=1, max_size=9), min_size=TOGETHER, max_size=TOGETHER)
SHAPES = st.lists(st.sampled_from([1, 2, 3, 5, 0, 40]), max_size=3).filter(lambda shape: math.prod(shape) <= MOST)


@settings(PROFILE, max_examples=1500 if NIGHT else 16)
@given(PROGRAMS, SHAPES, SHAPES)
def test_functions_give_what_xla_gives_and_so_do_their_gradients(programs, first, second):
    args = tuple(draw(shape, np.dtype(np.float32), i) for i, shape in enumerate((first, second)))
    cases = [PrimitiveCase("", str(program), function_of(program), args, gradient=True) for program in programs]
    wrong = check(cases, SELECTOR)
    assert not wrong, "\n".join(f"{case}: {message}" for case, message in wrong.items())


def test_every_step_fits_any_arrays():
    for name in STEPS:
        for first in ((), (1,), (0,), (3, 5), (2, 0, 3), (40,)):
            for k in range(4):
                program = function_of([(name, 0, 1, k)])
                made = jax.eval_shape(program, *(jax.ShapeDtypeStruct(s, np.float32) for s in ((2, 3), first)))
                assert all(x.dtype == np.float32 for x in made), name
