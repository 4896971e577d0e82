"""Plan: the dispatches of one operation as plain data, where a `program.Program` holds those of a whole function.

A planner is a pure function `plan_<op>(info, inputs, outputs, *, <static parameters>, variant=None) -> Plan`. It
picks the kernels by what `info` (a DeviceInfo) can do, or takes the `variant` it is told, raising FeatureError where
the device lacks it. A plan does no host work and holds no buffers, so that the same one serves a single call and a
recording of a whole program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.kernel import Spec
from vk_kernels.runtime.kernel_signature import signature
from vk_kernels.runtime.memory import Buffer

if TYPE_CHECKING:
    from vk_kernels.runtime.command_buffer import CommandRecorder
    from vk_kernels.runtime.device import Device
    from vk_kernels.runtime.kernel import Kernel


@dataclass(frozen=True)
class Dispatch:
    """One run of a kernel that ships; `operands` index into (*inputs, *outputs, *scratch), in binding order.

    disjoint_writes: bindings of which this dispatch writes a region that no other dispatch listing them touches.
    """

    kernel: str
    variant: str
    spec: Spec
    operands: tuple[int, ...]
    push_constants: bytes
    groups: tuple[int, int, int]
    subgroup_size: int | None = None
    disjoint_writes: tuple[int, ...] = ()


class Update(NamedTuple):
    """An output that is an input, some of it written anew.

    input, output: their numbers, among inputs and among outputs. copy: the number of the dispatch that copies the one
    to the other; the dispatches after it know the output alone. Where both are one memory, it is left out.
    """

    input: int
    output: int
    copy: int


@dataclass(frozen=True)
class Plan:
    """Dispatches in order, each after the ones whose results it reads; `scratch` holds bytes a buffer.

    Scratch starts undefined. No dispatches: the outputs have no elements.
    """

    dispatches: tuple[Dispatch, ...]
    scratch: tuple[int, ...] = ()
    updates: tuple[Update, ...] = ()


def check_operands(plan: Plan, inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec]) -> None:
    """Raises TypeError, naming kernel and buffer, for one that is not what the kernel reads or that it must not write.

    Of scratch no dtype is known.
    """
    dtypes = [array.dtype for array in (*inputs, *outputs)]
    for dispatch in plan.dispatches:
        signature(dispatch.kernel, dispatch.variant).check_operands(dispatch.operands, dtypes, len(inputs))


def kernel_of(device: "Device", dispatch: Dispatch) -> "Kernel":
    """The kernel that a dispatch runs; made once a device. Raises ValueError or FeatureError as `Device.kernel`."""
    return device.kernel(dispatch.kernel, dispatch.variant, dict(dispatch.spec), subgroup_size=dispatch.subgroup_size)


def record(recorder: "CommandRecorder", plan: Plan, buffers: Sequence[Buffer], label: str = "") -> None:
    """Adds a plan's dispatches to a recording; `buffers` are (*inputs, *outputs, *scratch).

    `label` says what the plan is for (the operation and its shapes) in errors and timings.
    """
    for dispatch in plan.dispatches:
        kernel = kernel_of(recorder.device, dispatch)
        operands = [buffers[i] for i in dispatch.operands]
        name = f"{kernel.label} of {label}" if label else None
        recorder.dispatch(kernel, operands, dispatch.push_constants, dispatch.groups, name)


def execute(device: "Device", plan: Plan, inputs: Sequence[Buffer], outputs: Sequence[Buffer], label: str = "") -> None:
    """Runs a plan and waits for it. Safe from several threads at once."""
    scratch = [device.buffer(nbytes) for nbytes in plan.scratch]
    with device.pooled_recorder() as recorder:
        record(recorder, plan, [*inputs, *outputs, *scratch], label)
        recorder.submit().wait()
