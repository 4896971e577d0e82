"""From steps to a program: each step's dispatches, their order, a slice of memory for every array, and the commands."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from vk_kernels.compiler import arena
from vk_kernels.compiler.buffer_assignment import (
    PlannedDispatch,
    PlannedStep,
    alias_outputs,
    find_lifetimes,
    memory_of,
    place_in_arena,
    share_memory,
    step_accesses,
    update_in_place,
)
from vk_kernels.compiler.codegen import cache, kernels
from vk_kernels.compiler.cost import step_flops
from vk_kernels.compiler.dead_dispatches import drop_dead_dispatches
from vk_kernels.compiler.ir import Graph, Node, Value
from vk_kernels.compiler.list_schedule import assign_stages
from vk_kernels.compiler.op_call import describe_call, make_plan
from vk_kernels.compiler.partition import Partition, Step
from vk_kernels.errors import FeatureError
from vk_kernels.runtime.dispatch_plan import kernel_of
from vk_kernels.runtime.hazards import Accesses, waiting_first
from vk_kernels.runtime.program import BufferSlice, Command, Program, command_accesses

if TYPE_CHECKING:
    from vk_kernels.runtime.device import Device


_COPIES = 32  # of outputs, that one kernel does


def make_program(partition: Partition, device: "Device", donated: Sequence[bool]) -> Program:
    """Raises ValueError or FeatureError for what the kernels or the device cannot do, naming the line."""
    planned = [_plan(step, device) for step in partition.steps]
    partition, planned = update_in_place(partition, planned, donated)
    planned = drop_dead_dispatches(planned, partition.outputs)
    block = device.memory.largest(sliced=True)[0] // arena.ALIGNMENT * arena.ALIGNMENT
    outputs = alias_outputs(partition, planned, donated)
    accesses = [step_accesses(index, step, outputs.slices) for index, step in enumerate(planned)]
    levels = [step.step.level for step in planned]
    stages = assign_stages(list(zip(levels, accesses, strict=True)), set(outputs.slices.values()))
    lives = find_lifetimes(accesses, stages, [value for value, _ in outputs.copied])
    blocks = share_memory(planned, lives, outputs.slices)
    device.memory.check_size(max((arena.padded(block.nbytes) for block in blocks.lifetimes), default=0), sliced=True)
    slices, arena_bytes = place_in_arena(blocks, outputs.slices, block)
    commands = _commands(planned, stages, slices)
    copies = [(slices[value], target, value) for value, target in outputs.copied]
    most = min(_COPIES, device.limits.storage_buffers // 2)
    for start in range(0, len(copies), most):
        commands += _copy(copies[start : start + most])
    return Program(
        tuple(commands),
        tuple(value.spec for value in partition.inputs),
        tuple(value.spec for value in partition.outputs),
        tuple(partition.constants.values()),
        outputs.aliases,
        arena_bytes,
        block,
    )


def _commands(
    planned: Sequence[PlannedStep], stages: Sequence[Sequence[int]], slices: Mapping[Hashable, BufferSlice]
) -> list[Command]:
    """All dispatches, stage after stage."""
    by_stage: dict[int, list[tuple[Command, Accesses]]] = {}
    for index, (step, own_stages) in enumerate(zip(planned, stages, strict=True)):
        memory = memory_of(index, step)
        flops = step_flops(step.step, {memory[i] for dispatch in step.dispatches for i in dispatch.operands})
        for number, (dispatch, stage) in enumerate(zip(step.dispatches, own_stages, strict=True)):
            command = Command(
                dispatch.label,
                step.step.scope,
                dispatch.kernel,
                tuple(slices[memory[i]] for i in dispatch.operands),
                dispatch.groups,
                dispatch.push_constants,
                0 if number else flops,
                dispatch.disjoint_writes,
            )
            accesses = command_accesses(command.operands, dispatch.writes, command.disjoint_writes)
            by_stage.setdefault(stage, []).append((command, accesses))
    found = [by_stage[stage] for stage in sorted(by_stage)]
    orders = waiting_first([accesses for _, accesses in commands] for commands in found)
    return [commands[i][0] for commands, order in zip(found, orders, strict=True) for i in order]


def _plan(step: Step, device: "Device") -> PlannedStep:
    if step.node is not None:
        return _plan_kernel_op(step, step.node, device)
    generated = cache.generate(step.graph)
    dispatches = tuple(
        PlannedDispatch(kernel.label, kernel.spirv, kernel.operands, kernel.writes, kernel.groups)
        for kernel in generated.kernels
    )
    return PlannedStep(step, dispatches, generated.scratch, generated.in_place)


def _plan_kernel_op(step: Step, node: Node, device: "Device") -> PlannedStep:
    inputs, outputs = (tuple(x.spec for x in values) for values in (node.inputs, node.outputs))
    try:
        plan = make_plan(device, node.call, inputs, outputs)
    except (ValueError, FeatureError) as error:
        raise type(error)(f"{error}: {node.source}") from None
    call, dispatches = describe_call(node.op, inputs), []
    for dispatch in plan.dispatches:
        name = f"{dispatch.kernel}.{dispatch.variant}" if dispatch.variant else dispatch.kernel
        label = f"{name} of {call}"
        writes = kernel_of(device, dispatch).writable
        launched = dispatch.operands, writes, dispatch.groups, dispatch.push_constants
        dispatches.append(PlannedDispatch(label, dispatch, *launched, dispatch.disjoint_writes))
    return PlannedStep(step, tuple(dispatches), plan.scratch, frozenset(), plan.updates)


def _copy(copies: Sequence[tuple[BufferSlice, BufferSlice, Value]]) -> list[Command]:
    """Copies in one kernel: no place that is copied from is one that is copied to."""
    sources = {value: source for source, _, value in copies}
    graph = Graph(tuple(sources), {}, [], tuple(value for _, _, value in copies))
    generated = kernels.generate(graph, "copy")
    places = (*sources.values(), *(target for _, target, _ in copies))
    return [
        Command(kernel.label, "", kernel.spirv, tuple(places[i] for i in kernel.operands), kernel.groups)
        for kernel in generated.kernels
    ]
