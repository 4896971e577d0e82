"""Epilogue fusion: if a kernel op's only reader starts with an elementwise step, the op does that step itself.

The op says what it can take over (`KernelOp.epilogues`), by the op that reads its result as the first operand.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vk_kernels.compiler.ir import Graph, Node, Operand, consumers, producers
from vk_kernels.compiler.op_call import with_parameters
from vk_kernels.compiler.op_registry import kernel_op


def with_operands(node: Node, inputs: Sequence[Operand], **parameters: Any) -> Node:
    """A node of a kernel op with other operands and some other parameters."""
    params = node.params | parameters
    return replace(node, inputs=tuple(inputs), params=params, call=with_parameters(node.call, params))


def fuse_epilogues(graph: Graph) -> Graph:
    """Asks the ops from the last node to the first, so that one may hand on what it was handed."""
    nodes, makers, readers = list(graph.nodes), producers(graph.nodes), consumers(graph)
    numbers = {node: i for i, node in enumerate(nodes)}
    for i in reversed(range(len(nodes))):
        consumer = nodes[i]
        maker = makers.get(consumer.inputs[0]) if consumer.call and consumer.inputs else None
        epilogue = kernel_op(maker.op).epilogues.get(consumer.op) if maker and maker.call else None
        value = consumer.inputs[0] if epilogue else None
        if epilogue is None or len(readers[value]) > 1 or consumer.inputs.count(value) > 1 or value in graph.outputs:
            continue
        producer = nodes[numbers[maker]]
        found = epilogue(producer, consumer)
        if found is not None and all(numbers.get(makers.get(x), -1) < numbers[maker] for x in found[0].inputs):
            nodes[numbers[maker]], nodes[i] = found
    return replace(graph, nodes=nodes)
