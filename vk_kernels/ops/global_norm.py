"""The Euclidean norm of many arrays taken as one vector."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.bridge.primitive import make_primitive, vary_alike
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.planning import THREADS, ceil_divide, dispatch, dtype_suffix, operands_of, planner, require_plain
from vk_kernels.ops.public import public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_ARRAYS = 8  # that the kernel takes at once
_CHUNK = 16 * THREADS  # elements that a workgroup sums at a time
_GROUPS = 512  # enough to fill a device


def global_norm_reference(*arrays: jax.Array) -> jax.Array:
    """sqrt of the sum of all squares, f32 (), summed in f32; arrays of any shape, f32 or bf16."""
    squares = [jnp.square(x.astype(jnp.float32)).sum() for x in arrays]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


@planner
def plan_global_norm(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: the arrays; outputs: their norm. See `global_norm_reference`."""
    require_plain(variant)
    arrays, (norm,), scratch = operands_of(inputs, outputs)
    return plan_norm_of([(i, inputs[i]) for i in arrays], output=norm, scratch=scratch)


def plan_norm_of(arrays: Sequence[tuple[int, ArraySpec]], output: int, scratch: int) -> Plan:
    """The norm of some operands, given by (index, array), into operand `output`; scratch operands from `scratch`.

    Each run of the kernel takes eight arrays of one dtype and leaves a buffer of sums of its own, so that the runs need
    not wait for one another; then runs of one workgroup add up eight of these at a time, and the last takes the root.
    """
    dispatches: list[Dispatch] = []
    sizes: list[int] = []

    def add(variant: str, level: Sequence[tuple[int, int]], groups: int, square: bool, root: bool) -> tuple[int, int]:
        """A run over (operand, elements) pairs: the operand and the number of its sums."""
        target = output if root else scratch + len(sizes)
        operands = [operand for operand, _ in level] or [output]
        run = dispatch(
            "global_norm",
            variant,
            groups,
            constants={"counts": [n for _, n in level] + [0] * (_ARRAYS - len(level)), "groups": groups},
            spec={"SQUARE": square, "ROOT": root},
            **{f"array{i}": operands[i] if i < len(operands) else None for i in range(_ARRAYS)},
            sums=target,
        )
        dispatches.append(run)
        if not root:
            sizes.append(4 * groups)
        return target, groups

    sums = []
    for kind in ("f32", "bf16"):
        alike = [(operand, array.size) for operand, array in arrays if dtype_suffix(array) == kind and array.size]
        for level in _eights(alike):
            groups = min(sum(ceil_divide(count, _CHUNK) for _, count in level), _GROUPS)
            sums.append(add(kind, level, groups, square=True, root=False))
    while len(sums) > _ARRAYS:
        sums = [add("f32", level, 1, square=False, root=False) for level in _eights(sums)]
    add("f32", sums, 1, square=False, root=True)
    return Plan(tuple(dispatches), tuple(sizes))


def _eights(items: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    return [items[i : i + _ARRAYS] for i in range(0, len(items), _ARRAYS)]


_global_norm_primitive = make_primitive("global_norm", global_norm_reference, KernelOp(plan_global_norm))


@public(global_norm_reference)
def global_norm(target, *arrays):
    return _global_norm_primitive.bind(*vary_alike(*arrays), target=target)[0]
