"""The primitives of JAX that kernels are generated for, and what the rest of the compiler asks of them."""

from vk_kernels.compiler.codegen import gather_scatter, movement  # noqa: F401  (they register their handlers)
from vk_kernels.compiler.codegen.emitter import HANDLERS, dtype_of, shape_of, size_of
from vk_kernels.compiler.codegen.geometry import THREADS
from vk_kernels.compiler.codegen.ranks import RANKS
from vk_kernels.compiler.codegen.reductions import REDUCTIONS
from vk_kernels.compiler.codegen.scalars import ELEMENTWISE, kind
from vk_kernels.compiler.ir import Node

# Made of many elements each.
EXPENSIVE = REDUCTIONS | RANKS | {op for op in HANDLERS if op.startswith(("scatter", "cum"))} | {"dot_general"}
SUPPORTED = ELEMENTWISE | HANDLERS.keys() | RANKS

_MOST_ELEMENTS = 2**31 - THREADS  # of an array: indices are 32 bits


def check(node: Node) -> None:
    """Raises ValueError, in one line, for a node that no kernel can be generated for."""
    if node.op not in SUPPORTED:
        raise ValueError(f"no kernel is generated for the primitive {node.op}")
    for x in (*node.inputs, *node.outputs):
        kind(dtype_of(x))
        if size_of(x) > _MOST_ELEMENTS:
            raise ValueError(f"{node.op}: an array of {size_of(x):,} elements; kernels take {_MOST_ELEMENTS:,}")
    if node.op == "bitcast_convert_type" and shape_of(node.inputs[0]) != node.outputs[0].shape:
        raise ValueError("bitcast_convert_type between types of different width has no kernel")


def is_elementwise(node: Node) -> bool:
    """Whether an element of the result is made of one element of each operand."""
    single = all(x.size == 1 for x in (*node.inputs, *node.outputs))
    return node.op in ELEMENTWISE or (node.op in HANDLERS and single)
