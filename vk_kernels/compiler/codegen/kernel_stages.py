"""A graph cut into kernels, before any code is: the outputs that each one writes, and what the next needs in memory."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

from vk_kernels.compiler.codegen.heroes import Heroes
from vk_kernels.compiler.codegen.reductions import accumulator_dtype
from vk_kernels.compiler.ir import Graph, Literal, Node, Operand, Value

Write = tuple[Operand, int]  # a value and the operand of the graph that it is written to


@dataclass(frozen=True)
class Stage:
    """One kernel: the `outputs` of the graph that it writes, the `results` of the frontier of all others, and of split
    reductions in that frontier the `pieces`, which are summed up in the next kernel."""

    outputs: list[Write]
    results: list[tuple[Value, int]]
    pieces: dict[Node, tuple[Value, int]]

    @property
    def memory(self) -> dict[Value, int]:
        """The values that the next kernel finds in memory, and their operands."""
        return dict(self.results) | dict(self.pieces.values())


def plan_stage(heroes: Heroes, wanted: Sequence[Write], new_scratch: Callable[[Value], int]) -> Stage:
    """Puts into one kernel what of the `wanted` outputs it can write, and what the others need first.

    new_scratch: gives a scratch operand for a value.
    """
    outputs = [(value, operand) for value, operand in wanted if heroes.section_key(value)]
    others = [value for value, _ in wanted if not heroes.section_key(value)]
    written = dict(outputs)
    results: list[tuple[Value, int]] = []
    pieces: dict[Node, tuple[Value, int]] = {}
    for hero in dict.fromkeys(hero for value in others for hero in heroes.frontier(value)):
        if hero in heroes.split:
            geometry = heroes.geometry[hero]
            partial = Value((*geometry.kept, geometry.splits), accumulator_dtype(hero))
            pieces[hero] = partial, new_scratch(partial)
        else:
            results += [(value, written[value] if value in written else new_scratch(value)) for value in hero.outputs]
    return Stage(outputs, results, pieces)


def combine_pieces(graph: Graph, pieces: dict[Node, tuple[Value, int]]) -> Graph:
    """The graph with each split reduction as one of its pieces, along their last axis."""
    combined = {
        hero: replace(hero, inputs=(partial,), params={"axes": (len(partial.shape) - 1,)})
        for hero, (partial, _) in pieces.items()
    }
    return replace(graph, nodes=[combined.get(node, node) for node in graph.nodes])


def numbers(graph: Graph) -> set[Value]:
    """The values that are made of single numbers alone, of whatever shape: no memory is read for them again."""
    found: set[Value] = set()
    for node in graph.nodes:
        if node.inputs and all(isinstance(x, Literal) or x.size <= 1 or x in found for x in node.inputs):
            found.update(node.outputs)
    return found


def without_common_arrays(
    values: Sequence[Operand], producers: dict[Value, Node], memory: Set[Value], numbers: Set[Value]
) -> list[list[int]]:
    """Positions of values in groups that have no array in common, in memory or on the way; `numbers` are none."""
    owner: dict[Value, int] = {}  # array -> the first of the values that needs it
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, target in enumerate(values):
        stack = [target]
        while stack:
            x = stack.pop()
            if isinstance(x, Literal) or owner.get(x) == i:
                continue
            if x in owner:  # what it is made of belongs to that one already
                parent[root(i)] = root(owner[x])
                continue
            owner[x] = i
            if x not in memory:
                stack += (y for y in producers[x].inputs if not (y.size <= 1 or y in numbers))
    groups: dict[int, list[int]] = {}
    for i in range(len(values)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
