"""GELU in the tanh form that GPT-2 uses."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp
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
from vk_kernels.ops.public import public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_forward_reference(x: jax.Array) -> jax.Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), computed in f32; any shape, same dtype out.

    Source: Hendrycks and Gimpel, "Gaussian error linear units" (2016), section 2.
    """
    y = x.astype(jnp.float32)
    inner = _SLOPE * (y + _CUBIC * y * y * y)
    return (0.5 * y * (1 + jnp.tanh(inner))).astype(x.dtype)


def gelu_backward_reference(x: jax.Array, dy: jax.Array) -> jax.Array:
    """dx = dy gelu'(x), computed in f32; arguments and result of one shape and dtype."""
    y = x.astype(jnp.float32)
    t = jnp.tanh(_SLOPE * (y + _CUBIC * y * y * y))
    slope = 0.5 * (1 + t) + 0.5 * y * (1 - t * t) * _SLOPE * (1 + 3 * _CUBIC * y * y)
    return (dy.astype(jnp.float32) * slope).astype(x.dtype)


@planner
def plan_gelu_forward(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: x; outputs: y. See `gelu`."""
    (x,), (y,), _ = operands_of(inputs, outputs)
    return _plan("gelu_forward", inputs[x], variant, x=x, result=y)


@planner
def plan_gelu_backward(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: x, dy; outputs: dx. See `gelu_backward_reference`."""
    (x, dy), (dx,), _ = operands_of(inputs, outputs)
    return _plan("gelu_backward", inputs[x], variant, x=x, dy=dy, result=dx)


def _plan(kernel: str, array: ArraySpec, variant: str | None, **buffers: int) -> Plan:
    require_plain(variant)
    size = array.size
    if size == 0:
        return Plan(())
    groups, spec = ceil_divide(size, 8 * THREADS), {"ALIGNED": aligned(size)}
    return Plan((dispatch(kernel, dtype_suffix(array), groups, constants={"count": size}, spec=spec, **buffers),))


_gelu_backward = make_primitive(
    "gelu_backward",
    gelu_backward_reference,
    KernelOp(plan_gelu_backward, batch_axes=lambda: (True, True)),
)

_gelu_operation = make_differentiable(
    make_primitive("gelu", gelu_forward_reference, KernelOp(plan_gelu_forward, batch_axes=lambda: (True,))),
    lambda target, operands, results, cotangents: _gelu_backward.bind(*operands, *cotangents, target=target),
)


@public(gelu_forward_reference)
def gelu(target, x):
    (y,) = _gelu_operation(target, x.reshape(-1))
    return y.reshape(x.shape)
