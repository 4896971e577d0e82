"""Kernels made to measure: a graph of primitives becomes SPIR-V.

`generate` takes any graph of supported primitives. Elementwise and shape primitives cost no memory of their own. What
a graph becomes is one kernel, or several where a long reduction feeds something that needs all of it:

- outputs of one shape, without long reductions, are one section: a thread an element;
- long reductions over the same axes, what comes before them, and outputs made of their results of the kept or the
  whole shape (a softmax, a layer norm) are one section, with several threads for each reduction;
- sort and top_k are sections of their own, and so are the pieces of a reduction that is too long for one workgroup;
  outputs of the whole shape that are made of the same arrays go with the pieces, so that those are read once;
- what needs the result of a section of other axes, of pieces or of a sort is in the next kernel.

A reduction of few elements, a product, a running sum, a gather and a scatter are computed by one thread wherever an
element of them is asked for: right everywhere, but `EXPENSIVE` ones are best outputs, not inputs of something that asks
for them often.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vk_kernels.compiler.codegen.emit_kernel import GeneratedKernel, emit_kernel
from vk_kernels.compiler.codegen.emitter import size_of
from vk_kernels.compiler.codegen.heroes import Heroes
from vk_kernels.compiler.codegen.kernel_stages import combine_pieces, plan_stage
from vk_kernels.compiler.codegen.primitives import EXPENSIVE, check
from vk_kernels.compiler.ir import Graph, Node, Value


@dataclass(frozen=True)
class Generated:
    """Kernels in order, each after the ones whose results it reads; `scratch` holds bytes a buffer, undefined at first.

    `in_place`: (input, output) numbers that may be the same memory. An input may share with one output at most.
    No kernels: the outputs have no elements.
    """

    kernels: tuple[GeneratedKernel, ...]
    scratch: tuple[int, ...]
    in_place: frozenset[tuple[int, int]]


def generate(graph: Graph, label: str | None = None) -> Generated:
    """The kernels of a graph, whose constants must be inputs. Raises ValueError for what `check` refuses."""
    if graph.constants:
        raise ValueError("constants of a graph to generate must be inputs")
    for node in graph.nodes:
        check(node)
    label = label or _label(graph.nodes)
    count, outputs = len(graph.inputs), len(graph.outputs)
    memory = {value: i for i, value in enumerate(graph.inputs)}  # value -> operand
    wanted = [(value, count + i) for i, value in enumerate(graph.outputs) if size_of(value)]
    scratch: list[int] = []

    def new_scratch(value: Value) -> int:
        scratch.append(value.nbytes)
        return count + outputs + len(scratch) - 1

    emitted = []
    while wanted:
        heroes = Heroes(graph, memory)
        stage = plan_stage(heroes, wanted, new_scratch)
        part = f"{label}, part {len(emitted) + 1}" if emitted else label
        emitted.append(emit_kernel(graph, heroes, stage, memory, part))
        graph = combine_pieces(graph, stage.pieces)
        memory = memory | stage.memory
        wanted = [write for write in wanted if write not in stage.outputs]
    once = {i for i in range(count) if sum(i in kernel.reads for kernel in emitted) == 1}
    shared = {pair for kernel in emitted for pair in kernel.may_share}
    in_place = {(i, o - count) for i, o in shared if i in once and count <= o < count + outputs}
    return Generated(tuple(kernel.kernel for kernel in emitted), tuple(scratch), frozenset(in_place))


def _label(nodes: Iterable[Node]) -> str:
    names = list(dict.fromkeys(node.op for node in nodes))
    telling = [name for name in names if name in EXPENSIVE] or names
    return "+".join(telling[:4]) + ("+..." if len(telling) > 4 else "") if names else "copy"
