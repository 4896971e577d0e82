"""Dropout with recomputable, implementation-independent bits."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.philox import BITS_PER_DRAW, SITES, random_uint16, split_site
from vk_kernels.ops.planning import (
    THREADS,
    aligned,
    ceil_divide,
    dispatch,
    dtype_suffix,
    operands_of,
    planner,
    require_plain,
)
from vk_kernels.ops.public import as_rows, check_arrays, public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


def dropout_threshold(rate: float) -> int:
    """Elements whose 16 bits fall below this are dropped: the rate in units of 1/65536.

    Raises:
      ValueError: rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must be in [0, 1), found {rate}")
    return min(round(rate * 2**BITS_PER_DRAW), 2**BITS_PER_DRAW - 1)


def dropout_scale(rate: float) -> float:
    """The factor of kept elements: the inverse of the exact probability of being kept."""
    return 2**BITS_PER_DRAW / (2**BITS_PER_DRAW - dropout_threshold(rate))


def dropout_mask(rng: jax.Array, site: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """The elements that are kept: bool of `shape`.

    The last axis is the column, the one before it the row, all others the batch of the logical grid of
    `random_uint16`; a missing axis has size 1. The first row that a site gives (`site_at`) is of the axis before the
    column where that is all, else of the batch.
    """
    rows, columns = (1, 1, *shape)[-2:]
    site, first = split_site(site)
    bits = random_uint16(
        rng, site, (math.prod(shape[:-2]), rows, columns), (first, 0) if len(shape) > 2 else (0, first)
    )
    return (bits >= jnp.uint32(dropout_threshold(rate))).reshape(shape)


def dropout_forward_reference(x: jax.Array, rng: jax.Array | None, *, rate: float, site: int) -> jax.Array:
    """Zero each element with probability `rate` and scale the others, in f32, so that the mean stays.

    Args:
      x: any shape, floating.
      rng: a JAX key, or uint32 (2,), as a raw key or seed and step. None leaves x as it is.
      rate: in [0, 1); rounded to a multiple of 1/65536.
      site: tells apart the places that draw from one rng; `philox.site_at` gives that of a part of a larger array.

    Raises:
      ValueError: rate is not in [0, 1).

    Source: Srivastava et al., "Dropout" (JMLR 2014), in the inverted form.
    """
    if rng is None or dropout_threshold(rate) == 0:
        return x
    # A (B, T, D) activation is one grid of B * T rows, as it is to the matrix product before it.
    mask = dropout_mask(rng, site, rate, _grid(x.shape)).reshape(x.shape)
    scaled = x.astype(jnp.float32) * jnp.float32(dropout_scale(rate))
    return jnp.where(mask, scaled, jnp.float32(0)).astype(x.dtype)


def dropout_backward_reference(dy: jax.Array, rng: jax.Array, *, rate: float, site: int) -> jax.Array:
    """dx: the same function of dy as y is of x."""
    return dropout_forward_reference(dy, rng, rate=rate, site=site)


def dropout_constants(rate: float, site: int) -> dict[str, int | float]:
    """The push constants of shaders/common/elementwise.slang's Dropout."""
    stream, first = split_site(site)
    return {"stream": stream, "first": first, "threshold": dropout_threshold(rate), "scale": dropout_scale(rate)}


@planner
def plan_dropout_forward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    rate: float,
    site: int,
    variant: str | None = None,
) -> Plan:
    """inputs: x, rng; outputs: y. See `dropout`. In the backward pass: dy, rng; dx."""
    require_plain(variant)
    (x, rng), (y,), _ = operands_of(inputs, outputs)
    if inputs[x].size == 0:
        return Plan(())
    rows, columns = _grid(inputs[x].shape)
    run = dispatch(
        "dropout",
        dtype_suffix(inputs[x]),
        ceil_divide(rows * ceil_divide(columns, 8), THREADS),
        constants={"rows": rows, "columns": columns, "dropout": dropout_constants(rate, site)},
        spec={"ALIGNED": aligned(columns)},
        x=x,
        rng=rng,
        y=y,
    )
    return Plan((run,))


plan_dropout_backward = plan_dropout_forward


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of the mask of an array."""
    return math.prod(shape[:-1]), math.prod(shape[-1:])


def drawing_of(rng: jax.Array | None, rate: float, site: int) -> tuple[jax.Array | None, float, int]:
    """(rng, rate, site) of a dropout; without one, the same three whatever was given.

    Raises ValueError for a rate outside [0, 1) or a site that `site_at` does not give.
    """
    if rng is None or dropout_threshold(rate) == 0:
        return None, 0.0, 0
    if not 0 <= site < SITES**2:
        raise ValueError(f"dropout site must be in [0, 2**64), found {site}")
    return rng, float(rate), int(site)


_dropout_backward = make_primitive(
    "dropout_backward",
    dropout_backward_reference,
    KernelOp(plan_dropout_backward, shapeless=("rate", "site")),
)


def _dropout_gradients(target, operands, results, cotangents, **drawing):
    _, rng = operands
    return *_dropout_backward.bind(*cotangents, rng, target=target, **drawing), None


_dropout_operation = make_differentiable(
    make_primitive("dropout", dropout_forward_reference, KernelOp(plan_dropout_forward, shapeless=("rate", "site"))),
    _dropout_gradients,
)


@public(dropout_forward_reference)
def dropout(target, x, rng, *, rate, site):
    rng, rate, site = drawing_of(rng, rate, site)
    if rng is None:
        return x
    check_arrays("dropout", rng=(rng, (2,), jnp.uint32))
    rows = as_rows(x) if x.ndim else x.reshape(1, 1)
    (y,) = _dropout_operation(target, rows, rng, rate=rate, site=site)
    return y.reshape(x.shape)
