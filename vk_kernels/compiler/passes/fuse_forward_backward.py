"""A hot operation and its gradient as one, where the gradient waits for nothing that the operation gives.

That of a loss is such a one: it is scaled by what the losses count for, not by what they are. Both together need not
make again what the operation had and is too large to keep.
"""

from typing import NamedTuple

from vk_kernels.bridge import custom_call
from vk_kernels.compiler.ir import Graph, Node, producers


class _Joint(NamedTuple):
    operation: str
    results: tuple[int, ...]
    both: str


_joints: dict[str, _Joint] = {}  # by the gradient's operation


def register_joint(
    operation: str, gradient: str, both: str, planner: custom_call.Planner, results: tuple[int, ...]
) -> None:
    """Has `join` put `both` in the place of an operation and its gradient, of the same parameters.

    The gradient takes the operation's operands, those of its results that `results` numbers, and others, in this order;
    both take the operands and the others, and give the results of both.
    """
    custom_call.register_planner(both, planner)
    _joints[gradient] = _Joint(operation, results, both)


def join(graph: Graph) -> Graph:
    """The graph with all pairs joined that can be."""
    for gradient in [node for node in graph.nodes if node.op in _joints]:
        makers, joint = producers(graph.nodes), _joints[gradient.op]
        node = next((maker for x in gradient.inputs if (maker := makers.get(x)) and maker.op == joint.operation), None)
        if node is not None:
            graph = _joined(graph, node, gradient, joint)
    return graph


def _joined(graph: Graph, node: Node, gradient: Node, joint: _Joint) -> Graph:
    taken = *node.inputs, *(node.outputs[i] for i in joint.results)
    others = gradient.inputs[len(taken) :]
    late = _dependents(graph, node, gradient)  # of what comes before the gradient: it comes after both now
    made_late = {*node.outputs, *(out for other in late for out in other.outputs)}
    both = custom_call.renamed(gradient.call, joint.both)
    alike = gradient.inputs[: len(taken)] == taken and custom_call.renamed(node.call, joint.both) == both
    if not alike or not made_late.isdisjoint(others):
        return graph
    joined = Node(
        joint.both,
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
