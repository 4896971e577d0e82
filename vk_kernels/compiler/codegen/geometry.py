"""The axes that a long reduction goes over, and how many threads and workgroups share it: numbers alone, no code."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from vk_kernels.compiler.codegen.emitter import shape_of
from vk_kernels.compiler.codegen.reductions import REDUCTIONS, T, merged_place, reduced_axes
from vk_kernels.compiler.ir import Node

THREADS = 256  # of a workgroup
_COLUMNS = 32  # neighbouring outputs that a workgroup reduces together, where the last axis is kept
_SPLIT_GROUPS = 1024  # workgroups that a long reduction is cut into: what fills a large GPU
_SPLIT_LENGTH = 4096  # elements of a piece at least: 16 a thread take less time than another kernel
_LONG = 33  # a reduction of fewer elements is one thread's loop


class Geometry(NamedTuple):
    """The shape of an operand and the axes that are reduced; reductions of one geometry run together."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def of(cls, node: Node) -> "Geometry":
        return cls(shape_of(node.inputs[0]), tuple(sorted(reduced_axes(node))))

    @property
    def reduced(self) -> tuple[int, ...]:
        """The lengths of the reduced axes."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def kept(self) -> tuple[int, ...]:
        """The lengths of the other axes: the shape of the results."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in self.axes)

    @property
    def is_long(self) -> bool:
        """Whether several threads share each reduction."""
        return math.prod(self.reduced) >= _LONG and math.prod(self.kept) > 0

    @property
    def by_rows(self) -> bool:
        """Whether neighbours in memory are reduced together."""
        last = max((axis for axis, n in enumerate(self.shape) if n > 1), default=0)
        return last in self.axes

    @property
    def lanes(self) -> tuple[int, int]:
        """Threads across the kept elements, and along each reduction: THREADS in all."""
        if self.by_rows:
            along = min(THREADS, max(32, _power_of_two(math.prod(self.reduced)) // 4))
            return THREADS // along, along
        across = min(_COLUMNS, _power_of_two(math.prod(self.kept)))
        return across, THREADS // across

    @property
    def tiles(self) -> int:
        """Workgroups across the kept elements."""
        return -(-math.prod(self.kept) // self.lanes[0])

    @property
    def splits(self) -> int:
        """Workgroups that share each reduction, a piece each."""
        pieces = math.prod(self.reduced) // _SPLIT_LENGTH
        return max(1, min(_SPLIT_GROUPS // self.tiles, pieces)) if self.tiles else 1

    @property
    def piece_length(self) -> int:
        """Elements of a piece, all but the last ones: a whole number for each thread."""
        along = self.lanes[1]
        return -(-math.prod(self.reduced) // (self.splits * along)) * along

    def place(self, kept: Sequence[T], reduced: Sequence[T]) -> list[T]:
        """The place in the operand, from those along the kept and the reduced axes."""
        return merged_place(self.axes, kept, reduced)


def is_split(node: Node) -> bool:
    """Whether a node is a reduction that several workgroups share, so that its end is in the next kernel."""
    return node.op in REDUCTIONS and not node.op.startswith("arg") and Geometry.of(node).splits > 1


def _power_of_two(n: int) -> int:
    """The least one from `n` on."""
    return 1 << max(n - 1, 0).bit_length()
