"""Dead dispatches: what an op of several results does for those alone that nobody reads.

A product's gradient makes dx and dw, each by dispatches of its own: for a matrix that is not trained, those of dw go,
and with them what computes their operands for nobody else.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from vk_kernels.compiler.buffer_assignment import PlannedStep, memory_of
from vk_kernels.compiler.ir import Value


def drop_dead_dispatches(planned: Sequence[PlannedStep], outputs: Iterable[Value]) -> list[PlannedStep]:
    """The steps without the dispatches that write nothing which a later one, or an output, needs."""
    needed: set[Hashable] = set(outputs)
    found = []
    for index in reversed(range(len(planned))):
        step = planned[index]
        memory = memory_of(index, step)
        alive = []
        for dispatch in reversed(step.dispatches):
            accessed = [memory[i] for i in dispatch.operands]
            if any(writes and x in needed for x, writes in zip(accessed, dispatch.writes, strict=True)):
                needed.update(accessed)  # also what it writes: it may add to what is there
                alive.append(dispatch)
        found.append(replace(step, dispatches=tuple(reversed(alive))))
    return found[::-1]
