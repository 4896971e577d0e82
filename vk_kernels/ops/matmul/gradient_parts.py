"""The two products of a matrix product's gradient as ops of their own.

dx is needed at once, by the layer before; dw at the end of a step, by the optimizer. A product of which the device
takes few tiles is cut along k to fill it, and its partial sums are added up; beside those of all layers it need not be.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from vk_kernels.compiler.ir import Node, Operand
from vk_kernels.compiler.op_call import decode_call, with_op, with_parameters
from vk_kernels.compiler.op_registry import KernelOp, register_op
from vk_kernels.ops.matmul.gemm import BF16, GPU_CORES, Epilogue, choose_variant, matrix, plan_gemm
from vk_kernels.ops.planning import planner
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_DX, _DW = "matmul_dx", "matmul_dw"
_MOST_BYTES = 8 << 20  # of an operand, which is kept until all are multiplied
_TILE = 128**2  # elements of a matrix, that a workgroup makes
_MOST_TILES = GPU_CORES  # of one product: more fill a device by themselves
_WAVE = 2 * GPU_CORES  # tiles that a device makes at a time


def split_gradients(
    info: "DeviceInfo", nodes: Sequence[Node], read: Collection[Operand]
) -> Mapping[Node, Sequence[Node]]:
    """Gradients of several products of as many rows, which together fill the device better than one by one."""
    groups: dict[int, list[Node]] = {}
    for node in nodes:
        if node.outputs[1] in read and _suits(info, node):
            groups.setdefault(node.inputs[0].shape[0], []).append(node)
    found = {}
    for group in map(_whole_waves, groups.values()):
        elements = sum(node.outputs[1].size for node in group)
        if len(group) > 1:
            found |= {node: _parts(node, round(elements / node.outputs[1].size)) for node in group}
    return found


def _whole_waves(group: Sequence[Node]) -> list[Node]:
    """The last of a group that fill a device whole times, or all where they do not fill it once.

    What the others read, the first, would have to be kept for longest.
    """
    counts = list(itertools.accumulate(_tiles(node) for node in reversed(group)))
    most = counts[-1] // _WAVE * _WAVE or counts[-1]
    return [node for node, count in zip(reversed(group), counts, strict=True) if count <= most][::-1]


def _tiles(node: Node) -> int:
    return math.ceil(node.outputs[1].size / _TILE)


def _suits(info: "DeviceInfo", node: Node) -> bool:
    dy, x = node.inputs[:2]
    bare = node.params["activation"] is None and not node.params["dropout_rate"] and not node.params["has_bias"]
    variant = decode_call(node.call)[2].variant
    if not bare or dy.dtype != BF16 or choose_variant(info, BF16, variant) == "plain":
        return False
    return max(dy.nbytes, x.nbytes) <= _MOST_BYTES and _tiles(node) <= _MOST_TILES


def _parts(node: Node, beside: int) -> tuple[Node, Node]:
    (dy, x, w, *slope), (dx, dw) = node.inputs, node.outputs
    transposed = node.params.get("transposed", False)
    return (
        _node(node, _DX, (dy, w, *slope), dx, transposed=transposed, has_slope=bool(slope)),
        _node(node, _DW, (dy, x), dw, transposed=transposed, beside=beside),
    )


def _node(node: Node, op: str, inputs: tuple, output, **parameters) -> Node:
    call = with_op(with_parameters(node.call, parameters), op)
    return Node(op, inputs, (output,), parameters, node.source, node.scope, call)


@planner
def plan_matmul_dx(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    transposed: bool,
    has_slope: bool,
    variant: str | None = None,
) -> Plan:
    """inputs: dy, w and, with a slope, what the activation before took; outputs: dx.

    See `matmul_backward_reference`.
    """
    dy, w = (matrix(i, x.dtype, *x.shape) for i, x in enumerate(inputs[:2]))
    dx = matrix(len(inputs), outputs[0].dtype, *outputs[0].shape)
    epilogue = Epilogue(gelu_slope_of=2 if has_slope else None)
    options = {"epilogue": epilogue, "scratch": len(inputs) + 1, "variant": variant}
    return plan_gemm(info, dy, w, dx, transpose_b=not transposed, **options)


@planner
def plan_matmul_dw(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    transposed: bool,
    beside: int,
    variant: str | None = None,
) -> Plan:
    """inputs: dy, x; outputs: dw. beside: of `plan_gemm`. See `matmul_backward_reference`."""
    dy, x, dw = (matrix(i, array.dtype, *array.shape) for i, array in enumerate((*inputs, *outputs)))
    left, right = (dy, x) if transposed else (x, dy)
    return plan_gemm(info, left, right, dw, transpose_a=True, scratch=3, variant=variant, beside=beside)


def _flops(node: Node) -> int:
    return 2 * node.inputs[0].size * node.inputs[1].shape[-1]


register_op(
    _DX,
    KernelOp(
        plan_matmul_dx,
        flops=lambda node: 2 * node.inputs[0].size * node.outputs[0].shape[-1],
    ),
)
register_op(_DW, KernelOp(plan_matmul_dw, flops=_flops))
