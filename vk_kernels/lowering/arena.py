"""Where the arrays of a program lie in memory: by liveness, so that those of different times share it."""

from collections.abc import Sequence
from typing import NamedTuple

from vk_kernels.errors import BufferSizeError

ALIGNMENT = 256  # bytes; no device asks for more


class Lifetime(NamedTuple):
    """An array of `nbytes` that must be whole from time `first` to time `last`, both included."""

    nbytes: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime], block: int) -> tuple[list[int], int]:
    """The offset of each array, and the bytes of all: no two that live at one time overlap, and none lies in two of
    the blocks of `block` bytes, a multiple of ALIGNMENT, that the memory is made of.

    The largest are placed first, each as low as it fits. Source: the greedy-by-size order of Pisarchyk and Lee,
    "Efficient memory management for deep neural net inference" (2020). Raises BufferSizeError for an array that is
    larger than a block.
    """
    offsets = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end), by offset
    for i in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, i)):
        own, offset = lifetimes[i], 0
        size = max(1, -(-own.nbytes // ALIGNMENT)) * ALIGNMENT
        if size > block:
            raise BufferSizeError(f"an array of {own.nbytes:,} bytes: the device takes at most {block:,} at once")
        for start, end, other in placed:
            if other.first > own.last or own.first > other.last:
                continue
            if start >= _in_one_block(offset, size, block) + size:
                break
            offset = max(offset, end)
        offset = _in_one_block(offset, size, block)
        offsets[i] = offset
        placed.append((offset, offset + size, own))
        placed.sort(key=lambda item: item[0])
    return offsets, max((end for _, end, _ in placed), default=0)


def _in_one_block(offset: int, size: int, block: int) -> int:
    """The offset, or the start of the next block where `size` bytes from there would end in another."""
    return offset if offset % block + size <= block else -(-offset // block) * block
