"""Useful floating-point operations of a program's steps: 2 for each multiplication of a product, 1 for each element
of what else computes."""

import math

from vk_kernels.compiler.codegen.primitives import EXPENSIVE
from vk_kernels.compiler.codegen.scalars import ELEMENTWISE
from vk_kernels.compiler.ir import Node
from vk_kernels.compiler.op_registry import kernel_op
from vk_kernels.compiler.partition import Step


def step_flops(step: Step) -> int:
    """Useful floating-point operations of a step."""
    return sum(map(_generated_flops, step.graph.nodes)) if step.node is None else _op_flops(step.node)


def _op_flops(node: Node) -> int:
    flops = kernel_op(node.op).flops
    return sum(x.size for x in node.outputs) if flops is None else flops(node)


def _generated_flops(node: Node) -> int:
    if not any(out.dtype.kind in "fV" for out in node.outputs):
        return 0
    if node.op == "dot_general":
        (contracted, _), _ = node.params["dimension_numbers"]
        return 2 * node.outputs[0].size * math.prod(node.inputs[0].shape[axis] for axis in contracted)
    if node.op in EXPENSIVE:
        return node.inputs[0].size
    return sum(out.size for out in node.outputs) if node.op in ELEMENTWISE else 0
