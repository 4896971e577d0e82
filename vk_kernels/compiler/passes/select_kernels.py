"""Kernel selection: a primitive whose kernels ship runs by them where that takes less time than a generated kernel.

Which primitives, and where, the ops say that have the kernels (`op_registry.register_selection`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from vk_kernels.compiler.ir import Graph, Node, Value, consumers, producers
from vk_kernels.compiler.op_registry import selection_of
from vk_kernels.compiler.passes.simplify import dce

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


def select_kernels(graph: Graph, info: "DeviceInfo") -> Graph:
    """The graph with kernel ops in the place of the primitives that an op takes over."""
    makers, readers = producers(graph.nodes), consumers(graph)
    single = {x: found[0] for x, found in readers.items() if len(found) == 1 and x not in graph.outputs}
    nodes: list[Node] = []
    made: set[Value] = set()
    for node in graph.nodes:
        select = selection_of(node.op)
        found = select(info, node, makers, single) if select else None
        if found is not None:
            made.update(out for part in found for out in part.outputs)
            nodes += found
        elif not made.issuperset(node.outputs):
            nodes.append(node)
    return dce(replace(graph, nodes=nodes))
