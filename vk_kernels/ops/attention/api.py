"""Causal self-attention with a soft cap and dropout on the weights, of three arrays or of one that holds all three."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp, Planner
from vk_kernels.ops.attention.planner import (
    backward_flops,
    forward_flops,
    plan_attention_backward,
    plan_attention_forward,
    plan_packed_attention_backward,
    plan_packed_attention_forward,
)
from vk_kernels.ops.attention.reference import (
    attention_backward_reference,
    attention_forward_reference,
    attention_reference,
    default_scale,
    packed_attention_backward_reference,
    packed_attention_forward_reference,
    packed_attention_reference,
)
from vk_kernels.ops.dropout import drawing_of
from vk_kernels.ops.public import check_arrays, present, public


def _kernel_op(planner: Planner, flops: Callable[[Sequence[int]], int], operands: int) -> KernelOp:
    """An op whose first operand says its FLOPs; without dropout, all of its `operands` carry a batch."""
    return KernelOp(
        planner,
        batch_axes=lambda dropout_rate, **_: None if dropout_rate else (True,) * operands,
        flops=lambda node: flops(node.inputs[0].shape),
        shapeless=("dropout_rate", "site"),
    )


_attention_backward = make_primitive(
    "attention_backward",
    attention_backward_reference,
    _kernel_op(plan_attention_backward, backward_flops, operands=6),
)


def _attention_gradients(target, operands, results, cotangents, **parameters):
    *qkv, rng = operands
    reads = present(*qkv, *results, *cotangents, rng)
    return *_attention_backward.bind(*reads, target=target, **parameters), None


_attention_operation = make_differentiable(
    make_primitive(
        "attention",
        attention_forward_reference,
        _kernel_op(plan_attention_forward, forward_flops, operands=3),
    ),
    _attention_gradients,
)


def _scoring(head_dim, scale, cap, rng, dropout_rate, site):
    """(rng, the parameters of the primitives)."""
    rng, dropout_rate, site = drawing_of(rng, dropout_rate, site)
    scale = default_scale(head_dim) if scale is None else float(scale)
    cap = None if cap is None else float(cap)
    return rng, {"scale": scale, "cap": cap, "dropout_rate": dropout_rate, "site": site}


@public(attention_reference)
def attention(target, q, k, v, rng=None, *, scale=None, cap=None, dropout_rate=0.0, site=0):
    if q.ndim != 4:
        raise ValueError(f"attention: q must be (B, T, H, D), found {q.shape}")
    rng, parameters = _scoring(q.shape[-1], scale, cap, rng, dropout_rate, site)
    check_arrays("attention", k=(k, q.shape, q.dtype), v=(v, q.shape, q.dtype), rng=(rng, (2,), jnp.uint32))
    return _attention_operation(target, q, k, v, rng, **parameters)[0]


_packed_attention_backward = make_primitive(
    "packed_attention_backward",
    packed_attention_backward_reference,
    _kernel_op(plan_packed_attention_backward, backward_flops, operands=4),
)


def _packed_attention_gradients(target, operands, results, cotangents, **parameters):
    qkv, rng = operands
    return *_packed_attention_backward.bind(
        *present(qkv, *results, *cotangents, rng), target=target, **parameters
    ), None


_packed_attention_operation = make_differentiable(
    make_primitive(
        "packed_attention",
        packed_attention_forward_reference,
        _kernel_op(plan_packed_attention_forward, forward_flops, operands=1),
    ),
    _packed_attention_gradients,
)


@public(packed_attention_reference)
def packed_attention(target, qkv, rng=None, *, scale=None, cap=None, dropout_rate=0.0, site=0):
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"packed_attention: qkv must be (B, T, 3, H, D), found {qkv.shape}")
    rng, parameters = _scoring(qkv.shape[-1], scale, cap, rng, dropout_rate, site)
    check_arrays("packed_attention", rng=(rng, (2,), jnp.uint32))
    return _packed_attention_operation(target, qkv, rng, **parameters)[0]
