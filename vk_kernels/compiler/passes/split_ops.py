"""Op splitting: a kernel op of several results becomes several ops, so that each runs when its own result is needed.

The gradients of matrices are needed at a step's end, those of activations at once: apart, the former run all together
and fill a device that each of them alone does not. The op says where that pays (`KernelOp.split`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from vk_kernels.compiler.ir import Graph, Node
from vk_kernels.compiler.op_registry import kernel_op

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


def split_ops(graph: Graph, info: "DeviceInfo") -> Graph:
    """The graph with every node split that had better be, without parts that nobody reads."""
    by_op: dict[str, list[Node]] = {}
    read = {*graph.outputs, *(x for node in graph.nodes for x in node.inputs)}
    for node in graph.nodes:
        if node.call and kernel_op(node.op).split:
            by_op.setdefault(node.op, []).append(node)
    parts = {node: some for op, nodes in by_op.items() for node, some in kernel_op(op).split(info, nodes, read).items()}
    nodes = []
    for node in graph.nodes:
        nodes += [part for part in parts[node] if not read.isdisjoint(part.outputs)] if node in parts else [node]
    return replace(graph, nodes=nodes)
