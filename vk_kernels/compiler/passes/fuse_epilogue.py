"""Hot operations that take over what the reader of a result does to it first, where nobody else reads that result.

What there is to take over, the operations say: a rule is of two operations, and is asked for each pair of nodes where
the first gives the second's first operand, and gives it to nobody else.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vk_kernels.bridge import custom_call
from vk_kernels.compiler.ir import Graph, Node, Operand, consumers, producers

# rule(producer, consumer): both as they are to be, in the same order and with the same outputs; None: as they are.
Rule = Callable[[Node, Node], tuple[Node, Node] | None]

_rules: dict[tuple[str, str], Rule] = {}


def register_rule(producer: str, consumer: str, rule: Rule) -> None:
    """Has `absorb` ask `rule` about nodes of these two operations."""
    _rules[producer, consumer] = rule


def changed(node: Node, inputs: Sequence[Operand], **parameters: Any) -> Node:
    """A node of a hot operation with other operands and some other parameters."""
    params = node.params | parameters
    return replace(node, inputs=tuple(inputs), params=params, call=custom_call.with_parameters(node.call, params))


def absorb(graph: Graph) -> Graph:
    """Applies the rules from the last node to the first, so that one may hand on what it was handed."""
    nodes, makers, readers = list(graph.nodes), producers(graph.nodes), consumers(graph)
    numbers = {node: i for i, node in enumerate(nodes)}
    for i in reversed(range(len(nodes))):
        consumer = nodes[i]
        maker = makers.get(consumer.inputs[0]) if consumer.call and consumer.inputs else None
        rule = maker and _rules.get((maker.op, consumer.op))
        value = consumer.inputs[0] if rule else None
        if rule is None or len(readers[value]) > 1 or consumer.inputs.count(value) > 1 or value in graph.outputs:
            continue
        producer = nodes[numbers[maker]]
        found = rule(producer, consumer)
        if found is not None and all(numbers.get(makers.get(x), -1) < numbers[maker] for x in found[0].inputs):
            nodes[numbers[maker]], nodes[i] = found
    return replace(graph, nodes=nodes)
