"""Generated kernels against XLA on the processor: every primitive, over shapes, dtypes and axes."""

import functools
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.extend.random import threefry2x32_p
from vk_fixtures import needs_vulkan, vulkan_device  # noqa: F401

from vk_kernels.build import find_tool
from vk_kernels.device import Device
from vk_kernels.lowering.codegen import Generated, generate
from vk_kernels.lowering.graph import Graph, Literal, Node, Value

pytestmark = needs_vulkan

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
FLOATS = [F32, BF16, F16]
SIGNED = [np.dtype(t) for t in (np.int8, np.int16, np.int32)]
UNSIGNED = [np.dtype(t) for t in (np.uint8, np.uint16, np.uint32)]
INTEGERS = SIGNED + UNSIGNED
BOOL = np.dtype(bool)

GUARD, FILL = 64, 0xFF  # bytes behind each output that no kernel may write; NaN in every float

_INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")


def graph_of(fn: Callable[..., Any], *args: np.ndarray) -> tuple[Graph, list[np.ndarray]]:
    """The graph of a function of arrays, and its inputs: the arguments, then what it closes over."""
    closed = jax.make_jaxpr(fn)(*args)
    nodes: list[Node] = []

    def value(aval) -> Value:
        return Value(tuple(aval.shape), np.dtype(aval.dtype))

    def read(names: dict, x) -> Value | Literal:
        if type(x).__name__ == "Literal":
            return Literal(np.asarray(x.val, x.aval.dtype))
        return names[x]

    def inline(jaxpr, inputs) -> list[Value | Literal]:
        names = dict(zip(jaxpr.invars, inputs, strict=True))
        for equation in jaxpr.eqns:
            operands = [read(names, x) for x in equation.invars]
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if equation.primitive.name in _INLINED:
                consts = [Literal(np.asarray(x)) for x in getattr(inner, "consts", ())]
                body = getattr(inner, "jaxpr", inner)
                names |= dict(zip(body.constvars, consts, strict=True))
                found = inline(body, operands) if not consts else inline_with(body, consts, operands)
                names |= dict(zip(equation.outvars, found, strict=True))
                continue
            outputs = tuple(value(x.aval) for x in equation.outvars)
            names |= dict(zip(equation.outvars, outputs, strict=True))
            nodes.append(
                Node(equation.primitive.name, tuple(operands), outputs, dict(equation.params), "", "")
            )
        return [read(names, x) for x in jaxpr.outvars]

    def inline_with(jaxpr, consts, inputs):
        return inline(
            jaxpr.replace(invars=[*jaxpr.constvars, *jaxpr.invars], constvars=[]), [*consts, *inputs]
        )

    jaxpr = closed.jaxpr
    inputs = tuple(value(x.aval) for x in (*jaxpr.invars, *jaxpr.constvars))
    flat = jaxpr.replace(invars=[*jaxpr.invars, *jaxpr.constvars], constvars=[])
    outputs = inline(flat, inputs)
    arrays = [np.asarray(x) for x in (*jax.tree.leaves(args), *closed.consts)]
    return Graph(inputs=inputs, constants={}, nodes=nodes, outputs=tuple(outputs)), arrays


def validate(generated: Generated) -> None:
    for kernel in generated.kernels:
        with tempfile.NamedTemporaryFile(suffix=".spv") as file:
            file.write(kernel.spirv)
            file.flush()
            found = subprocess.run(
                [find_tool("spirv-val"), "--target-env", "vulkan1.2", file.name],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert found.returncode == 0, found.stdout + found.stderr


def run(device: Device, fn: Callable[..., Any], *args: np.ndarray, check: bool = True) -> list[np.ndarray]:
    """What the generated kernels give. Outputs and scratch hold NaN before; nothing is written behind an output."""
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
    with device.recorder() as recorder:
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


# Elementwise primitives: all of a dtype in one kernel.

UNARY = {
    name: getattr(lax, name)
    for name in (
        *(
            "neg",
            "abs",
            "sign",
            "floor",
            "ceil",
            "is_finite",
            "square",
            "sqrt",
            "rsqrt",
            "cbrt",
            "exp",
            "exp2",
            "expm1",
        ),
        *(
            "log",
            "log1p",
            "tanh",
            "logistic",
            "sinh",
            "cosh",
            "asinh",
            "acosh",
            "atanh",
            "sin",
            "cos",
            "tan",
            "atan",
        ),
        *("asin", "acos", "erf", "erfc", "erf_inv"),
    )
}
UNARY["round away"] = lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)
UNARY["round even"] = lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
UNARY |= {f"integer_pow {y}": functools.partial(lax.integer_pow, y=y) for y in (-3, -1, 0, 1, 2, 3, 5)}
UNARY["reduce_precision"] = lambda x: lax.reduce_precision(x, 8, 4)

COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]

# Here it is XLA whose values are further from the truth (exp2(100) is off by 2e-6).
LOOSE = {"exp2": 1e-5, "erfc": 1e-5, "pow": 1e-5}


def named(functions: dict[str, Callable[..., Any]]) -> Callable[..., tuple]:
    return lambda *xs: tuple(fn(*xs) for fn in functions.values())


def agree_by_name(device, functions, *args, loose=(), by_f32: bool = False) -> None:
    """`by_f32`: narrow floats are compared with f32, rounded; XLA computes some functions to few digits there."""
    wrong = []
    found = run(device, named(functions), *args)
    wide = [x.astype(F32) for x in args] if by_f32 else args
    for name, x, y in zip(functions, found, jax.jit(named(functions))(*wide), strict=True):
        try:
            with np.errstate(over="ignore"):
                expected = np.asarray(y).astype(x.dtype) if by_f32 and y.dtype == F32 else y
            compare(x, expected)
        except AssertionError as error:
            if name in loose and x.dtype == F32:
                np.testing.assert_allclose(x, y, rtol=loose[name], atol=SMALLEST[F32])
                continue
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary_functions_of_floats(device, dtype):
    x = floats(dtype)
    agree_by_name(device, UNARY, x, loose=LOOSE, by_f32=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_binary_functions_of_floats(device, dtype):
    names = ["add", "sub", "mul", "div", "rem", "pow", "atan2", "max", "min", *COMPARISONS]
    functions = {name: getattr(lax, name) for name in names}
    x, y = (array.ravel() for array in np.meshgrid(floats(dtype)[:80], floats(dtype)[:80]))
    agree_by_name(device, functions, x, y, loose=LOOSE, by_f32=True)
    agree_by_name(device, {"nextafter": lax.nextafter}, x, y)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_functions_of_integers(device, dtype):
    names = [
        "add",
        "sub",
        "mul",
        "div",
        "rem",
        "max",
        "min",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "mulhi",
    ]
    names += ["shift_left", "shift_right_logical", "shift_right_arithmetic", *COMPARISONS]
    functions = {name: getattr(lax, name) for name in names}
    for name in ("sign", "clz", "population_count", *(["abs"] if dtype in SIGNED else [])):
        functions[name] = functools.partial(lambda fn, x, y: fn(x), getattr(lax, name))
    functions |= {"not": lambda x, y: ~x, "neg": lambda x, y: -x, "integer_pow": lambda x, y: x**3}
    functions["clamp"] = lambda x, y: lax.clamp(dtype.type(3), x, y)
    x, y = integers(3, 1001, dtype=dtype), integers(3, 1001, dtype=dtype, seed=1)
    agree_by_name(device, functions, x, y)


def test_functions_of_bools(device):
    names = ["bitwise_and", "bitwise_or", "bitwise_xor", "max", "min", *COMPARISONS]
    functions = {name: getattr(lax, name) for name in names}
    functions["not"] = lambda x, y: ~x
    functions["select"] = lambda x, y: lax.select(x, y, ~y)
    agree_by_name(device, functions, bools(301), bools(301, seed=1))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, BOOL], ids=str)
def test_conversions(device, dtype):
    x = bools(301) if dtype == BOOL else floats(dtype) if dtype in FLOATS else integers(301, dtype=dtype)
    targets = [*FLOATS, *INTEGERS, BOOL]
    functions = {str(t): functools.partial(lax.convert_element_type, new_dtype=t) for t in targets}
    same_width = [t for t in (*FLOATS, *INTEGERS) if t.itemsize == dtype.itemsize and dtype != BOOL]
    functions |= {f"bits {t}": functools.partial(lax.bitcast_convert_type, new_dtype=t) for t in same_width}
    agree_by_name(device, functions, x)


# Shapes: one kernel of many outputs for each dtype, whose width decides how memory is read.

PADDING = [(1, 2, 0), (0, 0, 2), (-1, 0, 0)]


def shape_functions(x):
    """Of x (4, 6, 5)."""
    scalar = x[0, 0, 0]
    return {
        "transpose": x.transpose(2, 0, 1),
        "reshape": x.reshape(8, 15),
        "reshape split": x.reshape(4, 3, 2, 5, 1),
        "reshape flat": x.reshape(120),
        "reshape of transpose": x.transpose(1, 0, 2).reshape(12, 10),
        "broadcast": lax.broadcast_in_dim(x[:, 0], (4, 3, 5), (0, 2)),
        "broadcast one": lax.broadcast_in_dim(x[:, :1], (4, 6, 5), (0, 1, 2)),
        "broadcast scalar": lax.broadcast(scalar, (3,)),
        "squeeze": lax.squeeze(x[:, :1], (1,)),
        "expand": lax.expand_dims(x, (1, 3)),
        "slice": lax.slice(x, (1, 0, 1), (4, 6, 4)),
        "slice strides": lax.slice(x, (0, 1, 0), (4, 6, 5), (2, 3, 1)),
        "reverse": lax.rev(x, (0, 2)),
        "pad": lax.pad(x, scalar, PADDING),
        "pad all axes": lax.pad(x, scalar, [(2, 3, 1), (1, -2, 0), (0, 0, 3)]),
        "concatenate": lax.concatenate([x, x[:, :1], x[:, 2:2], x[:, ::2]], 1),
        "split": lax.split(x, (1, 3, 2), axis=1),
        "dynamic slice": lax.dynamic_slice(x, (2, -1, 3), (2, 3, 2)),
        "dynamic slice moved": lax.dynamic_slice(x, (9, -100, 3), (4, 3, 5)),
        "dynamic update": lax.dynamic_update_slice(x, x[:2, :3, :2], (1, 5, 1)),
        "barrier": lax.optimization_barrier((x, x[0])),
        "unstack": jnp.unstack(x, axis=1),
        "tile": jnp.tile(x, (1, 2, 3)),
        "roll": jnp.roll(x, 2, axis=1),
        "flat concatenate": jnp.concatenate([x[i].ravel() for i in range(4)]),
    }


def sample(*shape: int, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    if dtype == BOOL:
        return bools(*shape, seed=seed)
    return (
        normal(*shape, dtype=dtype, seed=seed)
        if dtype in FLOATS
        else integers(*shape, dtype=dtype, seed=seed)
    )


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, BOOL], ids=str)
def test_shapes(device, dtype):
    agree(device, shape_functions, sample(4, 6, 5, dtype=dtype))


def test_iota_and_literals(device):
    def fn(x):
        grids = [
            lax.broadcasted_iota(t, (3, 70), axis) for t in (np.int32, np.uint8, F32, BF16) for axis in (0, 1)
        ]
        return grids, jnp.full((2, 2), 3.5), jnp.tri(5), x, x

    agree(device, fn, normal(3))


def test_indices_that_are_computed(device):
    def fn(x, i):
        inner = lax.dynamic_slice(x, (i[0] + 1, i[1] * 2), (2, 3))
        return (
            inner,
            lax.dynamic_index_in_dim(x, i[1], 1, False),
            lax.dynamic_update_index_in_dim(x, x[0], i[0], 0),
        )

    for dtype in (np.int32, np.uint32, np.int8):
        agree(device, fn, normal(6, 7), np.array([1, 2], dtype))


def test_arrays_without_elements(device):
    def fn(x):
        return (
            x * 2,
            x.sum(0),
            x.sum(1),
            x.max(axis=1, initial=1),
            jnp.concatenate([x, x[:0]]),
            x.T,
            x.reshape(0),
        )

    agree(device, fn, np.zeros((0, 5), np.float32))
    agree(device, lambda x: (x + 1, lax.pad(x, x.sum(), [(1, 1, 0)])), np.zeros(0, np.float32))
    agree(device, lambda x: (x.sum(1), jnp.prod(x, 1), x @ x.T), np.zeros((5, 0), np.float32))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 1, 5), (257,), (1031, 3)], ids=str)
def test_shapes_from_scalars_on(device, shape):
    agree(device, lambda x: (x * x + 1, -x, (x > 0) & (x < 1)), normal(*shape))


def test_an_array_of_more_than_a_megabyte(device):
    agree(
        device,
        lambda x, y: (x * y + 1, (x + y[::-1]).T),
        normal(601, 1003),
        normal(601, 1003, seed=1),
        tolerance=1e-6,
    )


def test_random_bits_are_those_of_jax(device):
    def fn(data):
        key = jax.random.wrap_key_data(data)
        return jax.random.bits(key, (7, 11)), jax.random.key_data(jax.random.split(key, 3))

    data = np.array([123, 456], np.uint32)
    expected = jax.tree.leaves(fn(data))

    def primitive(data):  # what the trace makes of keys
        high, low = np.zeros(77, np.uint32), np.arange(77, dtype=np.uint32)
        k0, k1 = jnp.broadcast_to(data[0], (77,)), jnp.broadcast_to(data[1], (77,))
        a, b = threefry2x32_p.bind(k0, k1, high, low)
        return (a ^ b).reshape(7, 11), jnp.stack(threefry2x32_p.bind(k0[:3], k1[:3], high[:3], low[:3]), 1)

    for x, y in zip(run(device, primitive, data), expected, strict=True):
        compare(x, y)


def test_an_index_out_of_range_is_filled_clipped_or_dropped(device):
    x, i = normal(5, 4), np.array([[0], [4], [-1], [7], [2]], np.int32)

    def fn(x, i, u):
        gathers = [x.at[i[:, 0]].get(mode=mode) for mode in ("fill", "clip")]
        gathers.append(x.at[i[:, 0]].get(mode="fill", fill_value=7.0))
        scatters = [x.at[i[:, 0]].add(u, mode=mode) for mode in ("drop", "clip")]
        scatters += [
            x.at[i[:, 0]].max(u),
            x.at[i[:, 0]].min(u),
            x.at[i[:, 0]].multiply(u),
            x.at[1:3, 2].set(u[:2, 0]),
        ]
        return gathers, scatters

    agree(device, fn, x, i, normal(5, 4, seed=2))


def test_gathers_and_scatters(device):
    def fn(x, i):
        along = jnp.take_along_axis(x, i, 1)
        return {
            "rows": x[i[0]],
            "columns": x[:, i[:, 0]],
            "pairs": x[i[0], i[1] % 4],
            "along": along,
            "windows": lax.gather(x, i[:, :2] % 3, WINDOWS, (2, 3), mode="clip"),
            "add": x.at[i[0]].add(x[:3] * 2),
            "add twice the same": jnp.zeros((6, 4)).at[jnp.array([1, 1, 5, 1])].add(x[:4, :4]),
            "along gradient": jax.grad(lambda x: (jnp.take_along_axis(x, i, 1) ** 2).sum())(x),
            "rows gradient": jax.grad(lambda x: (x[i[0]] ** 3).sum())(x),
            "set": x.at[:, i[0]].set(1.5),
            "integers": (x * 10).astype(jnp.int32).at[i[1]].add(1),
        }

    agree(
        device,
        fn,
        normal(6, 5),
        np.random.default_rng(0).integers(0, 5, (6, 3)).astype(np.int32),
        tolerance=1e-6,
    )


WINDOWS = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(1, 0))


# Reductions: by rows, by columns, of everything; short ones, and ones in pieces.

REDUCED = [
    ((7, 100), (1,)),
    ((7, 100), (0,)),
    ((100, 7), (0,)),
    ((3, 5, 7), (0, 2)),
    ((40, 3, 50), (0, 2)),
    ((40, 3, 50), (1,)),
    ((40, 3, 50), (0, 1, 2)),
    ((300, 33), (0,)),
    ((5000,), (0,)),
    ((3, 9001), (1,)),
    ((9001, 3), (0,)),
    ((513, 1, 70), (0,)),
    ((1, 1), (0, 1)),
    ((70, 300, 2), (1,)),
]


@pytest.mark.parametrize(("shape", "axes"), REDUCED, ids=str)
def test_reductions_over_axes(device, shape, axes):
    x = normal(*shape)

    def sums(x):
        return x.sum(axes), (x * x + 1).sum(axes), jnp.exp(x).mean(axes)

    for found, expected in zip(run(device, sums, x), sums(x.astype(np.float64)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * x.size**0.5)

    def exact(x):
        i = (100 * x).astype(np.int32)
        found = [x.max(axes), x.min(axes), (x > 2).any(axes), (x > -3).all(axes), i.sum(axes), i.max(axes)]
        found += [lax.reduce_and(i, axes), lax.reduce_or(i, axes), lax.reduce_xor(i, axes)]
        found += [
            x.argmax(axes[0]),
            x.argmin(axes[0]),
            (i // 50).argmax(axes[-1]),
            (i // 50).argmin(axes[-1]),
        ]
        return found

    agree(device, exact, x)
    agree(device, lambda x: jnp.prod(1 + x / 1000, axes), x, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("shape", [(9, 13), (5, 400), (400, 5), (6000,)], ids=str)
def test_reductions_of_every_dtype(device, dtype, shape):
    x = sample(*shape, dtype=dtype)

    def fn(x):
        tops = [
            lax.reduce_max(x, (0,)),
            lax.reduce_min(x, (0,)),
            lax.argmax(x, 0, np.int32),
            lax.argmin(x, 0, np.uint32),
        ]
        return (*tops, lax.reduce_sum(x, (0,))) if dtype in INTEGERS else tops

    agree(device, fn, x)
    if dtype in FLOATS:
        (found,) = run(device, lambda x: lax.reduce_sum(x, (0,)), x)
        expected = x.astype(np.float64).sum(0)
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=TOLERANCE[dtype], atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 20), (3, 500), (5000,)], ids=str)
def test_nan_and_infinities_in_reductions(device, shape):
    x = normal(*shape)
    x[..., 7], x[..., 11] = np.inf, -np.inf
    y, z = x.copy(), np.full(shape, -np.inf, np.float32)
    y[..., 13], y[..., 17] = np.nan, np.nan

    def fn(x, y, z):
        found = []
        for a in (x, y, z):
            found += [a.max(-1), a.min(-1), a.argmax(-1), a.argmin(-1), a.sum(-1), jnp.isnan(a).any(-1)]
        return found

    agree(device, fn, x, y, z)


@pytest.mark.parametrize("shape", [(6, 9), (33, 70), (4, 1000), (300, 7)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_reductions_with_what_surrounds_them(device, shape, dtype):
    x = normal(*shape, dtype=dtype)
    scale = normal(shape[1], dtype=dtype, seed=1)

    def softmax(x, scale):
        return jax.nn.softmax(x * scale[None]), jax.nn.log_softmax(x), jax.nn.logsumexp(x, axis=-1)

    def layer_norm(x, scale):
        y = x.astype(F32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        return ((y - mean) * lax.rsqrt(variance + 1e-5)).astype(dtype) * scale[None], mean[:, 0], variance

    def loss(x, scale):
        return (jax.nn.softmax(x.astype(F32)) * scale[None].astype(F32)).sum(), x.astype(F32).sum(
            0
        ) * scale.astype(F32)

    def columns(x, scale):
        y = x.astype(F32)
        return (y / (1 + jnp.abs(y).sum(0, keepdims=True))).astype(dtype), y.max(0) - y.min(0)

    tolerance = 1e-5 if dtype == F32 else 0.05
    for fn in (softmax, layer_norm, loss, columns):
        agree(device, fn, x, scale, tolerance=tolerance * (shape[0] if fn is loss else 1))


def test_norm_of_many_arrays_and_their_update(device):
    """The clip by global norm: reductions of many geometries into one scalar, then many arrays of many shapes."""
    arrays = [
        normal(*shape, seed=i)
        for i, shape in enumerate([(3,), (64, 40), (5000,), (7, 1), (300, 80), (), (2, 3, 4)])
    ]

    def fn(*xs):
        norm = jnp.sqrt(sum((x**2).sum() for x in xs))
        return norm, *(x * jnp.minimum(1, 1 / norm) for x in xs)

    agree(device, fn, *arrays, tolerance=1e-6)
    generated = generate(graph_of(fn, *arrays)[0])
    assert len(generated.kernels) <= 3


def test_the_same_bits_every_time(device):
    x = normal(200, 333)
    fns = lambda x: (x.sum(), x.sum(0), x.sum(1), jax.nn.softmax(x), x.at[:, 0].add(1).mean())  # noqa: E731
    first, second = run(device, fns, x), run(device, fns, x, check=False)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32)], ids=str)
def test_running_reductions(device, dtype):
    x = sample(5, 37, dtype=dtype) if dtype in FLOATS else np.arange(185, dtype=dtype).reshape(5, 37) - 90
    for axis in (0, 1):
        for reverse in (False, True):
            functions = [lax.cumsum, lax.cummax, lax.cummin]
            functions += [lax.cumprod, *([lax.cumlogsumexp] if dtype in FLOATS else [])] if axis == 0 else []
            tolerance = {F32: 1e-5, BF16: 0.05}.get(dtype)

            def fn(x, functions=functions, axis=axis, reverse=reverse):
                return [f(x, axis=axis, reverse=reverse) for f in functions]

            agree(device, fn, x, tolerance=tolerance)


PRODUCTS = [
    ((4, 5), (5, 6), ((1,), (0,)), ((), ())),
    ((5, 4), (6, 5), ((0,), (1,)), ((), ())),
    ((3, 4, 5), (3, 5, 2), ((2,), (1,)), ((0,), (0,))),
    ((4, 3, 5), (5, 2, 3), ((2,), (0,)), ((1,), (2,))),
    ((2, 3, 4), (4, 3, 5), ((1, 2), (1, 0)), ((), ())),
    ((7,), (7,), ((0,), (0,)), ((), ())),
    ((2, 3), (4,), ((), ()), ((), ())),
    ((2, 0), (0, 3), ((1,), (0,)), ((), ())),
    ((65, 130), (130, 33), ((1,), (0,)), ((), ())),
]


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32), np.dtype(np.int8)], ids=str)
@pytest.mark.parametrize(("left", "right", "contracted", "batch"), PRODUCTS, ids=str)
def test_products(device, left, right, contracted, batch, dtype):
    """Of small integers, which are exact in every order."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, size=shape).astype(dtype) for shape in (left, right))
    preferred = F32 if dtype in FLOATS else np.int32
    numbers = (contracted, batch)
    agree(device, lambda a, b: lax.dot_general(a, b, numbers, preferred_element_type=preferred) * 2, a, b)


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32), np.dtype(np.uint8), BOOL], ids=str)
@pytest.mark.parametrize("shape", [(1,), (300,), (3, 65), (64, 3)], ids=str)
def test_sorts(device, dtype, shape):
    x = sample(*shape, dtype=dtype)
    if dtype in FLOATS and shape == (300,):
        x[:16] = SPECIAL.astype(dtype)
    carried = np.arange(x.size, dtype=np.int32).reshape(shape)

    def fn(x, carried):
        found = []
        for axis in range(x.ndim):
            found += [lax.sort(x, axis), lax.sort((x, carried), axis, num_keys=1), jnp.argsort(x + x, axis)]
            found.append(lax.sort(((carried // 7) % 3, x, carried), axis, num_keys=2))
        return found

    agree(device, fn, x, carried)


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32)], ids=str)
def test_top_k(device, dtype):
    agree(device, lambda x: (lax.top_k(x, 5), lax.top_k(x * 2, 1)), sample(3, 401, dtype=dtype))


def test_sampling_from_logits(device):
    """Temperature, top-k by a threshold, softmax and a draw by inversion, as one program."""

    def fn(logits, u):
        scaled = logits / 0.8
        least = lax.top_k(scaled, 10)[0][:, -1:]
        p = jax.nn.softmax(jnp.where(scaled < least, -1e30, scaled))
        return (jnp.cumsum(p, -1) < u[:, None]).sum(-1), p

    agree(device, fn, normal(3, 301), np.array([0.1, 0.5, 0.93], np.float32), tolerance=1e-6)


def test_memory_that_may_be_shared():
    def fn(x, y):
        return x + y, (x * 2)[::-1], y.astype(np.int32)

    graph, _ = graph_of(fn, normal(8), normal(8))
    assert generate(graph).in_place == {(1, 0), (1, 1), (1, 2)}  # x is read in another place too


def test_what_has_no_kernel_is_refused():
    graph, _ = graph_of(lambda x: lax.linalg.cholesky(x), normal(3, 3))
    with pytest.raises(ValueError, match=r"no kernel is generated for cholesky\(float32\[3,3\]\)"):
        generate(graph)


def test_an_output_in_the_memory_of_an_input(device):
    x, y = normal(1000), normal(1000, seed=1)
    generated = generate(graph_of(lambda x, y: (x * y + 1, jnp.exp(y)), x, y)[0])
    assert generated.in_place == {(0, 0), (0, 1), (1, 0), (1, 1)}
    (kernel,) = generated.kernels
    buffers = [device.upload(x), device.upload(y)] * 2  # outputs 0 and 1 in inputs 0 and 1
    with device.recorder() as recorder:
        made = device.kernel_from_spirv(kernel.spirv, kernel.label)
        recorder.dispatch(made, [buffers[i] for i in kernel.operands], b"", kernel.groups)
        recorder.submit().wait()
    np.testing.assert_allclose(buffers[0].read(F32, (1000,)), x * y + 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(buffers[1].read(F32, (1000,)), np.exp(y), rtol=1e-5)
