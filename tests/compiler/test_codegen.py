"""Generated kernels of elementwise and shape primitives against XLA: every dtype, special values, odd shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.random import threefry2x32_p
from run_graph import (
    BF16,
    BOOL,
    F32,
    FLOATS,
    INTEGERS,
    SIGNED,
    SMALLEST,
    agree,
    bools,
    compare,
    floats,
    integers,
    normal,
    run,
    sample,
)
from vulkan_devices import needs_vulkan

pytestmark = needs_vulkan


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
    """Movements of x (4, 6, 5)."""
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


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, BOOL], ids=str)
def test_shapes(device, dtype):
    agree(device, shape_functions, sample(4, 6, 5, dtype=dtype))


def test_iota_and_literals(device):
    def fn(x):
        grids = [lax.broadcasted_iota(t, (3, 70), axis) for t in (np.int32, np.uint8, F32, BF16) for axis in (0, 1)]
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
