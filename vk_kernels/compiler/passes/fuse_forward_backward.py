"""Fuses a backward op with its forward op where it does not need the forward's result, as that of a loss.

A loss's gradient is scaled by what the losses count for, not by what they are. Both passes together need not make again
what the forward pass had and is too large to keep. The backward op names the two (`KernelOp.forward_backward`).
"""

from vk_kernels.compiler.ir import Graph, Node, producers
from vk_kernels.compiler.op_call import with_op
from vk_kernels.compiler.op_registry import ForwardBackward, kernel_op


def fuse_forward_backward(graph: Graph) -> Graph:
    """The graph with every such pair fused that can be."""
    for backward in [node for node in graph.nodes if node.call and kernel_op(node.op).forward_backward]:
        makers, pair = producers(graph.nodes), kernel_op(backward.op).forward_backward
        forward = next((maker for x in backward.inputs if (maker := makers.get(x)) and maker.op == pair.forward), None)
        if forward is not None:
            graph = _fused(graph, forward, backward, pair)
    return graph


def _fused(graph: Graph, node: Node, gradient: Node, pair: ForwardBackward) -> Graph:
    taken = *node.inputs, *(node.outputs[i] for i in pair.results)
    others = gradient.inputs[len(taken) :]
    late = _dependents(graph, node, gradient)  # of what comes before the gradient: it comes after both now
    made_late = {*node.outputs, *(out for other in late for out in other.outputs)}
    both = with_op(gradient.call, pair.fused)
    alike = gradient.inputs[: len(taken)] == taken and with_op(node.call, pair.fused) == both
    if not alike or not made_late.isdisjoint(others):
        return graph
    joined = Node(
        pair.fused,
        (*node.inputs, *others),
        (*node.outputs, *gradient.outputs),
        node.params,
        gradient.source,
        gradient.scope,
        both,
    )
    end = graph.nodes.index(gradient)
    before = [other for other in graph.nodes[:end] if other is not node and other not in late]
    nodes = [*before, joined, *late, *graph.nodes[end + 1 :]]
    return Graph(graph.inputs, graph.constants, nodes, graph.outputs)


def _dependents(graph: Graph, node: Node, end: Node) -> dict[Node, None]:
    """The nodes before `end` that need a result of `node`, in order."""
    reached, found = set(node.outputs), {}
    for other in graph.nodes[graph.nodes.index(node) + 1 : graph.nodes.index(end)]:
        if not reached.isdisjoint(other.inputs):
            reached.update(other.outputs)
            found[other] = None
    return found
