"""Layer normalisation over the last axis, alone and behind a residual branch with dropout."""

import jax.numpy as jnp

from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.dropout import drawing_of
from vk_kernels.ops.layer_norm.planner import (
    plan_layer_norm_backward,
    plan_layer_norm_forward,
    plan_residual_layer_norm_backward,
    plan_residual_layer_norm_forward,
)
from vk_kernels.ops.layer_norm.reference import (
    EPSILON,
    layer_norm_backward_reference,
    layer_norm_forward_reference,
    layer_norm_reference,
    layer_norm_rule,
    residual_layer_norm_backward_reference,
    residual_layer_norm_forward_reference,
    residual_layer_norm_reference,
    residual_layer_norm_rule,
)
from vk_kernels.ops.public import as_rows, check_arrays, present, public

_layer_norm_backward = make_primitive(
    "layer_norm_backward", layer_norm_backward_reference, KernelOp(plan_layer_norm_backward)
)


def _layer_norm_gradients(target, operands, results, cotangents, epsilon):
    x, scale, _ = operands
    _, mean, rstd = results
    return _layer_norm_backward.bind(x, scale, mean, rstd, *cotangents, target=target)


_layer_norm_operation = make_differentiable(
    make_primitive(
        "layer_norm",
        layer_norm_forward_reference,
        KernelOp(
            plan_layer_norm_forward,
            batch_axes=lambda epsilon: (True, False, False),
            rematerialize=layer_norm_rule,
        ),
    ),
    _layer_norm_gradients,
)


@public(layer_norm_reference)
def layer_norm(target, x, scale, bias, *, epsilon=EPSILON):
    scale, bias = _scale_and_bias("layer_norm", x, scale, bias)
    (y,) = _layer_norm_operation(target, as_rows(x), scale, bias, epsilon=float(epsilon))
    return y.reshape(x.shape)


def _scale_and_bias(operation, x, scale, bias):
    scale, bias = (jnp.asarray(p, jnp.float32) for p in (scale, bias))
    columns = x.shape[-1:]
    check_arrays(operation, scale=(scale, columns, jnp.float32), bias=(bias, columns, jnp.float32))
    return scale, bias


_residual_layer_norm_backward = make_primitive(
    "residual_layer_norm_backward",
    residual_layer_norm_backward_reference,
    KernelOp(plan_residual_layer_norm_backward, shapeless=("dropout_rate", "site")),
)


def _residual_layer_norm_gradients(target, operands, results, cotangents, epsilon, **drawing):
    _, _, scale, _, rng = operands
    total, _, mean, rstd = results
    reads = present(total, scale, mean, rstd, *cotangents, rng)
    return *_residual_layer_norm_backward.bind(*reads, target=target, **drawing), None


_residual_layer_norm_operation = make_differentiable(
    make_primitive(
        "residual_layer_norm",
        residual_layer_norm_forward_reference,
        KernelOp(
            plan_residual_layer_norm_forward,
            batch_axes=lambda epsilon, dropout_rate, site: None if dropout_rate else (True, True, False, False),
            rematerialize=residual_layer_norm_rule,
            shapeless=("dropout_rate", "site"),
        ),
    ),
    _residual_layer_norm_gradients,
    outputs=2,
)


@public(residual_layer_norm_reference)
def residual_layer_norm(target, x, branch, scale, bias, rng=None, *, dropout_rate=0.0, site=0, epsilon=EPSILON):
    scale, bias = _scale_and_bias("residual_layer_norm", x, scale, bias)
    rng, dropout_rate, site = drawing_of(rng, dropout_rate, site)
    check_arrays("residual_layer_norm", branch=(branch, x.shape, x.dtype), rng=(rng, (2,), jnp.uint32))
    total, y = _residual_layer_norm_operation(
        target,
        *(as_rows(x), as_rows(branch), scale, bias, rng),
        dropout_rate=dropout_rate,
        site=site,
        epsilon=float(epsilon),
    )
    return total.reshape(x.shape), y.reshape(x.shape)
