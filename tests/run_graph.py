"""Running generated kernels on arrays, and comparing what they give with XLA on the processor."""

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import ml_dtypes
import numpy as np

from vk_kernels.compiler.codegen.kernels import Generated, generate
from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.compiler.ir import Graph, Value
from vk_kernels.compiler.passes.simplify import drop_barriers
from vk_kernels.runtime.device import Device
from vk_kernels.tools.build_shaders import find_tool

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
FLOATS = [F32, BF16, F16]
SIGNED = [np.dtype(t) for t in (np.int8, np.int16, np.int32)]
UNSIGNED = [np.dtype(t) for t in (np.uint8, np.uint16, np.uint32)]
INTEGERS = SIGNED + UNSIGNED
BOOL = np.dtype(bool)

GUARD, FILL = 64, 0xFF  # bytes behind each output that no kernel may write; NaN in every float


def graph_of(fn: Callable[..., Any], *args: np.ndarray) -> tuple[Graph, list[np.ndarray]]:
    """The graph of a function of arrays before any pass but what drops barriers, and its inputs: the arguments, then
    what it closes over."""
    graph = drop_barriers(make_graph(jax.make_jaxpr(fn)(*args)))
    arrays = [*map(np.asarray, jax.tree.leaves(args)), *graph.constants.values()]
    return replace(graph, inputs=(*graph.inputs, *graph.constants), constants={}), arrays


def validate(generated: Generated) -> None:
    for kernel in generated.kernels:
        with tempfile.NamedTemporaryFile(suffix=".spv") as file:
            file.write(kernel.spirv)
            file.flush()
            found = subprocess.run(
                [find_tool("spirv-val"), "--target-env", "vulkan1.2", file.name],
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert found.returncode == 0, found.stdout + found.stderr


def run(device: Device, fn: Callable[..., Any], *args: np.ndarray, check: bool = True) -> list[np.ndarray]:
    """Results of the generated kernels. Outputs and scratch hold NaN before; nothing is written behind an output."""
    graph, inputs = graph_of(fn, *args)
    generated = generate(graph)
    if check:
        validate(generated)
    shapes = [
        (x.shape, x.dtype) if isinstance(x, Value) else (np.shape(x.value), np.asarray(x.value).dtype)
        for x in graph.outputs
    ]
    sizes = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in shapes]
    buffers = [device.upload(x) for x in inputs]
    results = [device.upload(np.full(size + GUARD, FILL, np.uint8)) for size in sizes]
    buffers += results + [device.upload(np.full(size, FILL, np.uint8)) for size in generated.scratch]
    with device.pooled_recorder() as recorder:
        for kernel in generated.kernels:
            made = device.kernel_from_spirv(kernel.spirv, kernel.label)
            recorder.dispatch(made, [buffers[i] for i in kernel.operands], b"", kernel.groups, kernel.label)
        recorder.submit().wait()
    for result, size in zip(results, sizes, strict=True):
        assert (result.read(np.uint8, (GUARD,), size) == FILL).all(), "wrote behind an output"
    return [result.read(dtype, shape) for result, (shape, dtype) in zip(results, shapes, strict=True)]


# Relative to the size of the values: a few units in the last place.
TOLERANCE = {F32: 2e-6, BF16: 2**-7, F16: 2**-9}


def compare(found: np.ndarray, expected: np.ndarray, tolerance: float | None = None) -> None:
    """Integers and bools exactly; floats within `tolerance` relative, NaN and infinities in the same places."""
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.dtype not in TOLERANCE:
        np.testing.assert_array_equal(found, expected)
        return
    dtype = expected.dtype
    rtol = TOLERANCE[dtype] if tolerance is None else tolerance
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    atol = SMALLEST[dtype] if tolerance is None else tolerance
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def agree(device: Device, fn: Callable[..., Any], *args: np.ndarray, tolerance: float | None = None) -> None:
    expected = jax.tree.leaves(jax.jit(fn)(*args))
    found = run(device, fn, *args)
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        compare(x, y, tolerance)


def normal(*shape: int, dtype: np.dtype = F32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def integers(*shape: int, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """All sizes of numbers, with the extremes among them."""
    limits, rng = np.iinfo(dtype), np.random.default_rng(seed)
    small = rng.integers(max(limits.min, -5), 6, size=shape)
    large = rng.integers(limits.min, limits.max, size=shape, endpoint=True)
    values = np.where(rng.random(shape) < 0.5, small, large).astype(dtype)
    if values.size > 2:
        values.flat[:2] = limits.min, limits.max
    return values


def bools(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


SMALLEST = {F32: 1.2e-38, BF16: 1.2e-38, F16: 6e-8}  # XLA on the processor takes smaller ones for 0

SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, -3.5, np.inf, -np.inf, np.nan, 1e-30, -1e30, 100.0, -100.0, 3e38],
    np.float32,
)


def floats(dtype: np.dtype) -> np.ndarray:
    """Ordinary and special values."""
    with np.errstate(over="ignore"):
        return np.concatenate([SPECIAL, 10 * normal(241)]).astype(dtype)


def sample(*shape: int, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    if dtype == BOOL:
        return bools(*shape, seed=seed)
    return normal(*shape, dtype=dtype, seed=seed) if dtype in FLOATS else integers(*shape, dtype=dtype, seed=seed)


def primitives_of(jaxpr) -> set[str]:
    """The primitives of a jaxpr and of all that it calls."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= primitives_of(inner)
    return found
