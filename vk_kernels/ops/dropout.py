"""Dropout with recomputable, implementation-independent bits."""

import math

import jax
import jax.numpy as jnp

from vk_kernels.ops.philox import BITS_PER_DRAW, random_uint16


def dropout_threshold(rate: float) -> int:
    """Elements whose 16 bits fall below this are dropped: the rate in units of 1/65536.

    Raises:
      ValueError: rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must be in [0, 1), found {rate}")
    return min(round(rate * 2**BITS_PER_DRAW), 2**BITS_PER_DRAW - 1)


def dropout_scale(rate: float) -> float:
    """What kept elements are multiplied by: the inverse of the exact probability of being kept."""
    return 2**BITS_PER_DRAW / (2**BITS_PER_DRAW - dropout_threshold(rate))


def dropout_mask(rng: jax.Array, stream: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Which elements are kept: bool of `shape`.

    The last axis is the column, the one before it the row, all others the batch of the logical grid of
    `random_uint16`; a missing axis has size 1.
    """
    rows, columns = (1, 1, *shape)[-2:]
    bits = random_uint16(rng, stream, (math.prod(shape[:-2]), rows, columns))
    return (bits >= jnp.uint32(dropout_threshold(rate))).reshape(shape)


def dropout(x: jax.Array, rng: jax.Array | None, *, rate: float, stream: int) -> jax.Array:
    """Zero each element with probability `rate` and scale the others so that the mean stays.

    Args:
      x: any shape, floating.
      rng: uint32 (2,): seed and step. None leaves x as it is.
      rate: in [0, 1); rounded to a multiple of 1/65536.
      stream: tells apart the places that draw from one rng.

    Raises:
      ValueError: rate is not in [0, 1).

    Source: Srivastava et al., "Dropout" (JMLR 2014), in the inverted form.
    """
    if rng is None or dropout_threshold(rate) == 0:
        return x
    # A (B, T, D) activation is one grid of B * T rows, as it is to the matrix product before it.
    grid = x.shape if x.ndim < 2 else (math.prod(x.shape[:-1]), x.shape[-1])
    mask = dropout_mask(rng, stream, rate, grid).reshape(x.shape)
    return jnp.where(mask, x * jnp.asarray(dropout_scale(rate), x.dtype), jnp.zeros((), x.dtype))
