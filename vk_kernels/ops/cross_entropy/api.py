"""The output layer and its loss in one operation, so that an implementation need not hold the logits."""

import jax.numpy as jnp

from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import ForwardBackward, KernelOp, register_op
from vk_kernels.ops.cross_entropy.planner import (
    logits_flops,
    plan_linear_cross_entropy_backward,
    plan_linear_cross_entropy_both_passes,
    plan_linear_cross_entropy_forward,
)
from vk_kernels.ops.cross_entropy.reference import (
    linear_cross_entropy_backward_reference,
    linear_cross_entropy_forward_reference,
    linear_cross_entropy_reference,
)
from vk_kernels.ops.public import check_arrays, public

_linear_cross_entropy_backward = make_primitive(
    "linear_cross_entropy_backward",
    linear_cross_entropy_backward_reference,
    KernelOp(
        plan_linear_cross_entropy_backward,
        forward_backward=ForwardBackward(
            "linear_cross_entropy",
            results=(1,),  # the log normalizers
            fused="linear_cross_entropy_both_passes",
        ),
        flops=lambda node: (logits_flops(node),) * 2,  # of dx and dw
    ),
)


def _linear_cross_entropy_gradients(target, operands, results, cotangents, **parameters):
    operands = *operands, results[1], *cotangents
    return *_linear_cross_entropy_backward.bind(*operands, target=target, **parameters), None


_linear_cross_entropy_operation = make_differentiable(
    make_primitive(
        "linear_cross_entropy",
        linear_cross_entropy_forward_reference,
        KernelOp(
            plan_linear_cross_entropy_forward,
            batch_axes=lambda **_: (True, False, True),
            flops=logits_flops,
        ),
    ),
    _linear_cross_entropy_gradients,
)

register_op(
    "linear_cross_entropy_both_passes",
    KernelOp(
        plan_linear_cross_entropy_both_passes,
        flops=lambda node: (logits_flops(node), 0, logits_flops(node), logits_flops(node)),  # log normalizers: 0
    ),
)


@public(linear_cross_entropy_reference)
def linear_cross_entropy(target, x, w, targets, *, transposed=False):
    if x.ndim != 2 or w.ndim != 2:
        layout = "(V, D)" if transposed else "(D, V)"
        raise ValueError(f"linear_cross_entropy: x must be (N, D) and w {layout}, found {x.shape} and {w.shape}")
    w_shape = (w.shape[0], x.shape[1]) if transposed else (x.shape[1], w.shape[1])
    check_arrays("linear_cross_entropy", w=(w, w_shape, x.dtype), targets=(targets, (x.shape[0],), jnp.int32))
    return _linear_cross_entropy_operation(target, x, w, targets, transposed=bool(transposed))[0]
