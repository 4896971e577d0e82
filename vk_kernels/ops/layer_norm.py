"""Layer normalisation over the last axis, alone and behind a residual branch with dropout."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.ops.dropout import dropout, dropout_constants
from vk_kernels.ops.launch import (
    THREADS,
    aligned,
    ceil_divide,
    dispatch,
    element,
    operands_of,
    planner,
    require_plain,
)
from vk_kernels.runtime.dispatch_plan import Array, Dispatch, Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

EPSILON = 1e-5  # GPT-2's

_MOST_STRIPS = 512  # of rows, in the backward pass: workgroups that fill a device, whose sums are soon added up
_SUM_COLUMNS = 32  # of a workgroup of layer_norm_parameters

Buffers = dict[str, int | None]  # of a kernel, by name
DropoutConstants = dict[str, int | float]


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, statistics in f32.

    Args:
      x: (..., D) f32 or bf16.
      scale: (D,) f32.
      bias: (D,) f32.

    Returns:
      (..., D) in x's dtype.

    Source: Ba et al., "Layer normalization" (2016).
    """
    return layer_norm_forward_reference(x, scale, bias, epsilon=epsilon)[0]


def residual_layer_norm(
    x: jax.Array,
    branch: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rng: jax.Array | None = None,
    *,
    dropout_rate: float = 0.0,
    stream: int = 0,
    epsilon: float = EPSILON,
) -> tuple[jax.Array, jax.Array]:
    """total = x + dropout(branch), and the layer norm of total.

    Args:
      x, branch: (..., D), one dtype, f32 or bf16.
      scale, bias, epsilon: as for `layer_norm`.
      rng, dropout_rate, stream: as for `dropout`.

    Returns:
      total and its norm, (..., D) each, in x's dtype.
    """
    return residual_layer_norm_forward_reference(
        x, branch, scale, bias, rng, dropout_rate=dropout_rate, stream=stream, epsilon=epsilon
    )[:2]


def layer_norm_forward_reference(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = EPSILON
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y, mean, rstd): `layer_norm`, and what its backward pass needs: f32, x's shape without the last axis."""
    y = x.astype(jnp.float32)
    mean = y.mean(axis=-1, keepdims=True)
    centred = y - mean
    rstd = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), x.shape) for p in (scale, bias))
    return (centred * rstd * scale + bias).astype(x.dtype), mean[..., 0], rstd[..., 0]


def layer_norm_rule(operands: Sequence[jax.Array], results: Sequence[jax.Array], **_) -> tuple[jax.Array | None, ...]:
    """The results of `layer_norm_forward_reference` that follow from others: see `make_primitive`."""
    x, scale, bias = operands
    mean, rstd = (jnp.broadcast_to(result[..., None], x.shape) for result in results[1:])
    scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), x.shape) for p in (scale, bias))
    return ((x.astype(jnp.float32) - mean) * rstd * scale + bias).astype(x.dtype), None, None


def residual_layer_norm_rule(
    operands: Sequence[jax.Array], results: Sequence[jax.Array], **_
) -> tuple[jax.Array | None, ...]:
    """The results of `residual_layer_norm_forward_reference` that follow from others: see `make_primitive`."""
    total, *of_total = results
    return None, *layer_norm_rule((total, *operands[2:4]), of_total)


def layer_norm_backward_reference(
    x: jax.Array, scale: jax.Array, mean: jax.Array, rstd: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dscale, dbias) of `layer_norm_forward_reference`; dx in x's dtype, the others (D,) f32."""
    dx, dscale, dbias = _backward_in_f32(x, scale, mean, rstd, dy)
    return dx.astype(x.dtype), dscale, dbias


def residual_layer_norm_forward_reference(
    x: jax.Array,
    branch: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rng: jax.Array | None = None,
    *,
    dropout_rate: float,
    stream: int,
    epsilon: float = EPSILON,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(total, y, mean, rstd): `residual_layer_norm`, and mean and rstd of total."""
    dropped = dropout(branch.astype(jnp.float32), rng, rate=dropout_rate, stream=stream)
    total = (x.astype(jnp.float32) + dropped).astype(x.dtype)
    return total, *layer_norm_forward_reference(total, scale, bias, epsilon=epsilon)


def residual_layer_norm_backward_reference(
    total: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
    dtotal: jax.Array,
    dy: jax.Array,
    rng: jax.Array | None = None,
    *,
    dropout_rate: float,
    stream: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dbranch, dscale, dbias), dtotal being the gradient of the first output and dy that of the second."""
    dx, dscale, dbias = _backward_in_f32(total, scale, mean, rstd, dy)
    dx = dx + dtotal.astype(jnp.float32)
    dbranch = dropout(dx, rng, rate=dropout_rate, stream=stream)
    return dx.astype(total.dtype), dbranch.astype(total.dtype), dscale, dbias


def _backward_in_f32(x, scale, mean, rstd, dy):
    mean, rstd = mean[..., None], rstd[..., None]
    normed = (x.astype(jnp.float32) - mean) * rstd
    dy = dy.astype(jnp.float32)
    dnormed = dy * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    along = (dnormed * normed).mean(axis=-1, keepdims=True)
    dx = rstd * (dnormed - dnormed.mean(axis=-1, keepdims=True) - normed * along)
    rows = tuple(range(x.ndim - 1))
    return dx, (dy * normed).sum(axis=rows), dy.sum(axis=rows)


@planner
def plan_layer_norm_forward(
    info: "DeviceInfo",
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *,
    epsilon: float = EPSILON,
    variant: str | None = None,
) -> Plan:
    """inputs: x, scale, bias; outputs: y, mean, rstd. See `layer_norm_forward_reference`."""
    require_plain(variant)
    (x, scale, bias), (y, mean, rstd), _ = operands_of(inputs, outputs)
    buffers = {"input": x, "scale": scale, "bias": bias, "y": y, "mean": mean, "rstd": rstd}
    return _plan_forward(element(inputs[x]), inputs[x], dropout_constants(0.0, 0), epsilon, buffers)


@planner
def plan_residual_layer_norm_forward(
    info: "DeviceInfo",
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *,
    dropout_rate: float,
    stream: int,
    epsilon: float = EPSILON,
    variant: str | None = None,
) -> Plan:
    """inputs: x, branch, scale, bias and, for dropout, rng; outputs: total, y, mean, rstd.

    See `residual_layer_norm_forward_reference`.
    """
    require_plain(variant)
    (x, branch, scale, bias, *rng), (total, y, mean, rstd), _ = operands_of(inputs, outputs)
    rng, drawing = _drawing(rng, dropout_rate, stream)
    buffers = {"input": x, "scale": scale, "bias": bias, "y": y, "mean": mean, "rstd": rstd}
    buffers |= {"branch": branch, "rng": rng, "sum": total}
    return _plan_forward(f"residual_{element(inputs[x])}", inputs[x], drawing, epsilon, buffers)


@planner
def plan_layer_norm_backward(
    info: "DeviceInfo", inputs: Sequence[Array], outputs: Sequence[Array], *, variant: str | None = None
) -> Plan:
    """inputs: x, scale, mean, rstd, dy; outputs: dx, dscale, dbias. See `layer_norm_backward_reference`."""
    require_plain(variant)
    (x, scale, mean, rstd, dy), (dx, dscale, dbias), scratch = operands_of(inputs, outputs)
    buffers = {"x": x, "scale": scale, "mean": mean, "rstd": rstd, "dy": dy, "dx": dx}
    drawing = dropout_constants(0.0, 0)
    return _plan_backward(element(inputs[x]), inputs[x], drawing, buffers, dscale, dbias, scratch)


@planner
def plan_residual_layer_norm_backward(
    info: "DeviceInfo",
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *,
    dropout_rate: float,
    stream: int,
    variant: str | None = None,
) -> Plan:
    """inputs: total, scale, mean, rstd, dtotal, dy and, for dropout, rng; outputs: dx, dbranch, dscale, dbias.

    See `residual_layer_norm_backward_reference`.
    """
    require_plain(variant)
    (total, scale, mean, rstd, dtotal, dy, *rng), outs, scratch = operands_of(inputs, outputs)
    dx, dbranch, dscale, dbias = outs
    rng, drawing = _drawing(rng, dropout_rate, stream)
    buffers = {"x": total, "scale": scale, "mean": mean, "rstd": rstd, "dy": dy, "dx": dx}
    buffers |= {"direct": dtotal, "rng": rng, "dbranch": dbranch}
    return _plan_backward(f"residual_{element(inputs[total])}", inputs[total], drawing, buffers, dscale, dbias, scratch)


def _drawing(rng: list[int], rate: float, stream: int) -> tuple[int | None, DropoutConstants]:
    """The rng, if there is one, and the constants of dropout, of none without it."""
    return (rng[0], dropout_constants(rate, stream)) if rng else (None, dropout_constants(0.0, 0))


def _rows_and_columns(x: Array) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


def _rows_at_once(x: Array) -> int:
    """Rows that a workgroup has threads for: one for 8 columns, a power of two for each row."""
    return THREADS // min(THREADS, 1 << (ceil_divide(x.shape[-1], 8) - 1).bit_length())


def _dispatch(
    kernel: str, variant: str, x: Array, strip_rows: int, dropout: DropoutConstants, epsilon: float, buffers: Buffers
) -> Dispatch:
    """One workgroup for each strip of rows."""
    rows, columns = _rows_and_columns(x)
    return dispatch(
        kernel,
        variant,
        max(1, ceil_divide(rows, strip_rows)),
        constants={
            "rows": rows,
            "columns": columns,
            "strip_rows": strip_rows,
            "epsilon": epsilon,
            "dropout": dropout,
        },
        spec={"ROW_THREADS": THREADS // _rows_at_once(x), "ALIGNED": aligned(columns)},
        **buffers,
    )


def _plan_forward(variant: str, x: Array, dropout: DropoutConstants, epsilon: float, buffers: Buffers) -> Plan:
    if x.size == 0:
        return Plan(())
    return Plan((_dispatch("layer_norm", variant, x, _rows_at_once(x), dropout, epsilon, buffers),))


def _plan_backward(
    variant: str, x: Array, dropout: DropoutConstants, buffers: Buffers, dscale: int, dbias: int, scratch: int
) -> Plan:
    """buffers: of the kernel, but for dscale and dbias, which are sums over strips of rows first."""
    rows, columns = _rows_and_columns(x)
    if columns == 0:
        return Plan(())
    at_once = _rows_at_once(x)
    strip_rows = max(1, ceil_divide(rows, at_once * _MOST_STRIPS)) * at_once
    strips = max(1, ceil_divide(rows, strip_rows))
    scale_parts, bias_parts = (dscale, dbias) if strips == 1 else (scratch, scratch + 1)
    buffers = {**buffers, "dscale": scale_parts, "dbias": bias_parts}
    first = _dispatch("layer_norm_backward", variant, x, strip_rows, dropout, 0.0, buffers)
    if strips == 1:
        return Plan((first,))
    last = dispatch(
        "layer_norm_parameters",
        "",
        2 * ceil_divide(columns, _SUM_COLUMNS),
        constants={"rows": strips, "columns": columns},
        spec={"ALIGNED": aligned(columns)},
        scale_parts=scale_parts,
        bias_parts=bias_parts,
        dscale=dscale,
        dbias=dbias,
    )
    return Plan((first, last), (4 * strips * columns,) * 2)
