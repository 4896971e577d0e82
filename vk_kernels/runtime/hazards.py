"""Hazards: which accesses of memory must not run side by side, and so where barriers are.

Two accesses of the same bytes conflict where one reads what the other wrote (RAW), writes what the other read (WAR) or
writes what it wrote (WAW). Writes that are disjoint, of several commands into one array, do not conflict with one
another, but with all else that touches the array.
"""

from collections.abc import Hashable, Iterable, Sequence

# (which memory, first byte, the byte after the last)
Range = tuple[Hashable, int, int]
# What a command reads, what it writes alone, and what disjointly
Accesses = tuple[Sequence[Range], Sequence[Range], Sequence[Range]]


class _Spans:
    """Ranges, by the memory that they are in."""

    def __init__(self) -> None:
        self._spans: dict[Hashable, list[tuple[int, int]]] = {}

    def add(self, ranges: Iterable[Range]) -> None:
        for memory, start, end in ranges:
            self._spans.setdefault(memory, []).append((start, end))

    def overlap(self, ranges: Iterable[Range]) -> bool:
        """Whether any of `ranges` shares a byte with one of these."""
        return any(
            start < other_end and other_start < end
            for memory, start, end in ranges
            for other_start, other_end in self._spans.get(memory, ())
        )

    def clear(self) -> None:
        self._spans.clear()


class PendingAccesses:
    """The accesses since the last barrier."""

    def __init__(self) -> None:
        self._read, self._written, self._written_disjointly = _Spans(), _Spans(), _Spans()

    def conflict(self, reads: Sequence[Range], writes: Sequence[Range], disjoint: Sequence[Range] = ()) -> bool:
        """Whether a command that makes these accesses needs a barrier before it.

        disjoint: of the ranges that it writes (not among `writes`), those whose bytes no other command that lists the
        range as disjoint touches.
        """
        written = [*writes, *disjoint]
        raw = self._written.overlap(reads) or self._written_disjointly.overlap(reads)
        war = self._read.overlap(written)
        waw = self._written.overlap(written) or self._written_disjointly.overlap(writes)
        return raw or war or waw

    def add(self, reads: Iterable[Range], writes: Iterable[Range], disjoint: Iterable[Range] = ()) -> None:
        """Counts a command's accesses."""
        self._read.add(reads)
        self._written.add(writes)
        self._written_disjointly.add(disjoint)

    def clear(self) -> None:
        """Forgets all: there is a barrier."""
        for spans in (self._read, self._written, self._written_disjointly):
            spans.clear()


def waiting_first(stages: Iterable[Sequence[Accesses]]) -> list[list[int]]:
    """The order of the commands of each stage in which those come first that a barrier must come before.

    A command before the barrier would run in the stage before, where a long one may be what all the others wait for.
    """
    pending, orders = PendingAccesses(), []
    for commands in stages:
        waits = [pending.conflict(*accesses) for accesses in commands]
        orders.append(sorted(range(len(commands)), key=lambda i: not waits[i]))
        if any(waits):
            pending.clear()
        for accesses in commands:
            pending.add(*accesses)
    return orders
