"""From steps to a program: kernels in order, and a place in memory for every array.

An output lies in the memory of a donated input where nothing is read there any more when it is written; where that
cannot be, it is copied there in the end. What only steps need lies in the arena.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vk_kernels.compiler import arena
from vk_kernels.compiler.codegen import cache, kernels
from vk_kernels.compiler.cost import step_flops
from vk_kernels.compiler.ir import Graph, Node, Value
from vk_kernels.compiler.list_schedule import Access, assign_stages
from vk_kernels.compiler.op_call import make_plan
from vk_kernels.compiler.partition import Partition, Step
from vk_kernels.errors import FeatureError
from vk_kernels.runtime.dispatch_plan import Array, Dispatch, kernel_of
from vk_kernels.runtime.program import BufferSlice, Command, Program

if TYPE_CHECKING:
    from vk_kernels.runtime.device import Device
    from vk_kernels.runtime.memory import Memory


_COPIES = 32  # of outputs, that one kernel does


@dataclass(frozen=True)
class _Dispatch:
    """A dispatch whose operands index into (*inputs, *outputs, *scratch) of its step.

    writes: whether it does, each. parts: see `dispatch_plan.Dispatch`.
    """

    label: str
    kernel: Dispatch | bytes
    operands: tuple[int, ...]
    writes: tuple[bool, ...]
    groups: tuple[int, int, int]
    push_constants: bytes = b""
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Planned:
    step: Step
    dispatches: tuple[_Dispatch, ...]
    scratch: tuple[int, ...]
    in_place: frozenset[tuple[int, int]]  # (input, output) numbers of the step that may be the same memory


def make_program(partition: Partition, device: "Device", donated: Sequence[bool]) -> Program:
    """Raises ValueError or FeatureError for what the kernels or the device cannot do, naming the line."""
    planned = [_plan(step, device) for step in partition.steps]
    memory = _Memory(partition, planned, donated, device.memory)
    ordered = []
    for index, plan in enumerate(planned):
        places = memory.places(index)
        flops = step_flops(plan.step)
        for number, dispatch in enumerate(plan.dispatches):
            operands = tuple(places[i] for i in dispatch.operands)
            command = Command(
                dispatch.label,
                plan.step.scope,
                dispatch.kernel,
                operands,
                dispatch.groups,
                dispatch.push_constants,
                0 if number else flops,
                dispatch.parts,
            )
            ordered.append((memory.stages[index][number], command))
    commands = [command for _, command in sorted(ordered, key=lambda item: item[0])]
    copies = memory.copies
    most = min(_COPIES, device.limits.storage_buffers // 2)
    for start in range(0, len(copies), most):
        commands += _copy(copies[start : start + most])
    return Program(
        tuple(commands),
        tuple(map(_array, partition.inputs)),
        tuple(map(_array, partition.outputs)),
        tuple(partition.constants.values()),
        memory.aliases,
        memory.arena_bytes,
        memory.arena_block,
    )


def _array(value: Value) -> Array:
    return Array(value.shape, value.dtype)


def _plan(step: Step, device: "Device") -> _Planned:
    if step.node is not None:
        return _plan_kernel_op(step, step.node, device)
    generated = cache.generate(step.graph)
    dispatches = tuple(
        _Dispatch(kernel.label, kernel.spirv, kernel.operands, kernel.writes, kernel.groups)
        for kernel in generated.kernels
    )
    return _Planned(step, dispatches, generated.scratch, generated.in_place)


def _plan_kernel_op(step: Step, node: Node, device: "Device") -> _Planned:
    inputs, outputs = (tuple(Array(x.shape, x.dtype) for x in values) for values in (node.inputs, node.outputs))
    try:
        plan = make_plan(device, node.call, inputs, outputs)
    except (ValueError, FeatureError) as error:
        raise type(error)(f"{error}: {node.source}") from None
    dispatches = []
    for dispatch in plan.dispatches:
        name = f"{dispatch.kernel}.{dispatch.variant}" if dispatch.variant else dispatch.kernel
        label = f"{name} of {node.op}({', '.join(map(str, inputs))})"
        writes = kernel_of(device, dispatch).writable
        launched = dispatch.operands, writes, dispatch.groups, dispatch.push_constants
        dispatches.append(_Dispatch(label, dispatch, *launched, dispatch.parts))
    return _Planned(step, tuple(dispatches), plan.scratch, frozenset())


def _copy(copies: Sequence[tuple[BufferSlice, BufferSlice, Value]]) -> list[Command]:
    """In one kernel: no place that is copied from is one that is copied to."""
    sources = {value: source for source, _, value in copies}
    graph = Graph(tuple(sources), {}, [], tuple(value for _, _, value in copies))
    generated = kernels.generate(graph, "copy")
    places = (*sources.values(), *(target for _, target, _ in copies))
    return [
        Command(kernel.label, "", kernel.spirv, tuple(places[i] for i in kernel.operands), kernel.groups)
        for kernel in generated.kernels
    ]


class _Memory:
    """Places of all arrays of a program."""

    def __init__(self, partition: Partition, planned: Sequence[_Planned], donated: Sequence[bool], memory: "Memory"):
        """memory: the device's. Raises BufferSizeError for an array that it does not give at once."""
        self._partition, self._planned = partition, planned
        self._steps = {value: i for i, plan in enumerate(planned) for value in plan.step.outputs}
        self._last_reads: dict[Value, int] = {}
        for i, plan in enumerate(planned):
            self._last_reads |= dict.fromkeys(plan.step.inputs, i)
        self._places: dict[Value, BufferSlice] = {}
        for space, values in (("input", partition.inputs), ("constant", partition.constants)):
            self._places |= {value: BufferSlice(space, i, value.nbytes) for i, value in enumerate(values)}
        self.aliases: dict[int, int] = {}
        self._copied: list[tuple[Value, BufferSlice]] = []  # in the end
        self._place_outputs(donated)
        self._accesses = [self._step_accesses(index) for index in range(len(planned))]
        levels = [plan.step.level for plan in planned]
        kept = set(self._places.values())
        self.stages = assign_stages(list(zip(levels, self._accesses, strict=True)), kept)
        self._scratch: list[list[BufferSlice]] = []
        self.arena_block = memory.largest(sliced=True)[0] // arena.ALIGNMENT * arena.ALIGNMENT
        self.arena_bytes = self._place_rest(memory)

    @property
    def copies(self) -> list[tuple[BufferSlice, BufferSlice, Value]]:
        """(from, to, what), after all steps."""
        return [(self._places[value], target, value) for value, target in self._copied]

    def places(self, index: int) -> list[BufferSlice]:
        """Of the inputs, outputs and scratch of a step."""
        step = self._planned[index].step
        return [*(self._places[value] for value in (*step.inputs, *step.outputs)), *self._scratch[index]]

    def _place_outputs(self, donated: Sequence[bool]) -> None:
        """Finds memory for the outputs. As in JAX, outputs take the donated inputs of their type in order, so that a
        state that comes back as it went in stays where it is."""
        inputs, outputs = self._partition.inputs, self._partition.outputs
        numbers = {value: i for i, value in enumerate(inputs) if donated[i]}
        waiting = []
        for j, value in enumerate(outputs):
            if value in numbers:  # given back as it came
                self.aliases[j] = numbers.pop(value)
            else:
                waiting.append(j)
        donors: dict[tuple, list[int]] = {}
        for value, i in numbers.items():
            donors.setdefault((value.shape, value.dtype), []).append(i)
        for j in waiting:
            value = outputs[j]
            place = BufferSlice("output", j, value.nbytes)
            found = donors.get((value.shape, value.dtype))
            if found:
                self.aliases[j] = i = found.pop(0)
                place = BufferSlice("input", i, value.nbytes)
            if value not in self._places and (j not in self.aliases or self._overwrites(value, self.aliases[j])):
                self._places[value] = place
            else:
                self._copied.append((value, place))

    def _overwrites(self, value: Value, i: int) -> bool:
        """Whether a step's output can be written to an input's memory: nothing reads that later, or elsewhere."""
        donor, index = self._partition.inputs[i], self._steps[value]
        last = self._last_reads.get(donor, -1)
        return last < index or (last == index and self._in_place(index, donor, value))

    def _in_place(self, index: int, donor: Value, value: Value) -> bool:
        plan = self._planned[index]
        return (plan.step.inputs.index(donor), plan.step.outputs.index(value)) in plan.in_place

    def _step_accesses(self, index: int) -> list[Access]:
        """What each dispatch of a step accesses: places that are known, arrays and scratch that are not."""
        plan = self._planned[index]
        arrays = [self._places.get(value, value) for value in (*plan.step.inputs, *plan.step.outputs)]
        arrays += [(index, number) for number in range(len(plan.scratch))]
        sizes = [*(value.nbytes for value in (*plan.step.inputs, *plan.step.outputs)), *plan.scratch]
        found = []
        for dispatch in plan.dispatches:
            written = {i for i, writes in zip(dispatch.operands, dispatch.writes, strict=True) if writes}
            reads, writes = (frozenset(arrays[i] for i in some) for some in (set(dispatch.operands) - written, written))
            parts = frozenset(arrays[dispatch.operands[binding]] for binding in dispatch.parts)
            found.append(Access(reads, writes, sum(sizes[i] for i in written), parts))
        return found

    def _place_rest(self, memory: "Memory") -> int:
        """Places what is left in the arena, by the stages in which it lives; gives the arena's bytes."""
        lives: dict[Hashable, list[tuple[int, Access]]] = {}
        for accesses, stages in zip(self._accesses, self.stages, strict=True):
            for access, stage in zip(accesses, stages, strict=True):
                for x in access.reads | access.writes:
                    lives.setdefault(x, []).append((stage, access))
        first = {x: min(stage for stage, _ in found) for x, found in lives.items()}
        last = {x: max(stage for stage, _ in found) for x, found in lives.items()}
        end = max(last.values(), default=0) + 1
        last |= {value: end for value, _ in self._copied}

        def takes(value: Value, donor: Value) -> bool:
            """Whether nobody but the dispatch that writes an array reads the other then, or later."""
            readers = [access for stage, access in lives[donor] if stage == first[value]]
            return last[donor] == first[value] and len(readers) == 1 and value in readers[0].writes

        lifetimes: list[arena.Lifetime] = []
        blocks: dict[Hashable, int] = {}
        for index, plan in enumerate(self._planned):
            donors = [x for x in plan.step.inputs if x in blocks]
            scratch = [(index, number) for number in range(len(plan.scratch))]
            sizes = [value.nbytes for value in plan.step.outputs] + list(plan.scratch)
            for x, nbytes in zip((*plan.step.outputs, *scratch), sizes, strict=True):
                if x in self._places:
                    continue
                donor = None
                if x in plan.step.outputs and x in lives:
                    donor = next((y for y in donors if self._in_place(index, y, x) and takes(x, y)), None)
                if donor is None:
                    blocks[x] = len(lifetimes)
                    lifetimes.append(arena.Lifetime(nbytes, first.get(x, 0), last.get(x, 0)))
                else:
                    donors.remove(donor)
                    blocks[x] = blocks[donor]
                    lifetimes[blocks[x]] = lifetimes[blocks[x]]._replace(last=last[x])
        memory.check_size(max((arena.padded(lifetime.nbytes) for lifetime in lifetimes), default=0), sliced=True)
        offsets, size = arena.place(lifetimes, self.arena_block)
        for x, k in blocks.items():
            if isinstance(x, Value):
                self._places[x] = BufferSlice("arena", offsets[k], x.nbytes)
        for index, plan in enumerate(self._planned):
            numbers = [blocks[index, number] for number in range(len(plan.scratch))]
            self._scratch.append([BufferSlice("arena", offsets[k], lifetimes[k].nbytes) for k in numbers])
        return size
