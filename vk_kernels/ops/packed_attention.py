"""Causal self-attention of queries, keys and values that stand in one array, as the product that makes them left them.

Nothing is taken apart or put together: the kernels of `attention` read q, k and v, and write their gradients, in place.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from vk_kernels.ops.attention import (
    attention_backward_reference,
    attention_forward_reference,
    packed,
    plan_attention_backward,
    plan_attention_forward,
)
from vk_kernels.ops.launch import planner
from vk_kernels.runtime.dispatch_plan import Array, Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


def packed_attention(
    qkv: jax.Array,
    rng: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    stream: int = 0,
) -> jax.Array:
    """`attention` of q, k and v, which are qkv[:, :, 0], qkv[:, :, 1] and qkv[:, :, 2].

    Args:
      qkv: (B, T, 3, H, D), a floating dtype.
      rng, scale, cap, dropout_rate, stream: as for `attention`.

    Returns:
      (B, T, H, D) in qkv's dtype.
    """
    parameters = {"scale": scale, "cap": cap, "dropout_rate": dropout_rate, "stream": stream}
    return packed_attention_forward_reference(qkv, rng, **parameters)[0]


def packed_attention_forward_reference(
    qkv: jax.Array, rng: jax.Array | None = None, **parameters: Any
) -> tuple[jax.Array, jax.Array]:
    """What `packed_attention` returns, and the log of each query's sum of exp(score): f32 (B, H, T)."""
    return attention_forward_reference(*jnp.moveaxis(qkv, 2, 0), rng, **parameters)


def packed_attention_backward_reference(
    qkv: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    rng: jax.Array | None = None,
    **parameters: Any,
) -> jax.Array:
    """The gradient of qkv, in its dtype; see `attention_backward_reference`."""
    gradients = attention_backward_reference(*jnp.moveaxis(qkv, 2, 0), out, lse, d_out, rng, **parameters)
    return jnp.stack(gradients, axis=2)


@planner
def plan_packed_attention_forward(
    info: "DeviceInfo", inputs: Sequence[Array], outputs: Sequence[Array], **options: Any
) -> Plan:
    """inputs: qkv and, for dropout, rng; outputs: out, lse. options and what is raised: as `plan_attention_forward`."""
    qkv, *rest = inputs
    one = _one(qkv)
    plan = plan_attention_forward(info, [one] * 3 + rest, outputs, views=packed(one.shape), **options)
    return _with_operands(plan, (0, 0, 0, *range(1, len(inputs) + len(outputs))))


@planner
def plan_packed_attention_backward(
    info: "DeviceInfo", inputs: Sequence[Array], outputs: Sequence[Array], **options: Any
) -> Plan:
    """inputs: qkv, out, lse, d_out and, for dropout, rng; outputs: dqkv. Otherwise as `plan_attention_backward`."""
    qkv, *rest = inputs
    one, dqkv = _one(qkv), len(inputs)
    plan = plan_attention_backward(info, [one] * 3 + rest, [one] * 3, views=packed(one.shape), **options)
    return _with_operands(plan, (0, 0, 0, *range(1, len(inputs)), dqkv, dqkv, dqkv))


def _one(qkv: Array) -> Array:
    """Like q, k or v."""
    batch, length, _, heads, head_dim = qkv.shape
    return Array((batch, length, heads, head_dim), qkv.dtype)


def _with_operands(plan: Plan, places: Sequence[int]) -> Plan:
    """The plan with the operands' other places; scratch follows the last of them."""
    gone = len(places) - 1 - max(places)

    def place(i: int) -> int:
        return places[i] if i < len(places) else i - gone

    return replace(
        plan,
        dispatches=tuple(replace(one, operands=tuple(map(place, one.operands))) for one in plan.dispatches),
    )
