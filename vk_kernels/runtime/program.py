"""Program: all dispatches of a function as plain data, of which an `executable.Executable` is made on a device.

A `dispatch_plan.Plan` is the same for one operation; the plans of a function's operations become commands here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vk_kernels.runtime import dispatch_plan


class BufferSlice(NamedTuple):
    """Where an array lies: the `index`-th input, output or constant, or `index` bytes into the arena."""

    space: str
    index: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.space}{f'+{self.index}' if self.space == 'arena' else f'[{self.index}]'}"


@dataclass(frozen=True)
class Command:
    """One dispatch. kernel: one that ships, or SPIR-V. operands: in binding order.

    scope: the names around what it does (`jax.named_scope`). flops: useful floating-point operations, roughly.
    parts: see `plan.Dispatch`.
    """

    label: str
    scope: str
    kernel: dispatch_plan.Dispatch | bytes
    operands: tuple[BufferSlice, ...]
    groups: tuple[int, int, int]
    push_constants: bytes = b""
    flops: int = 0
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """Commands in order.

    aliases: output -> the donated input in whose memory it is. arena_bytes: in blocks of arena_block bytes, and what is
    left; no array is in two.
    """

    commands: tuple[Command, ...]
    inputs: tuple[dispatch_plan.Array, ...]
    outputs: tuple[dispatch_plan.Array, ...]
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
    parts: Sequence[Sequence[int]] | None = None,
) -> list[bool]:
    """Whether each command needs a barrier before it: it reads or writes what one since the last barrier wrote, or
    writes what one read. parts: the operands of each command that are parts to it, see `plan.Dispatch`."""
    found, read, written, in_parts = [], [], [], []
    for places, writes, own in zip(operands, writable, parts or [()] * len(operands), strict=True):
        ranges = [_range(place) for place in places]
        outs = [span for span, writes_it in zip(ranges, writes, strict=True) if writes_it]
        whole = [span for binding, span in enumerate(ranges) if binding not in own]
        hazard = _meet(ranges, written) or _meet(whole, in_parts) or _meet(outs, read)
        if hazard:
            read, written, in_parts = [], [], []
        found.append(hazard)
        read += whole
        written += [span for binding, span in enumerate(ranges) if writes[binding] and binding not in own]
        in_parts += [ranges[binding] for binding in own]
    return found


def _range(place: BufferSlice) -> tuple[str, int, int]:
    """(what memory, start, end)."""
    if place.space == "arena":
        return "arena", place.index, place.index + max(place.nbytes, 1)
    return f"{place.space}{place.index}", 0, 1


def _meet(some: Sequence[tuple[str, int, int]], others: Sequence[tuple[str, int, int]]) -> bool:
    spans: dict[str, list[tuple[int, int]]] = {}
    for space, start, end in others:
        spans.setdefault(space, []).append((start, end))
    return any(start < end_b and start_b < end for space, start, end in some for start_b, end_b in spans.get(space, ()))
