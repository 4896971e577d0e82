"""A layer norm and the product that reads it: one kernel for a single row, two else. For decoding: no gradient."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.layer_norm.planner import plan_layer_norm_forward, plan_residual_layer_norm_forward
from vk_kernels.ops.layer_norm.reference import EPSILON, layer_norm_reference, residual_layer_norm_reference
from vk_kernels.ops.matmul.few_rows import plan_norm_and_row
from vk_kernels.ops.matmul.planner import plan_matmul_forward
from vk_kernels.ops.matmul.reference import check_activation, matmul_reference
from vk_kernels.ops.planning import planner, require_plain
from vk_kernels.ops.public import as_rows, check_arrays, present, public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


def norm_matmul_reference(
    x: jax.Array,
    branch: jax.Array | None,
    scale: jax.Array,
    shift: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    epsilon: float = EPSILON,
) -> tuple[jax.Array, jax.Array]:
    """total = x + branch, or x without one; and `matmul` of its `layer_norm` with a transposed matrix. No gradient.

    Args:
      x, branch: (..., K), one dtype, f32 or bf16.
      scale, shift: (K,) f32, of the norm.
      w: (N, K) in x's dtype.
      bias: (N,) in x's dtype, or None.
      activation: None or 'gelu'.

    Returns:
      total (..., K), and (..., N), in x's dtype.
    """
    if branch is None:
        total, norm = x, layer_norm_reference(x, scale, shift, epsilon=epsilon)
    else:
        total, norm = residual_layer_norm_reference(x, branch, scale, shift, epsilon=epsilon)
    return total, matmul_reference(norm, w, bias, activation=activation, transposed=True)


def _results(*operands, has_branch, has_bias, activation, epsilon):
    """Gives total where there is a branch, and the product: the results of the primitive."""
    x, *rest = operands
    branch = rest.pop(0) if has_branch else None
    total, y = norm_matmul_reference(x, branch, *rest, activation=activation, epsilon=epsilon)
    return (total, y) if has_branch else (y,)


@planner
def plan_norm_matmul(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    has_branch: bool,
    has_bias: bool,
    activation: str | None,
    epsilon: float = EPSILON,
    variant: str | None = None,
) -> Plan:
    """inputs: x, branch if there is one, scale, shift, w, bias if there is one; outputs: total if there is a branch, y.

    See `norm_matmul_reference`.
    """
    require_plain(variant)
    check_activation(activation)
    numbers = iter(range(len(inputs)))
    x, branch = next(numbers), next(numbers) if has_branch else None
    scale, shift, w = (next(numbers) for _ in range(3))
    bias = next(numbers, None)
    y = len(inputs) + len(outputs) - 1
    total = len(inputs) if has_branch else None
    buffers = {"a": x, "branch": branch, "scale": scale, "shift": shift, "b": w, "bias": bias, "total": total, "c": y}
    if plan := plan_norm_and_row(info, inputs[x], inputs[w], buffers, activation == "gelu", epsilon):
        return plan
    norm, mean, rstd, before, rest = range(y + 1, y + 6)  # scratch
    rows = math.prod(inputs[x].shape[:-1])
    statistic = ArraySpec((rows,), inputs[scale].dtype)
    if has_branch:
        first = plan_residual_layer_norm_forward(
            *(info, [inputs[i] for i in (x, branch, scale, shift)], [inputs[x], inputs[x], statistic, statistic]),
            dropout_rate=0.0,
            site=0,
            epsilon=epsilon,
        )
        first = _placed(first, (x, branch, scale, shift, total, norm, mean, rstd))
    else:
        wanted = [inputs[i] for i in (x, scale, shift)], [inputs[x], statistic, statistic]
        first = _placed(plan_layer_norm_forward(info, *wanted, epsilon=epsilon), (x, scale, shift, norm, mean, rstd))
    own = [norm, w, *([bias] if has_bias else [])]
    specs = [inputs[x], *(inputs[i] for i in own[1:])]
    made = [outputs[-1], *([outputs[-1]] if activation else [])]
    options = {"has_bias": has_bias, "has_residual": False, "dropout_rate": 0.0, "site": 0, "transposed": True}
    second = plan_matmul_forward(info, specs, made, activation=activation, **options)
    placed = _placed(second, (*own, y, *([before] if activation else []), *range(rest, rest + len(second.scratch))))
    before_bytes = outputs[-1].nbytes if activation else 4
    scratch = (inputs[x].nbytes, statistic.nbytes, statistic.nbytes, before_bytes, *second.scratch)
    return Plan(first.dispatches + placed.dispatches, scratch)


def _placed(plan: Plan, places: Sequence[int]) -> Plan:
    """The plan with other numbers of its operands."""
    moved = (replace(one, operands=tuple(places[i] for i in one.operands)) for one in plan.dispatches)
    return replace(plan, dispatches=tuple(moved))


_norm_matmul = make_primitive(
    "norm_matmul",
    _results,
    KernelOp(plan_norm_matmul, flops=lambda node: 2 * node.outputs[-1].size * node.inputs[0].shape[-1]),
)


@public(norm_matmul_reference)
def norm_matmul(target, x, branch, scale, shift, w, bias=None, *, activation=None, epsilon=EPSILON):
    columns = x.shape[-1:]
    scale, shift = (jnp.asarray(p, jnp.float32) for p in (scale, shift))
    check_arrays(
        "norm_matmul",
        branch=(branch, x.shape, x.dtype),
        scale=(scale, columns, jnp.float32),
        shift=(shift, columns, jnp.float32),
        w=(w, (*w.shape[:1], *columns), x.dtype),
        bias=(bias, w.shape[:1], x.dtype),
    )
    rows = None if branch is None else as_rows(branch)
    *total, y = _norm_matmul.bind(
        *present(as_rows(x), rows, scale, shift, w, bias),
        target=target,
        has_branch=branch is not None,
        has_bias=bias is not None,
        activation=activation,
        epsilon=float(epsilon),
    )
    return total[0].reshape(x.shape) if total else x, y.reshape(*x.shape[:-1], *w.shape[:1])
