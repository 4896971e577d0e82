"""Running a plan on arrays, and the accuracy it is held to."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.dispatch_plan import Plan, record
from vk_kernels.tools.tolerances import OUTPUT_FACTOR, SLACK

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
DTYPES = [F32, BF16]

GUARD = 64  # bytes behind each output that no kernel may write
FILL = 0xFF  # NaN in f32 and bf16


def run(
    device: Device,
    planner: Callable[..., Plan],
    reference: Callable[..., Any],
    *inputs: np.ndarray,
    **parameters: Any,
) -> list[np.ndarray]:
    """The results of the plan for `inputs`: arrays of the shapes and dtypes that `reference` gives for them.

    Outputs and scratch hold NaN before. Outputs must be all written, and nothing behind them.
    """
    static = {name: value for name, value in parameters.items() if name not in ("variant", "chunk_rows")}
    shapes = jax.tree.leaves(jax.eval_shape(lambda *xs: reference(*xs, **static), *inputs))
    outputs = [ArraySpec(tuple(shape.shape), np.dtype(shape.dtype)) for shape in shapes]
    plan = planner(device.info, [ArraySpec(x.shape, x.dtype) for x in inputs], outputs, **parameters)
    sources = [device.upload(x) for x in inputs]
    results = [device.upload(np.full(output.nbytes + GUARD, FILL, np.uint8)) for output in outputs]
    scratch = [device.upload(np.full(nbytes, FILL, np.uint8)) for nbytes in plan.scratch]
    if plan.dispatches:
        with device.pooled_recorder() as recorder:
            record(recorder, plan, [*sources, *results, *scratch], planner.__name__)
            recorder.submit().wait()
    for result, output in zip(results, outputs, strict=True):
        assert (result.read(np.uint8, (GUARD,), output.nbytes) == FILL).all(), f"{planner.__name__} wrote too far"
    return [result.read(output.dtype, output.shape) for result, output in zip(results, outputs, strict=True)]


def assert_accurate(actual: Any, plain: Any, exact: np.ndarray, factor: float = OUTPUT_FACTOR, what: str = "") -> None:
    """The error against float64 is at most `factor` times that of plain XLA at the same precision, plus SLACK."""
    actual, plain = (np.asarray(x).astype(np.float64) for x in (actual, plain))
    assert actual.shape == plain.shape == exact.shape
    assert np.isfinite(actual).all(), what
    error, allowed = (np.abs(x - exact).max(initial=0) for x in (actual, plain))
    scale = max(1.0, np.abs(exact).max(initial=0))
    assert error <= factor * allowed + SLACK * scale, f"{what}: error {error:.3g}, XLA's {allowed:.3g}"


def normal(*shape: int, seed: int = 0, dtype: np.dtype = F32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def same_bits(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(some, others, strict=True))
