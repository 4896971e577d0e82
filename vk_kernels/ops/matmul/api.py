"""Matrix product with what usually follows it: bias, GELU, dropout, residual."""

import jax.numpy as jnp

from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp, register_selection
from vk_kernels.compiler.passes.fuse_epilogue import with_operands
from vk_kernels.ops.dropout import drawing_of
from vk_kernels.ops.matmul.dot_general import select_product
from vk_kernels.ops.matmul.gradient_parts import split_gradients
from vk_kernels.ops.matmul.planner import plan_matmul_backward, plan_matmul_forward, product_flops
from vk_kernels.ops.matmul.reference import (
    matmul_backward_reference,
    matmul_forward_reference,
    matmul_reference,
    matmul_rule,
)
from vk_kernels.ops.public import as_rows, check_arrays, present, public

register_selection("dot_general", select_product)


def _slope_into_product(before, after):
    """The gradient through GELU as the last step of the product that makes it."""
    if after.params["activation"] != "gelu" or after.params["dropout_rate"] or "input_activation" in after.params:
        return None  # the pre-activation is not the last operand
    *reads, pre_activation = after.inputs
    before = with_operands(before, (*before.inputs, pre_activation), input_activation="gelu")
    return before, with_operands(after, reads, activation=None)


_matmul_backward = make_primitive(
    "matmul_backward",
    matmul_backward_reference,
    KernelOp(
        plan_matmul_backward,
        epilogues={"matmul_backward": _slope_into_product},
        split=split_gradients,
        flops=lambda node: (product_flops(node), product_flops(node), 0)[: len(node.outputs)],  # of dx, dw, dbias
        shapeless=("dropout_rate", "site"),
    ),
)


def _matmul_batch_axes(has_bias, has_residual, dropout_rate, **_):
    if dropout_rate:
        return None
    return True, False, *((False,) if has_bias else ()), *((True,) if has_residual else ())


def _matmul_gradients(target, operands, results, cotangents, has_residual, **parameters):
    x, w, _, _, rng = operands
    (dy,), saved = cotangents, results[1:]
    gradients = _matmul_backward.bind(*present(dy, x, w, *saved, rng), target=target, **parameters)
    dx, dw, *dbias = gradients
    return dx, dw, dbias[0] if dbias else None, dy if has_residual else None, None


_matmul_operation = make_differentiable(
    make_primitive(
        "matmul",
        matmul_forward_reference,
        KernelOp(
            plan_matmul_forward,
            batch_axes=_matmul_batch_axes,
            rematerialize=matmul_rule,
            flops=product_flops,
            shapeless=("dropout_rate", "site"),
        ),
    ),
    _matmul_gradients,
)


@public(matmul_reference)
def matmul(
    target,
    x,
    w,
    bias=None,
    *,
    activation=None,
    residual=None,
    rng=None,
    dropout_rate=0.0,
    site=0,
    transposed=False,
):
    if w.ndim != 2 or x.ndim == 0:
        wanted = "(N, K)" if transposed else "(K, N)"
        raise ValueError(f"matmul: x must be (..., K) and w {wanted}, found {x.shape} and {w.shape}")
    rng, dropout_rate, site = drawing_of(rng, dropout_rate, site)
    bias = None if bias is None else jnp.asarray(bias, x.dtype)
    columns = w.shape[:1] if transposed else w.shape[1:]
    shape, matrix = (*x.shape[:-1], *columns), (x.shape[-1], *columns)
    check_arrays(
        "matmul",
        w=(w, matrix[::-1] if transposed else matrix, x.dtype),
        bias=(bias, columns, x.dtype),
        residual=(residual, shape, x.dtype),
        rng=(rng, (2,), jnp.uint32),
    )
    (y,) = _matmul_operation(
        target,
        *(as_rows(x), w, bias, None if residual is None else as_rows(residual), rng),
        activation=activation,
        has_bias=bias is not None,
        has_residual=residual is not None,
        dropout_rate=dropout_rate,
        site=site,
        transposed=bool(transposed),
    )
    return y.reshape(shape)
