"""Functions that planners share. They know no JAX."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan, check_operands
from vk_kernels.runtime.kernel_signature import signature

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

THREADS = 256  # of a workgroup
MAX_GROUPS = 65535  # along either axis; every device takes that many

_ELEMENTS = {np.dtype(np.float32): "f32", np.dtype(ml_dtypes.bfloat16): "bf16"}


def dtype_suffix(array: ArraySpec) -> str:
    """The variant of a kernel for the array's dtype. Raises ValueError for one that there are no kernels for."""
    found = _ELEMENTS.get(array.dtype)
    if found is None:
        raise ValueError(f"the kernels take float32 or bfloat16, found {array}")
    return found


def aligned(columns: int) -> bool:
    """Whether every row starts where four elements can be read at a time."""
    return columns % 4 == 0


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def dispatch(
    kernel: str,
    variant: str,
    workgroups: int,
    *,
    constants: Mapping[str, Any],
    spec: Mapping[str, int | bool] | None = None,
    subgroup_size: int | None = None,
    disjoint_writes: Sequence[str] = (),
    **buffers: int | None,
) -> Dispatch:
    """A dispatch of `workgroups`, which the kernel numbers along x, then y.

    Args:
      constants: the push constants by name.
      spec: the specialization constants.
      disjoint_writes: as of a Dispatch, by the buffers' names.
      buffers: each buffer of the kernel, by name: its index in (*inputs, *outputs, *scratch) of the plan, or None for
        one that the kernel, so specialized, does not use.

    Raises:
      TypeError: a buffer or a push constant that is missing, unknown or of another type.
    """
    takes = signature(kernel, variant)
    across = max(1, min(workgroups, MAX_GROUPS))
    return Dispatch(
        kernel,
        variant,
        tuple(sorted((spec or {}).items())),
        takes.operands(buffers),
        takes.pack(constants),
        groups=(across, ceil_divide(workgroups, across), 1),
        subgroup_size=subgroup_size,
        disjoint_writes=tuple(takes.buffers[name].binding for name in disjoint_writes),
    )


def copy_dispatch(array: ArraySpec, source: int, target: int) -> Dispatch:
    """Copies one operand to another, both like `array`, f32, bf16 or int32."""
    groups = ceil_divide(array.size, 4 * THREADS)
    count = {"count": array.size}
    suffix = "i32" if array.dtype == np.int32 else dtype_suffix(array)
    return dispatch("copy_array", suffix, groups, constants=count, input=source, output=target)


def operands_of(inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec]) -> tuple[range, range, int]:
    """The indices of the inputs and of the outputs in (*inputs, *outputs, *scratch), and that of the first scratch."""
    end = len(inputs) + len(outputs)
    return range(len(inputs)), range(len(inputs), end), end


def planner(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """Checks what `plan(info, inputs, outputs, ...)` binds: see `check_operands`."""

    @functools.wraps(plan)
    def checked(
        info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], **parameters: Any
    ) -> Plan:
        made = plan(info, inputs, outputs, **parameters)
        check_operands(made, inputs, outputs)
        return made

    return checked


def has_lanes(info: "DeviceInfo", count: int) -> bool:
    """Whether a kernel can have subgroups of so many lanes."""
    smallest, largest = info.limits.subgroup_size_range
    return smallest == largest == count or (info.limits.subgroup_size_selectable and smallest <= count <= largest)


def has_teams(info: "DeviceInfo", lanes: int, needs: Mapping[str, Any]) -> bool:
    """Whether the device runs a kernel in which `lanes` threads side by side shuffle. needs: its manifest entry."""
    features = {*needs["features"], "computeFullSubgroups"}
    smallest, largest = info.limits.subgroup_size_range
    whole = needs["workgroup"][0] % largest == 0
    return (
        smallest >= lanes
        and whole
        and features <= info.features.names
        and (needs["shared_bytes"] <= info.limits.shared_memory)
    )


def require_plain(variant: str | None) -> None:
    """Raises ValueError for a variant that these operations, which multiply no matrices, do not have."""
    if variant not in (None, "plain"):
        raise ValueError(f"this operation has one variant, 'plain', found {variant!r}")
