"""Zeros, infinities, NaN and subnormal numbers through vk_kernels.jit: what drivers do algebra with."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels

pytestmark = needs_vulkan

VALUES = np.array([0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan, 8e37, 2.0**-126], np.float32)


def same(found, expected, what=""):
    """NaN, infinities and the signs of zeros too. A quotient may round otherwise: XLA divides by a reciprocal."""
    found, expected = (np.asarray(x).astype(np.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0, err_msg=what)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]), f"sign: {what}")


ALGEBRA = {
    "y / 0": lambda y: y / 0.0,
    "y / -0": lambda y: y / -0.0,
    "y / inf": lambda y: y / np.inf,
    "0 / y": lambda y: 0.0 / y,
    "y * 0": lambda y: y * 0.0,
    "y * 1": lambda y: y * 1.0,
    "y + 0 p": lambda y: y + 0.0 * y[::-1],
    "0 - y": lambda y: 0.0 - y,
    "1 / (0 - y)": lambda y: 1.0 / (0.0 - y),
    "y - y": lambda y: y - y,
    "y / y": lambda y: y / y,
    "y / 2 y": lambda y: y / (y * 2.0),
    "3 y / y": lambda y: (y * 3.0) / y,
    "inf - y": lambda y: np.inf - y,
    "y * inf": lambda y: y * np.inf,
    "where": lambda y: jnp.where(y > 0, y / 0.0, 1.0),
    "where, then times": lambda y: jnp.where(y > 0, 0.0, y) * y[::-1],
    "times a condition": lambda y: (y > 0).astype(y.dtype) * y[::-1],
    "times iota": lambda y: y * lax.broadcasted_iota(y.dtype, (1, y.size), 0)[0],
    "times a filled array": lambda y: y * jnp.zeros_like(y),
    "times a converted one": lambda y: y * jnp.zeros(y.shape, np.int32).astype(y.dtype),
    "atan2(y, 0)": lambda y: jnp.arctan2(y, 0.0),
    "atan2(0, y)": lambda y: jnp.arctan2(0.0, y),
    "rem 0": lambda y: lax.rem(y, jnp.zeros((), y.dtype)),
    "rem of 0": lambda y: lax.rem(jnp.zeros((), y.dtype), y),
    "pow 0": lambda y: lax.pow(y, jnp.zeros((), y.dtype)),
    "0 to the": lambda y: lax.pow(jnp.zeros((), y.dtype), y),
    "max 0": lambda y: jnp.maximum(y, 0.0),
    "max -0": lambda y: jnp.maximum(y, -0.0),
    "min 0": lambda y: jnp.minimum(0.0, y),
    "equal to itself": lambda y: (y == y).astype(y.dtype),
    "at most infinite": lambda y: (y <= np.inf).astype(y.dtype),
    "inverse": lambda y: lax.integer_pow(y, -1),
    "y / -0, negated here": lambda y: y / -jnp.zeros_like(y),
    "y / 0, the greater": lambda y: y / jnp.maximum(jnp.zeros_like(y), jnp.zeros_like(y)),
    "y / 0, selected": lambda y: y / jnp.where(y[::-1] > 1, jnp.zeros_like(y), jnp.zeros_like(y)),
    "0 / 0": lambda y: jnp.zeros_like(y) / jnp.zeros_like(y),
    "inf - inf": lambda y: jnp.full_like(y, np.inf) - jnp.full_like(y, np.inf),
    "of literals": lambda y: (lax.log(0.0 * jnp.ones_like(y)), lax.rsqrt(jnp.zeros_like(y)), -1.0 / jnp.zeros_like(y)),
}


def test_the_mean_of_nothing_is_nan():
    x = np.ones((3, 4), np.float32)
    assert np.isnan(np.asarray(vk_kernels.jit(lambda x: jnp.mean(x[:, :0], axis=1), device=SELECTOR)(x))).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda t: np.dtype(t).name)
def test_no_algebra_with_special_values(dtype):
    values = VALUES[: 10 if dtype == np.float32 else 8].astype(dtype)

    found = vk_kernels.jit(lambda y: {name: fn(y) for name, fn in ALGEBRA.items()}, device=SELECTOR)(values)
    for name, fn in ALGEBRA.items():  # one primitive after another, so that XLA does no algebra either
        for x, y in zip(jax.tree.leaves(found[name]), jax.tree.leaves(fn(jnp.asarray(values))), strict=True):
            same(x, y, name)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda t: np.dtype(t).name)
def test_precision_is_reduced_to_any_number_of_bits(dtype):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 3000, np.uint32)
    with np.errstate(all="ignore"):
        edges = np.ldexp(rng.uniform(0.5, 1, 900), np.arange(-150, 150).repeat(3)).astype(np.float32)
        x = np.concatenate([words.view(np.float32), edges, -edges, VALUES, [1e-7, -1e-7]]).astype(dtype)
    pairs = list(itertools.product((1, 2, 3, 4, 5, 6, 7, 8), (0, 1, 3, 7, 9, 10, 22)))

    def program(x):
        return [lax.reduce_precision(x, exponent, mantissa) for exponent, mantissa in pairs]

    found, expected = vk_kernels.jit(program, device=SELECTOR)(x), jax.jit(program)(x)
    for pair, a, b in zip(pairs, found, expected, strict=True):
        if pair[1] == 0:  # where no mantissa is left, the emitter of XLA that tests compile with makes infinity of NaN
            b = np.where(np.isnan(x), x, b)
        same(a, b, str(pair))


INTEGERS = [np.int32, np.int8, np.int16, np.uint32, np.uint8, np.uint16]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda t: np.dtype(t).name)
def test_integers_divided_by_literals(dtype):
    limits = np.iinfo(dtype)
    x = np.array([0, 1, 2, 7, limits.max, limits.min, limits.max - 1, limits.min + 1, 100], dtype)
    literals = sorted({0, 1, 2, 7, limits.max, limits.min, *((-1, -2) if limits.min else ())})

    def program(x):
        found = []
        for literal, op in itertools.product(literals, (lax.div, lax.rem)):
            c = np.asarray(literal, dtype)
            found += [op(x, c), op(c, x), op(x, jnp.full_like(x, literal)), op(jnp.full_like(x, literal), x)]
        for amount in (0, 1, limits.bits - 1, limits.bits, limits.bits + 1, limits.max):
            for op in (lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic):
                found += [op(x, np.asarray(amount, dtype)), op(np.asarray(amount, dtype), x)]
        return found, functools.reduce(jnp.bitwise_xor, [x // c for c in np.asarray(literals, dtype)])

    found, expected = vk_kernels.jit(program, device=SELECTOR)(x), jax.jit(program)(x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
