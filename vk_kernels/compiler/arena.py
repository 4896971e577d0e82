"""The arena: arrays of a program share memory by liveness, those of different times the same bytes."""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 256  # bytes; no device asks for more


class Lifetime(NamedTuple):
    """An array of `nbytes` that must be whole from time `first` to time `last`, both included."""

    nbytes: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime], block: int) -> tuple[list[int], int]:
    """The offset of each array, and the bytes of all: no two that live at one time overlap, and none lies in two of
    the blocks of `block` bytes, a multiple of ALIGNMENT, that the memory is made of; none is larger than a block.

    Each is placed as low as it fits, in the better of two orders: the largest first; and before all others those that
    live when most memory is in use, the longest-lived first, which makes a stack of them without holes. Source of the
    first: the greedy-by-size order of Pisarchyk and Lee, "Efficient memory management for deep neural net inference"
    (2020).
    """
    in_use = _bytes_in_use(lifetimes)
    most = max(in_use, default=0)
    fullest = in_use.index(most) if in_use else 0

    def stacked(i: int) -> tuple[int, int]:
        own = lifetimes[i]
        return (0, own.first - own.last) if own.first <= fullest <= own.last else (1, 0)

    by_size = sorted(range(len(lifetimes)), key=lambda i: -lifetimes[i].nbytes)
    placed = _place_in_order(lifetimes, by_size, block)
    if placed[1] > most:
        placed = min(placed, _place_in_order(lifetimes, sorted(by_size, key=stacked), block), key=lambda p: p[1])
    return placed


def _bytes_in_use(lifetimes: Sequence[Lifetime]) -> list[int]:
    """At each time, without what lies between arrays."""
    changes = [0] * (max((own.last for own in lifetimes), default=-1) + 2)
    for own in lifetimes:
        changes[own.first] += padded(own.nbytes)
        changes[own.last + 1] -= padded(own.nbytes)
    return list(itertools.accumulate(changes))


def _place_in_order(lifetimes: Sequence[Lifetime], order: Sequence[int], block: int) -> tuple[list[int], int]:
    offsets = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end), by offset
    for i in order:
        own, offset, size = lifetimes[i], 0, padded(lifetimes[i].nbytes)
        for start, end, other in placed:
            if other.first > own.last or own.first > other.last:
                continue
            if start >= _in_one_block(offset, size, block) + size:
                break
            offset = max(offset, end)
        offset = _in_one_block(offset, size, block)
        offsets[i] = offset
        bisect.insort(placed, (offset, offset + size, own), key=lambda item: item[0])
    return offsets, max((end for _, end, _ in placed), default=0)


def padded(nbytes: int) -> int:
    """Bytes that an array takes."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


def _in_one_block(offset: int, size: int, block: int) -> int:
    """The offset, or the start of the next block where `size` bytes from there would end in another."""
    return offset if offset % block + size <= block else -(-offset // block) * block
