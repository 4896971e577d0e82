"""Hazards: which accesses of memory must not run side by side, and so where barriers are.

Two accesses of the same bytes conflict where one reads what the other wrote (RAW), writes what the other read (WAR) or
writes what it wrote (WAW). Writes that are disjoint, of several commands into one array, do not conflict with one
another, but with all else that touches the array.
"""

from collections.abc import Hashable, Iterable, Sequence

# (which memory, first byte, the byte after the last)
Range = tuple[Hashable, int, int]


class PendingAccesses:
    """The accesses since the last barrier."""

    def __init__(self) -> None:
        self._read: list[Range] = []
        self._written: list[Range] = []
        self._written_disjointly: list[Range] = []

    def conflict(self, reads: Sequence[Range], writes: Sequence[Range], disjoint: Sequence[Range] = ()) -> bool:
        """Whether a command that makes these accesses needs a barrier before it.

        disjoint: of the ranges that it writes (not among `writes`), those whose bytes no other command that lists the
        range as disjoint touches.
        """
        raw = _overlap(reads, self._written) or _overlap(reads, self._written_disjointly)
        war = _overlap([*writes, *disjoint], self._read)
        waw = _overlap([*writes, *disjoint], self._written) or _overlap(writes, self._written_disjointly)
        return raw or war or waw

    def add(self, reads: Iterable[Range], writes: Iterable[Range], disjoint: Iterable[Range] = ()) -> None:
        """Counts a command's accesses."""
        self._read += reads
        self._written += writes
        self._written_disjointly += disjoint

    def clear(self) -> None:
        """Forgets all: there is a barrier."""
        for found in (self._read, self._written, self._written_disjointly):
            found.clear()


def _overlap(some: Sequence[Range], others: Sequence[Range]) -> bool:
    spans: dict[Hashable, list[tuple[int, int]]] = {}
    for memory, start, end in others:
        spans.setdefault(memory, []).append((start, end))
    return any(
        start < end_b and start_b < end for memory, start, end in some for start_b, end_b in spans.get(memory, ())
    )
