"""List scheduling: the dispatches of a program in stages, with a barrier between one stage and the next.

Dispatches of one stage need nothing of each other and run side by side: both products of a matrix product's gradient,
then what finishes each of them. Few stages mean few barriers, and each of them well filled.
"""

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

_EARLY_BYTES = 1 << 20  # that may be written before the level of a step


class Access(NamedTuple):
    """The memory that a dispatch reads, and that it writes; and how many bytes it writes.

    disjoint_writes: memory of which it writes a region that no other access listing it touches: they may share a stage.
    """

    reads: frozenset[Hashable]
    writes: frozenset[Hashable]
    nbytes: int = 0
    disjoint_writes: frozenset[Hashable] = frozenset()


def assign_stages(steps: Sequence[tuple[int, Sequence[Access]]], kept: Collection[Hashable] = ()) -> list[list[int]]:
    """The stage of each dispatch of each step, (level, accesses of its dispatches). kept: memory that is not shared.

    Steps are in an order, and by level, in which they could run one dispatch at a time. Two dispatches of which one
    writes what the other one accesses are in different stages, in that order. The dispatches of a step stay together:
    it ends no sooner than its level starts, so that its results are not kept for long. Where the rest would have to
    wait for a part that needs nothing of the level before, that part comes earlier, unless it writes much. In the end
    steps of one dispatch are put off until just before their results are read, if that keeps nothing else for longer.
    """
    past = _Past()
    stages: list[list[int]] = []
    start = level = -1  # the stage at which the level starts
    for i, (own_level, accesses) in enumerate(steps):
        if own_level != level:
            level = own_level
            peers = [other for other_level, other in steps[i:] if other_level == level]
            ready = [max(map(past.after, other)) for other in peers if other]
            start = min((stage for stage in ready if stage > start), default=start + 1)
        offsets = _offsets(accesses)
        first = start - max(offsets, default=0)
        for access, offset in zip(accesses, offsets, strict=True):
            first = max(first, past.after(access) - offset)
        early = sum(access.nbytes for access, offset in zip(accesses, offsets, strict=True) if first + offset < start)
        first = max(first, start) if early > _EARLY_BYTES else first
        stages.append([first + offset for offset in offsets])
        for access, stage in zip(accesses, stages[-1], strict=True):
            past.note(access, stage)
    _delay_to_last_use([accesses for _, accesses in steps], stages, kept)
    return stages


def _delay_to_last_use(steps: Sequence[Sequence[Access]], stages: list[list[int]], kept: Collection[Hashable]) -> None:
    read: dict[Hashable, int] = {}  # the first stage, of the steps from here on, that reads, or writes
    written: dict[Hashable, int] = {}
    last: dict[Hashable, int] = {}  # the last stage that does either
    for accesses, own in reversed(list(zip(steps, stages, strict=True))):
        if len(accesses) == 1:
            (access,), (stage,) = accesses, own
            latest = [found[x] - 1 for found in (read, written) for x in access.writes if x in found]
            latest += [written[x] - 1 for x in access.reads if x in written]
            latest += [last.get(x, stage) for x in access.reads if x not in kept]
            own[0] = max(stage, min(latest, default=stage))
        for access, stage in zip(accesses, own, strict=True):
            for found, places in ((read, access.reads), (written, access.writes)):
                for x in places:
                    found[x] = min(stage, found.get(x, stage))
                    last[x] = max(stage, last.get(x, stage))


class _Past:
    """The last stages in which memory was read, written, and written by one dispatch alone."""

    def __init__(self) -> None:
        self._read: dict[Hashable, int] = {}
        self._written: dict[Hashable, int] = {}
        self._alone: dict[Hashable, int] = {}

    def after(self, access: Access) -> int:
        """The first stage in which an access may be: one after all that it conflicts with (see `runtime.hazards`)."""
        alone, disjoint = access.writes - access.disjoint_writes, access.disjoint_writes
        raw = [self._written.get(x, -1) for x in access.reads]
        war = [self._read.get(x, -1) for x in access.writes]
        waw = [self._written.get(x, -1) for x in alone] + [self._alone.get(x, -1) for x in disjoint]
        return 1 + max([-1, *raw, *war, *waw])

    def note(self, access: Access, stage: int) -> None:
        alone = access.writes - access.disjoint_writes
        for found, places in ((self._read, access.reads), (self._written, access.writes), (self._alone, alone)):
            for x in places:
                found[x] = max(stage, found.get(x, -1))


def _offsets(accesses: Sequence[Access]) -> list[int]:
    """How many stages after the step's first one each of its dispatches is."""
    past, offsets = _Past(), []
    for access in accesses:
        offsets.append(past.after(access))
        past.note(access, offsets[-1])
    return offsets
