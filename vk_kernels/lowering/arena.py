"""Where the arrays of a program lie in one block of memory: by liveness, so that those of different times share it."""

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 256  # bytes; no device asks for more


class Lifetime(NamedTuple):
    """An array of `nbytes` that must be whole from time `first` to time `last`, both included."""

    nbytes: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """The offset of each array, and the bytes of all: no two that live at one time overlap.

    The largest are placed first, each as low as it fits. Source: the greedy-by-size order of Pisarchyk and Lee,
    "Efficient memory management for deep neural net inference" (2020).
    """
    offsets = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end), by offset
    for i in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, i)):
        own, offset = lifetimes[i], 0
        size = max(1, -(-own.nbytes // ALIGNMENT)) * ALIGNMENT
        for start, end, other in placed:
            if other.first > own.last or own.first > other.last:
                continue
            if start >= offset + size:
                break
            offset = max(offset, end)
        offsets[i] = offset
        placed.append((offset, offset + size, own))
        placed.sort(key=lambda item: item[0])
    return offsets, max((end for _, end, _ in placed), default=0)
