"""Program: all dispatches of a function as plain data, of which an `executable.Executable` is made on a device.

A `dispatch_plan.Plan` is the same for one operation; the plans of a function's operations become commands here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vk_kernels.runtime import dispatch_plan
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.hazards import Accesses, PendingAccesses, Range


class BufferSlice(NamedTuple):
    """A range of memory: the whole `index`-th input, output or constant, or `nbytes` at `index` in the arena."""

    space: str
    index: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.space}{f'+{self.index}' if self.space == 'arena' else f'[{self.index}]'}"


@dataclass(frozen=True)
class Command:
    """One dispatch.

    kernel: one that ships, or SPIR-V. operands: in binding order. scope: the `jax.named_scope`s around it, joined by /.
    flops: useful floating-point operations, roughly. disjoint_writes: see `dispatch_plan.Dispatch`.
    """

    label: str
    scope: str
    kernel: dispatch_plan.Dispatch | bytes
    operands: tuple[BufferSlice, ...]
    groups: tuple[int, int, int]
    push_constants: bytes = b""
    flops: int = 0
    disjoint_writes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A function's commands in order, with the arrays that they work on.

    aliases: output -> the donated input in whose memory it is.
    arena_bytes: cut into blocks of arena_block bytes, the last one shorter; no array spans two.
    """

    commands: tuple[Command, ...]
    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    constants: tuple[np.ndarray, ...]
    aliases: dict[int, int]
    arena_bytes: int
    arena_block: int

    def unused_inputs(self) -> frozenset[int]:
        """Inputs that no command accesses, and whose memory no output takes."""
        read = {place.index for command in self.commands for place in command.operands if place.space == "input"}
        return frozenset(range(len(self.inputs))) - read - set(self.aliases.values())


def find_barriers(
    operands: Sequence[Sequence[BufferSlice]],
    writable: Sequence[Sequence[bool]],
    disjoint_writes: Sequence[Sequence[int]] | None = None,
) -> list[bool]:
    """Whether each command needs a barrier before it.

    writable: whether it writes each operand. disjoint_writes: the operands that it writes disjointly, see
    `dispatch_plan.Dispatch`.
    """
    found, pending = [], PendingAccesses()
    for places, writes, own in zip(operands, writable, disjoint_writes or [()] * len(operands), strict=True):
        accesses = command_accesses(places, writes, own)
        found.append(pending.conflict(*accesses))
        if found[-1]:
            pending.clear()
        pending.add(*accesses)
    return found


def command_accesses(
    operands: Sequence[BufferSlice], writable: Sequence[bool], disjoint_writes: Sequence[int]
) -> Accesses:
    """A command's accesses to memory; it may read what it writes, but not what others write beside it."""
    ranges = list(map(_range, operands))
    numbers = [i for i in range(len(ranges)) if i not in disjoint_writes]
    reads, alone = [ranges[i] for i in numbers], [ranges[i] for i in numbers if writable[i]]
    return reads, alone, [ranges[i] for i in disjoint_writes]


def _range(place: BufferSlice) -> Range:
    if place.space == "arena":
        return "arena", place.index, place.index + max(place.nbytes, 1)
    return f"{place.space}{place.index}", 0, 1
