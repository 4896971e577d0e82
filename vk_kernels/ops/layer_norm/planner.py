"""Plans of layer normalisation."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vk_kernels.ops.dropout import dropout_constants
from vk_kernels.ops.layer_norm.reference import EPSILON
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
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_MOST_STRIPS = 512  # of rows, in the backward pass: workgroups that fill a device, whose sums are soon added up
_SUM_COLUMNS = 32  # of a workgroup of layer_norm_parameters
Buffers = dict[str, int | None]  # of a kernel, by name
DropoutConstants = dict[str, int | float]


@planner
def plan_layer_norm_forward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    epsilon: float = EPSILON,
    variant: str | None = None,
) -> Plan:
    """inputs: x, scale, bias; outputs: y, mean, rstd. See `layer_norm_forward_reference`."""
    require_plain(variant)
    (x, scale, bias), (y, mean, rstd), _ = operands_of(inputs, outputs)
    buffers = {"input": x, "scale": scale, "bias": bias, "y": y, "mean": mean, "rstd": rstd}
    return _plan_forward(dtype_suffix(inputs[x]), inputs[x], dropout_constants(0.0, 0), epsilon, buffers)


@planner
def plan_residual_layer_norm_forward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    dropout_rate: float,
    site: int,
    epsilon: float = EPSILON,
    variant: str | None = None,
) -> Plan:
    """inputs: x, branch, scale, bias and, for dropout, rng; outputs: total, y, mean, rstd.

    See `residual_layer_norm_forward_reference`.
    """
    require_plain(variant)
    (x, branch, scale, bias, *rng), (total, y, mean, rstd), _ = operands_of(inputs, outputs)
    rng, drawing = _dropout_arguments(rng, dropout_rate, site)
    buffers = {"input": x, "scale": scale, "bias": bias, "y": y, "mean": mean, "rstd": rstd}
    buffers |= {"branch": branch, "rng": rng, "sum": total}
    return _plan_forward(f"residual_{dtype_suffix(inputs[x])}", inputs[x], drawing, epsilon, buffers)


@planner
def plan_layer_norm_backward(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: x, scale, mean, rstd, dy; outputs: dx, dscale, dbias. See `layer_norm_backward_reference`."""
    require_plain(variant)
    (x, scale, mean, rstd, dy), (dx, dscale, dbias), scratch = operands_of(inputs, outputs)
    buffers = {"x": x, "scale": scale, "mean": mean, "rstd": rstd, "dy": dy, "dx": dx}
    drawing = dropout_constants(0.0, 0)
    return _plan_backward(dtype_suffix(inputs[x]), inputs[x], drawing, buffers, dscale, dbias, scratch)


@planner
def plan_residual_layer_norm_backward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    dropout_rate: float,
    site: int,
    variant: str | None = None,
) -> Plan:
    """inputs: total, scale, mean, rstd, dtotal, dy and, for dropout, rng; outputs: dx, dbranch, dscale, dbias.

    See `residual_layer_norm_backward_reference`.
    """
    require_plain(variant)
    (total, scale, mean, rstd, dtotal, dy, *rng), outs, scratch = operands_of(inputs, outputs)
    dx, dbranch, dscale, dbias = outs
    rng, drawing = _dropout_arguments(rng, dropout_rate, site)
    buffers = {"x": total, "scale": scale, "mean": mean, "rstd": rstd, "dy": dy, "dx": dx}
    buffers |= {"direct": dtotal, "rng": rng, "dbranch": dbranch}
    return _plan_backward(
        f"residual_{dtype_suffix(inputs[total])}", inputs[total], drawing, buffers, dscale, dbias, scratch
    )


def _dropout_arguments(rng: list[int], rate: float, site: int) -> tuple[int | None, DropoutConstants]:
    """The rng, if there is one, and the constants of dropout, of none without it."""
    return (rng[0], dropout_constants(rate, site)) if rng else (None, dropout_constants(0.0, 0))


def _rows_and_columns(x: ArraySpec) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


def _rows_at_once(x: ArraySpec) -> int:
    """Rows that a workgroup has threads for: one for 8 columns, a power of two for each row."""
    return THREADS // min(THREADS, 1 << (ceil_divide(x.shape[-1], 8) - 1).bit_length())


def _dispatch(
    kernel: str,
    variant: str,
    x: ArraySpec,
    strip_rows: int,
    dropout: DropoutConstants,
    epsilon: float,
    buffers: Buffers,
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


def _plan_forward(variant: str, x: ArraySpec, dropout: DropoutConstants, epsilon: float, buffers: Buffers) -> Plan:
    if x.size == 0:
        return Plan(())
    return Plan((_dispatch("layer_norm", variant, x, _rows_at_once(x), dropout, epsilon, buffers),))


def _plan_backward(
    variant: str, x: ArraySpec, dropout: DropoutConstants, buffers: Buffers, dscale: int, dbias: int, scratch: int
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
