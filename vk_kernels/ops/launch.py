"""What the planners of the operations on rows and elements share. Knows no JAX."""

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from vk_kernels.runtime.dispatch_plan import Array, Dispatch

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

THREADS = 256  # of a workgroup
MAX_GROUPS = 65535  # along either axis; every device takes that many

_ELEMENTS = {np.dtype(np.float32): "f32", np.dtype(ml_dtypes.bfloat16): "bf16"}


def element(array: Array) -> str:
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
    operands: tuple[int, ...],
    push_constants: bytes,
    workgroups: int,
    **spec: int | bool,
) -> Dispatch:
    """A dispatch of `workgroups`, which the kernel numbers along x, then y."""
    across = max(1, min(workgroups, MAX_GROUPS))
    groups = (across, ceil_divide(workgroups, across), 1)
    return Dispatch(kernel, variant, tuple(sorted(spec.items())), operands, push_constants, groups)


def has_lanes(info: "DeviceInfo", count: int) -> bool:
    """Whether a kernel can have subgroups of so many lanes."""
    smallest, largest = info.limits.subgroup_size_range
    return smallest == largest == count or (info.limits.subgroup_size_selectable and smallest <= count <= largest)


def require_plain(variant: str | None) -> None:
    """Raises ValueError for a variant that these operations, which multiply no matrices, do not have."""
    if variant not in (None, "plain"):
        raise ValueError(f"this operation has one variant, 'plain', found {variant!r}")
