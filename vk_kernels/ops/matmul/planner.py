"""Plans of the matrix product and of its gradient, out of those of `gemm`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vk_kernels.compiler.ir import Node
from vk_kernels.ops.dropout import dropout_scale, dropout_threshold
from vk_kernels.ops.matmul.few_rows import FewRows, plan_few_rows
from vk_kernels.ops.matmul.gemm import Epilogue, Matrix, matrix, plan_column_sums, plan_epilogue, plan_gemm
from vk_kernels.ops.matmul.reference import check_activation
from vk_kernels.ops.planning import planner
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


@planner
def plan_matmul_forward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    activation: str | None,
    has_bias: bool,
    has_residual: bool,
    dropout_rate: float,
    site: int,
    transposed: bool = False,
    variant: str | None = None,
) -> Plan:
    """inputs: x, w, and of bias, residual, rng those that there are; outputs: y and, with an activation, its input.

    See `matmul_forward_reference`; variant: of `plan_gemm`, which also says what is raised. bias and residual must
    have x's dtype.
    """
    check_activation(activation)
    x, w = _rows(0, inputs[0]), _rows(1, inputs[1])
    y = len(inputs)
    optional = iter(range(2, len(inputs)))
    bias = next(optional) if has_bias else None
    residual = next(optional) if has_residual else None
    for name, operand in (("bias", bias), ("residual", residual)):
        if operand is not None and inputs[operand].dtype != x.dtype:
            raise ValueError(f"matmul: {name} must be {x.dtype.name} as x is, found {inputs[operand]}")
    pre_activation = None if activation is None else y + 1
    drop = _dropout_step(next(optional, None), dropout_rate, site)
    if transposed and not drop and variant in (None, "plain"):
        product = FewRows(0, 1, y, bias, residual, pre_activation, activation == "gelu")
        rows = ArraySpec((x.rows, x.columns), x.dtype)
        if (plan := plan_few_rows(info, rows, inputs[1], product)) is not None:
            return plan
    epilogue = Epilogue(
        bias=bias, save_pre_activation=pre_activation, gelu=activation == "gelu", residual=residual, **drop
    )
    scratch = len(inputs) + len(outputs)
    options = {"transpose_b": transposed, "scratch": scratch, "variant": variant}
    return plan_gemm(info, x, w, _rows(y, outputs[0]), epilogue=epilogue, **options)


@planner
def plan_matmul_backward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    activation: str | None,
    has_bias: bool,
    dropout_rate: float,
    site: int,
    input_activation: str | None = None,
    transposed: bool = False,
    variant: str | None = None,
) -> Plan:
    """inputs: dy, x, w, and of the activation's input, rng and the input activation's input those that there are;
    outputs: dx, dw and maybe dbias.

    See `matmul_backward_reference`; variant: of `plan_gemm`, which also says what is raised.
    """
    check_activation(activation)
    check_activation(input_activation)
    dsums, x, w = (_rows(i, array) for i, array in enumerate(inputs[:3]))
    first = len(inputs)
    dx, dw = _rows(first, outputs[0]), _rows(first + 1, outputs[1])
    slope_of = None if input_activation is None else first - 1
    optional = iter(range(3, first if slope_of is None else slope_of))
    pre_activation = None if activation is None else next(optional)
    drop = _dropout_step(next(optional, None), dropout_rate, site)
    plan, free = Plan(()), first + len(outputs)
    if activation is not None or drop:
        # Once, ahead of both products: in their loads, every tile of C would draw the same bits again.
        dy, dsums = dsums, matrix(free, x.dtype, dsums.rows, dsums.columns)
        epilogue = Epilogue(gelu_slope_of=pre_activation, **drop)
        nbytes = x.dtype.itemsize * dsums.rows * dsums.columns
        plan = Plan(plan_epilogue(dy, dsums, epilogue).dispatches, (nbytes,))

    # Each with its own scratch: they do not depend on one another, and may run side by side.
    options = {"variant": variant, "scratch": free + len(plan.scratch)}
    epilogue = Epilogue(gelu_slope_of=slope_of)
    plan = _both(plan, plan_gemm(info, dsums, w, dx, transpose_b=not transposed, epilogue=epilogue, **options))
    options["scratch"] = free + len(plan.scratch)
    left, right = (dsums, x) if transposed else (x, dsums)
    plan = _both(plan, plan_gemm(info, left, right, dw, transpose_a=True, **options))
    if has_bias:
        dbias = matrix(first + 2, x.dtype, 1, dsums.columns)
        plan = _both(plan, plan_column_sums(dsums, dbias, scratch=free + len(plan.scratch)))
    return plan


def _both(some: Plan, more: Plan) -> Plan:
    return Plan(some.dispatches + more.dispatches, some.scratch + more.scratch)


def _rows(operand: int, array: ArraySpec) -> Matrix:
    """(..., N) as a matrix of N columns."""
    return matrix(operand, array.dtype, math.prod(array.shape[:-1]), array.shape[-1])


def _dropout_step(rng: int | None, rate: float, site: int) -> dict[str, int | float]:
    """The fields of an Epilogue that drops, if anything is to be dropped."""
    threshold = dropout_threshold(rate)
    if rng is None or threshold == 0:
        return {}
    return {"rng": rng, "threshold": threshold, "scale": dropout_scale(rate), "site": site}


def product_flops(node: Node) -> int:
    """Floating-point operations of the product of (M, K), the first operand, and a matrix of N columns or rows."""
    return 2 * node.inputs[0].size * node.inputs[1].shape[0 if node.params.get("transposed") else -1]
