"""The compiler, pass by pass: from a traced JAX function to a program of dispatches for one device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax.extend.core import ClosedJaxpr

from vk_kernels.compiler.emit_program import make_program
from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.compiler.ir import Graph
from vk_kernels.compiler.partition import MOST_REDUCTIONS, partition
from vk_kernels.compiler.passes.fuse_epilogue import fuse_epilogues
from vk_kernels.compiler.passes.fuse_forward_backward import fuse_forward_backward
from vk_kernels.compiler.passes.rematerialize import rematerialize
from vk_kernels.compiler.passes.select_kernels import select_kernels
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.compiler.passes.split_ops import split_ops
from vk_kernels.compiler.roots import MOST_BUFFERS
from vk_kernels.runtime.program import Program

if TYPE_CHECKING:
    from vk_kernels.runtime.device import Device


def optimize(closed: ClosedJaxpr) -> Graph:
    """The graph of a function, optimized; it knows no device.

    Raises UnsupportedError for what no kernel is there for.
    """
    graph = make_graph(closed)  # calls inlined, loops unrolled, primitives rewritten in others
    graph = simplify(graph)  # constants folded, common subexpressions merged, dead code gone
    graph = fuse_forward_backward(graph)  # a loss and its gradient: one op
    graph = fuse_epilogues(graph)  # a product does the elementwise step of its only reader
    return rematerialize(graph)  # large activations computed again instead of kept


def compile_graph(
    graph: Graph, device: "Device", donated: Sequence[bool], output_groups: Sequence[Sequence[int]] = ()
) -> Program:
    """The program of a graph: what is fused into which kernel, the kernels, their order and every array's memory.

    donated: whether each input may be overwritten. output_groups: see `partition`. Raises ValueError or FeatureError,
    naming the line, for what the kernels or the device cannot do.
    """
    buffers = min(MOST_BUFFERS, device.limits.storage_buffers)
    # lavapipe takes minutes to compile a kernel with 32 reductions.
    reductions = 4 if device.info.kind == "cpu" else MOST_REDUCTIONS
    graph = select_kernels(graph, device.info)  # primitives of which kernels ship: these, where they are faster
    graph = split_ops(graph, device.info)  # results that are needed at other times are made by ops of their own
    return make_program(partition(graph, buffers, reductions, output_groups), device, donated)
