"""Buffer assignment: a slice of memory for every array of a program.

An output lies in the memory of a donated input where nothing is read there any more when it is written; where that
cannot be, it is copied there in the end. What only steps need lies in the arena, and what one dispatch alone reads last
may give its memory to what that dispatch writes. What updates an array writes to that array's own memory, if nobody
needs it as it was. In order: `update_in_place`, `alias_outputs`, `find_lifetimes`, `share_memory`, `place_in_arena`.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vk_kernels.compiler import arena
from vk_kernels.compiler.ir import Value
from vk_kernels.compiler.list_schedule import Access
from vk_kernels.compiler.partition import Partition, Step
from vk_kernels.runtime.dispatch_plan import Dispatch, Update
from vk_kernels.runtime.program import BufferSlice

Slices = dict[Hashable, BufferSlice]  # of a Value, or of scratch: (number of the step, number of the scratch)


@dataclass(frozen=True)
class PlannedDispatch:
    """A dispatch whose operands index into (*inputs, *outputs, *scratch) of its step.

    writes: whether it does, each. disjoint_writes: see `dispatch_plan.Dispatch`.
    """

    label: str
    kernel: Dispatch | bytes
    operands: tuple[int, ...]
    writes: tuple[bool, ...]
    groups: tuple[int, int, int]
    push_constants: bytes = b""
    disjoint_writes: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlannedStep:
    """A step, and what runs it."""

    step: Step
    dispatches: tuple[PlannedDispatch, ...]
    scratch: tuple[int, ...]
    shareable: frozenset[tuple[int, int]]  # (input, output) numbers of the step that may be the same memory
    updates: tuple[Update, ...] = ()

    def in_place(self, donor: Value, value: Value) -> bool:
        """Whether an input and an output of the step may be the same memory."""
        return (self.step.inputs.index(donor), self.step.outputs.index(value)) in self.shareable


def memory_of(index: int, planned: PlannedStep) -> list[Hashable]:
    """The memory that a step's dispatches number: its inputs, its outputs, its scratch."""
    scratch = ((index, number) for number in range(len(planned.scratch)))
    return [*planned.step.inputs, *planned.step.outputs, *scratch]


def update_in_place(
    partition: Partition, planned: Sequence[PlannedStep], donated: Sequence[bool]
) -> tuple[Partition, list[PlannedStep]]:
    """Makes one value of an array and its update, where no later step reads the array and the program may write to it.

    The dispatch that copies the one to the other is gone then.
    """
    last_reads = {value: i for i, step in enumerate(planned) for value in step.step.inputs}
    kept = {value for value, is_donated in zip(partition.inputs, donated, strict=True) if not is_donated}
    kept |= {*partition.constants, *partition.outputs}
    memory: dict[Value, Value] = {}  # of an update: the array that it began as
    found = []
    for i, step in enumerate(planned):
        inputs, outputs, left_out = step.step.inputs, step.step.outputs, set()
        for update in step.updates:
            array = inputs[update.input]
            if array not in kept and last_reads[array] == i and inputs.count(array) == 1:
                memory[outputs[update.output]] = memory.get(array, array)
                left_out.add(update.copy)
        found.append(
            replace(
                step,
                step=replace(step.step, inputs=_at(memory, inputs), outputs=_at(memory, outputs)),
                dispatches=tuple(one for n, one in enumerate(step.dispatches) if n not in left_out),
            )
        )
    return replace(partition, outputs=_at(memory, partition.outputs)), found


def _at(memory: Mapping[Value, Value], values: Iterable[Value]) -> tuple[Value, ...]:
    return tuple(memory.get(value, value) for value in values)


class Outputs(NamedTuple):
    """The places of a program's outputs.

    slices: of its inputs, constants and outputs, as far as they are known. aliases: output -> the donated input in
    whose memory it ends up. copied: outputs that are copied in the end, and where to.
    """

    slices: Slices
    aliases: dict[int, int]
    copied: list[tuple[Value, BufferSlice]]


def alias_outputs(partition: Partition, planned: Sequence[PlannedStep], donated: Sequence[bool]) -> Outputs:
    """Finds memory for the outputs.

    As in JAX, outputs take the donated inputs of their type in order, so that a state that comes back as it went in
    stays where it is.
    """
    inputs, outputs = partition.inputs, partition.outputs
    slices: Slices = {}
    for space, values in (("input", inputs), ("constant", partition.constants)):
        slices |= {value: BufferSlice(space, i, value.nbytes) for i, value in enumerate(values)}
    aliases: dict[int, int] = {}
    copied = []
    numbers = {value: i for i, value in enumerate(inputs) if donated[i]}
    waiting = []
    for j, value in enumerate(outputs):
        if value in numbers:  # given back as it came
            aliases[j] = numbers.pop(value)
        else:
            waiting.append(j)
    donors: dict[tuple, list[int]] = {}
    for value, i in numbers.items():
        donors.setdefault((value.shape, value.dtype), []).append(i)
    makers: dict[Value, int] = {}  # the first steps that write them
    for i, step in enumerate(planned):
        makers = dict.fromkeys(step.step.outputs, i) | makers
    last_reads = {value: i for i, step in enumerate(planned) for value in step.step.inputs}

    def overwrites(value: Value, donor: Value) -> bool:
        """Whether an output can be written to an input's memory: nothing reads that later, or elsewhere."""
        maker, last = makers[value], last_reads.get(donor, -1)
        return last < maker or (last == maker and planned[maker].in_place(donor, value))

    for j in waiting:
        value = outputs[j]
        place = BufferSlice("output", j, value.nbytes)
        found = donors.get((value.shape, value.dtype))
        if found:
            aliases[j] = i = found.pop(0)
            place = BufferSlice("input", i, value.nbytes)
        if value not in slices and (j not in aliases or overwrites(value, inputs[aliases[j]])):
            slices[value] = place
        else:
            copied.append((value, place))
    return Outputs(slices, aliases, copied)


def step_accesses(index: int, planned: PlannedStep, slices: Mapping[Hashable, BufferSlice]) -> list[Access]:
    """The accesses of each dispatch of a step: slices that are known, values and scratch that are not."""
    step = planned.step
    arrays = [slices.get(x, x) for x in memory_of(index, planned)]
    sizes = [*(value.nbytes for value in (*step.inputs, *step.outputs)), *planned.scratch]
    found = []
    for dispatch in planned.dispatches:
        written = {i for i, writes in zip(dispatch.operands, dispatch.writes, strict=True) if writes}
        reads, writes = (frozenset(arrays[i] for i in some) for some in (set(dispatch.operands) - written, written))
        disjoint_writes = frozenset(arrays[dispatch.operands[binding]] for binding in dispatch.disjoint_writes)
        found.append(Access(reads, writes, sum(sizes[i] for i in written), disjoint_writes))
    return found


class Lifetimes(NamedTuple):
    """The first and the last stage in which each memory is accessed, and by what: (stage, access)."""

    first: dict[Hashable, int]
    last: dict[Hashable, int]
    accesses: dict[Hashable, list[tuple[int, Access]]]

    def passes_on(self, donor: Hashable, value: Hashable) -> bool:
        """Whether nothing but the dispatch that writes `value` accesses `donor` then, or later."""
        if value not in self.first or self.last[donor] != self.first[value]:
            return False
        readers = [access for stage, access in self.accesses[donor] if stage == self.first[value]]
        return len(readers) == 1 and value in readers[0].writes


def find_lifetimes(
    accesses: Sequence[Sequence[Access]], stages: Sequence[Sequence[int]], copied: Iterable[Value]
) -> Lifetimes:
    """The lifetimes of all that dispatches access. copied: values that live until after the last stage."""
    found: dict[Hashable, list[tuple[int, Access]]] = {}
    for own, own_stages in zip(accesses, stages, strict=True):
        for access, stage in zip(own, own_stages, strict=True):
            for x in access.reads | access.writes:
                found.setdefault(x, []).append((stage, access))
    first = {x: min(stage for stage, _ in some) for x, some in found.items()}
    last = {x: max(stage for stage, _ in some) for x, some in found.items()}
    end = max(last.values(), default=0) + 1
    return Lifetimes(first, last | dict.fromkeys(copied, end), found)


class Blocks(NamedTuple):
    """Arrays of the arena: the number of each one's block, which several may share, and the blocks' lifetimes."""

    numbers: dict[Hashable, int]
    lifetimes: list[arena.Lifetime]


def share_memory(planned: Sequence[PlannedStep], lives: Lifetimes, known: Mapping[Hashable, BufferSlice]) -> Blocks:
    """A block for each array without a slice: an input's, where a step works in place and the input ends there."""
    blocks = Blocks({}, [])
    for index, step in enumerate(planned):
        donors = [x for x in step.step.inputs if x in blocks.numbers]
        made = memory_of(index, step)[len(step.step.inputs) :]
        sizes = [*(value.nbytes for value in step.step.outputs), *step.scratch]
        for x, nbytes in zip(made, sizes, strict=True):
            if x in known or x in blocks.numbers or x not in lives.last:  # the last: results that nobody makes
                continue
            shares = (y for y in donors if isinstance(x, Value) and step.in_place(y, x) and lives.passes_on(y, x))
            donor = next(shares, None)
            if donor is None:
                blocks.numbers[x] = len(blocks.lifetimes)
                blocks.lifetimes.append(arena.Lifetime(nbytes, lives.first.get(x, 0), lives.last.get(x, 0)))
            else:
                donors.remove(donor)
                number = blocks.numbers[x] = blocks.numbers[donor]
                blocks.lifetimes[number] = blocks.lifetimes[number]._replace(last=lives.last[x])
    return blocks


def place_in_arena(blocks: Blocks, known: Mapping[Hashable, BufferSlice], block: int) -> tuple[Slices, int]:
    """The slices of all memory, and the bytes of the arena, which is made of pieces of `block` bytes."""
    offsets, size = arena.place(blocks.lifetimes, block)
    nbytes = {x: x.nbytes if isinstance(x, Value) else blocks.lifetimes[k].nbytes for x, k in blocks.numbers.items()}
    return {**known, **{x: BufferSlice("arena", offsets[k], nbytes[x]) for x, k in blocks.numbers.items()}}, size
