"""One operation by itself on a Vulkan device: its errors beside XLA's, its time beside its floor, and its program."""

import dataclasses
from typing import Any

import jax
import numpy as np

from vk_kernels.bridge.jit import jit
from vk_kernels.bridge.use import use
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.tools.check_ops import truth_of
from vk_kernels.tools.floors import profile_with_floors
from vk_kernels.tools.op_cases import CASES, SIZES


@dataclasses.dataclass(frozen=True)
class Examination:
    """errors: by implementation, of each element of the first result, in units of its largest; f64.

    profile: as `floors.profile_with_floors` gives it. program: in words, dispatch by dispatch.
    """

    label: str
    device: str
    errors: dict[str, np.ndarray]
    profile: dict[str, Any]
    program: str


def labels() -> list[str]:
    """The operations that there are, by the names that `examine` knows."""
    return [case.label for case in CASES]


def examine(label: str, size: str = "tiny", dtype: str = "float32", device: str = "") -> Examination:
    """Runs an operation on Vulkan and on XLA.

    Args:
      label: of `labels()`.
      size: of `op_cases.SIZES`; tiny and megabyte suit a processor.
      device: index, 'gpu', 'cpu' or part of a name; '': the process's own.
    """
    case = next((case for case in CASES if case.label == label), None)
    if case is None:
        raise ValueError(f"there is no {label!r}; there are {', '.join(labels())}")
    operands, opened = case.operands(SIZES[size], np.dtype(dtype)), open_device(device)
    call = jit(lambda *operands: case.run(operands)[0], device=opened.info.index)
    with use("xla"):
        reference = jax.jit(lambda operands: case.run(operands)[0])(operands)
    truth = truth_of(case, operands)
    unit = float(np.abs(truth).max()) or 1.0
    found = {"Vulkan": call(*operands), "XLA": reference}
    shape = SIZES[size]
    attention = (shape.batch, shape.length, shape.heads, shape.width // shape.heads)
    return Examination(
        label,
        str(opened.info),
        {name: np.ravel(np.asarray(y, np.float64) - truth) / unit for name, y in found.items()},
        profile_with_floors(call, operands, opened, dtype, attention, repeats=3),
        call.lower(*operands).as_text(),
    )
