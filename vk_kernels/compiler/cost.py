"""Useful floating-point operations of a program's steps: 2 for each multiplication of a product, 1 for each element
of what else computes."""

import math
from collections.abc import Container
from typing import Any

from vk_kernels.compiler.codegen.primitives import EXPENSIVE
from vk_kernels.compiler.codegen.scalars import ELEMENTWISE
from vk_kernels.compiler.ir import Node
from vk_kernels.compiler.op_registry import kernel_op
from vk_kernels.compiler.partition import Step


def step_flops(step: Step, made: Container[Any]) -> int:
    """Useful floating-point operations of a step, of whose results only those in `made` are computed."""
    if step.node is None:
        return sum(map(_generated_flops, step.graph.nodes))
    return _op_flops(step.node, [out in made for out in step.outputs])


def _op_flops(node: Node, made: list[bool]) -> int:
    flops = kernel_op(node.op).flops
    found = tuple(x.size for x in node.outputs) if flops is None else flops(node)
    return found if isinstance(found, int) else sum(n for n, is_made in zip(found, made, strict=True) if is_made)


def _generated_flops(node: Node) -> int:
    if not any(out.dtype.kind in "fV" for out in node.outputs):
        return 0
    if node.op == "dot_general":
        (contracted, _), _ = node.params["dimension_numbers"]
        return 2 * node.outputs[0].size * math.prod(node.inputs[0].shape[axis] for axis in contracted)
    if node.op in EXPENSIVE:
        return node.inputs[0].size
    return sum(out.size for out in node.outputs) if node.op in ELEMENTWISE else 0
