"""From steps to a program: kernels in order, and a place in memory for every array.

An output lies in the memory of a donated input where nothing is read there any more when it is written; where that
cannot be, it is copied there in the end. What only steps need lies in the arena.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vk_kernels.lowering import arena, call, codegen
from vk_kernels.lowering.fuse import Partition, Step
from vk_kernels.lowering.graph import Graph, Node, Value
from vk_kernels.plan import Array, Dispatch
from vk_kernels.program import Command, Place, Program

if TYPE_CHECKING:
    from vk_kernels.device import Device


_COPIES = 32  # of outputs, that one kernel does


@dataclass(frozen=True)
class _Dispatch:
    """A dispatch whose operands index into (*inputs, *outputs, *scratch) of its step."""

    label: str
    kernel: Dispatch | bytes
    operands: tuple[int, ...]
    groups: tuple[int, int, int]
    push_constants: bytes = b""


@dataclass(frozen=True)
class _Planned:
    step: Step
    dispatches: tuple[_Dispatch, ...]
    scratch: tuple[int, ...]
    in_place: frozenset[tuple[int, int]]  # (input, output) numbers of the step that may be the same memory


def make_program(partition: Partition, device: "Device", donated: Sequence[bool]) -> Program:
    """Raises ValueError or FeatureError for what the kernels or the device cannot do, naming the line."""
    planned = [_plan(step, device) for step in partition.steps]
    memory = _Memory(partition, planned, donated)
    commands = []
    for index, plan in enumerate(planned):
        places = memory.places(index)
        flops = _flops(plan.step)
        for number, dispatch in enumerate(plan.dispatches):
            operands = tuple(places[i] for i in dispatch.operands)
            commands.append(
                Command(
                    dispatch.label,
                    plan.step.scope,
                    dispatch.kernel,
                    operands,
                    dispatch.groups,
                    dispatch.push_constants,
                    0 if number else flops,
                )
            )
    copies = memory.copies
    for start in range(0, len(copies), _COPIES):
        commands += _copy(copies[start : start + _COPIES])
    return Program(
        tuple(commands),
        tuple(map(_array, partition.inputs)),
        tuple(map(_array, partition.outputs)),
        tuple(partition.constants.values()),
        memory.aliases,
        memory.arena_bytes,
    )


def _array(value: Value) -> Array:
    return Array(value.shape, value.dtype)


def _plan(step: Step, device: "Device") -> _Planned:
    if step.node is not None:
        return _plan_hot(step, step.node, device)
    generated = codegen.generate(step.graph)
    dispatches = tuple(
        _Dispatch(kernel.label, kernel.spirv, kernel.operands, kernel.groups) for kernel in generated.kernels
    )
    return _Planned(step, dispatches, generated.scratch, generated.in_place)


def _plan_hot(step: Step, node: Node, device: "Device") -> _Planned:
    inputs, outputs = (tuple(Array(x.shape, x.dtype) for x in values) for values in (node.inputs, node.outputs))
    try:
        plan = call.make_plan(device, node.call, inputs, outputs)
    except ValueError as error:
        raise ValueError(f"{error}: {node.source}") from None
    dispatches = []
    for dispatch in plan.dispatches:
        name = f"{dispatch.kernel}.{dispatch.variant}" if dispatch.variant else dispatch.kernel
        label = f"{name} of {node.op}({', '.join(map(str, inputs))})"
        dispatches.append(_Dispatch(label, dispatch, dispatch.operands, dispatch.groups, dispatch.push_constants))
    return _Planned(step, tuple(dispatches), plan.scratch, frozenset())


def _copy(copies: Sequence[tuple[Place, Place, Value]]) -> list[Command]:
    """In one kernel: no place that is copied from is one that is copied to."""
    sources = {value: source for source, _, value in copies}
    graph = Graph(tuple(sources), {}, [], tuple(value for _, _, value in copies))
    generated = codegen.generate(graph, "copy")
    places = (*sources.values(), *(target for _, target, _ in copies))
    return [
        Command(kernel.label, "", kernel.spirv, tuple(places[i] for i in kernel.operands), kernel.groups)
        for kernel in generated.kernels
    ]


class _Memory:
    """Places of all arrays of a program."""

    def __init__(self, partition: Partition, planned: Sequence[_Planned], donated: Sequence[bool]):
        self._partition, self._planned = partition, planned
        self._steps = {value: i for i, plan in enumerate(planned) for value in plan.step.outputs}
        self._last_reads: dict[Value, int] = {}
        for i, plan in enumerate(planned):
            self._last_reads |= dict.fromkeys(plan.step.inputs, i)
        self._places: dict[Value, Place] = {}
        for space, values in (("input", partition.inputs), ("constant", partition.constants)):
            self._places |= {value: Place(space, i, value.nbytes) for i, value in enumerate(values)}
        self.aliases: dict[int, int] = {}
        self._copied: list[tuple[Value, Place]] = []  # in the end
        self._place_outputs(donated)
        self._scratch: list[list[Place]] = []
        self.arena_bytes = self._place_rest()

    @property
    def copies(self) -> list[tuple[Place, Place, Value]]:
        """(from, to, what), after all steps."""
        return [(self._places[value], target, value) for value, target in self._copied]

    def places(self, index: int) -> list[Place]:
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
            place = Place("output", j, value.nbytes)
            found = donors.get((value.shape, value.dtype))
            if found:
                self.aliases[j] = i = found.pop(0)
                place = Place("input", i, value.nbytes)
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

    def _place_rest(self) -> int:
        """Places what is left in the arena, by the levels at which it lives; gives the arena's bytes."""
        end = max((plan.step.level for plan in self._planned), default=0) + 1
        kept = {value for value, _ in self._copied}
        lifetimes: list[arena.Lifetime] = []
        blocks: dict[Value, int] = {}
        scratch: list[list[int]] = []
        for index, plan in enumerate(self._planned):
            level = plan.step.level
            ending = [x for x in plan.step.inputs if x in blocks and x not in kept and self._last_reads[x] == index]
            for value in plan.step.outputs:
                if value in self._places:
                    continue
                last = self._planned[self._last_reads[value]].step.level if value in self._last_reads else level
                last = end if value in kept else last
                donor = next((x for x in ending if self._in_place(index, x, value)), None)
                if donor is None:
                    blocks[value] = len(lifetimes)
                    lifetimes.append(arena.Lifetime(value.nbytes, level, last))
                else:
                    ending.remove(donor)
                    blocks[value] = blocks[donor]
                    before = lifetimes[blocks[donor]]
                    lifetimes[blocks[donor]] = before._replace(last=max(before.last, last))
            scratch.append(list(range(len(lifetimes), len(lifetimes) + len(plan.scratch))))
            lifetimes += [arena.Lifetime(nbytes, level, level) for nbytes in plan.scratch]
        offsets, size = arena.place(lifetimes)
        self._places |= {value: Place("arena", offsets[k], value.nbytes) for value, k in blocks.items()}
        for numbers in scratch:
            self._scratch.append([Place("arena", offsets[k], lifetimes[k].nbytes) for k in numbers])
        return size


def _flops(step: Step) -> int:
    """Useful floating-point operations of a step: 2 for each multiplication of a product, 1 for each element else."""
    if step.node is None:
        return sum(map(_node_flops, step.graph.nodes))
    return _HOT_FLOPS.get(step.node.op, lambda node: sum(x.size for x in node.outputs))(step.node)


def _node_flops(node: Node) -> int:
    if not any(out.dtype.kind in "fV" for out in node.outputs):
        return 0
    if node.op == "dot_general":
        (contracted, _), _ = node.params["dimension_numbers"]
        return 2 * node.outputs[0].size * math.prod(node.inputs[0].shape[axis] for axis in contracted)
    if node.op in codegen.EXPENSIVE:
        return node.inputs[0].size
    return sum(out.size for out in node.outputs) if node.op in codegen.ELEMENTWISE else 0


def _product(node: Node) -> int:
    """Of x (M, K) and w (K, N)."""
    return 2 * node.inputs[0].size * node.inputs[1].shape[-1]


def _attention(node: Node) -> int:
    """Of one product over the causal half of (T, T), for q (B, T, H, D)."""
    return node.inputs[0].size * node.inputs[0].shape[1]


_HOT_FLOPS: dict[str, Callable[[Node], int]] = {
    "matmul": _product,
    "matmul_backward": lambda node: 2 * _product(node),
    "attention": lambda node: 2 * _attention(node),
    "attention_backward": lambda node: 4 * _attention(node),
    "linear_cross_entropy": _product,
    "linear_cross_entropy_backward": lambda node: 2 * _product(node),
}
