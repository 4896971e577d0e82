"""Registry of kernel ops: operations whose kernels ship, and all that the compiler knows of each.

A kernel op is a primitive for the compiler. What it computes, by which kernels and what passes may do with it, its
module says once, in a `KernelOp`; no pass names an op.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vk_kernels.compiler.ir import Node, Operand
from vk_kernels.runtime.dispatch_plan import Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

# plan(info, inputs, outputs, *, variant=None, **parameters)
Planner = Callable[..., Plan]

# batch_axes(**parameters): of each operand, whether its first axis may carry a batch, as the first of each result then
# does; None where no batch may be taken together.
BatchAxes = Callable[..., tuple[bool, ...] | None]

# rematerialize(operands, results, **parameters), in JAX: each result as an elementwise function of operands and other
# results, or None where it is none. It is given the parameters that it names.
Rematerialize = Callable[..., Sequence[Any]]

# epilogue(producer, consumer): both as they are to be, with the same outputs in the same order; None: as they are.
EpilogueRule = Callable[[Node, Node], tuple[Node, Node] | None]

# split(info, nodes, read): of all nodes of the op in a graph, those that had better be several, of which each is run
# when its own results are needed, and the nodes that they are then. read: the values that somebody reads.
SplitRule = Callable[["DeviceInfo", Sequence[Node], Collection[Operand]], Mapping[Node, Sequence[Node]]]

# select(info, node, makers, single): the nodes that do what a node of a JAX primitive does; None: it is generated.
# makers: the node that gives each value. single: the only reader of each value that has one and is no output; the nodes
# may give that one's results instead.
Selection = Callable[["DeviceInfo", Node, Mapping[Any, Node], Mapping[Any, Node]], Sequence[Node] | None]

# flops(node): the useful floating-point operations, 2 for each multiplication of a product; of each result, where some
# may be left out because nobody reads them.
Flops = Callable[[Node], int | tuple[int, ...]]


@dataclass(frozen=True)
class ForwardBackward:
    """Merges a backward op and its forward op into one, where the backward waits for nothing that the forward gives.

    forward: the forward op. results: the numbers of those of its results that the backward takes, after the forward's
    operands and before its own. fused: the op in the place of both, with the operands of both and the results of both.
    """

    forward: str
    results: tuple[int, ...]
    fused: str


@dataclass(frozen=True)
class KernelOp:
    """An operation with kernels.

    planner: gives the dispatches for operands of given shapes on a device.
    batch_axes: for vmap; None: the elements run in turn.
    rematerialize: for results that are computed again instead of kept; None: they are kept.
    epilogues: by the op that reads its only result, what it takes over from that.
    split: what becomes several nodes on a device; None: nothing.
    forward_backward: of a backward op, how it and its forward op become one.
    flops: None: one for each element of the results.
    shapeless: parameters, numbers, that change neither shapes nor dtypes: these are found with 0 for each, so that they
    are for all values at once, and without what 0 leaves out, as a dropout its random bits.
    """

    planner: Planner
    batch_axes: BatchAxes | None = None
    rematerialize: Rematerialize | None = None
    epilogues: Mapping[str, EpilogueRule] = field(default_factory=dict)
    split: SplitRule | None = None
    forward_backward: ForwardBackward | None = None
    flops: Flops | None = None
    shapeless: tuple[str, ...] = ()


_ops: dict[str, KernelOp] = {}
_selections: dict[str, Selection] = {}


def register_op(name: str, op: KernelOp) -> None:
    """Makes `name` the kernel op `op`."""
    _ops[name] = op


def register_selection(primitive: str, select: Selection) -> None:
    """Has `select` say which of a JAX primitive's nodes kernel ops take over."""
    _selections[primitive] = select


def selection_of(primitive: str) -> Selection | None:
    """The function that says which of a primitive's nodes kernel ops take over; None: they take over none."""
    return _selections.get(primitive)


def kernel_op(name: str) -> KernelOp | None:
    """The kernel op of that name; None for every other operation."""
    return _ops.get(name)
