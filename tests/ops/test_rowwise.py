"""Kernels on rows and elements: layer norm, dropout, GELU, embedding, against float64 and the references."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_plan import BF16, DTYPES, F32, assert_accurate, normal, run, same_bits
from vulkan_devices import needs_vulkan

from vk_kernels.ops.dropout import (
    dropout_backward_reference,
    dropout_forward_reference,
    dropout_mask,
    dropout_scale,
    plan_dropout_backward,
    plan_dropout_forward,
)
from vk_kernels.ops.embedding import (
    embedding_backward_reference,
    embedding_forward_reference,
    plan_embedding_backward,
    plan_embedding_forward,
)
from vk_kernels.ops.gelu import gelu_backward_reference, gelu_forward_reference, plan_gelu_backward, plan_gelu_forward
from vk_kernels.ops.layer_norm.planner import (
    plan_layer_norm_backward,
    plan_layer_norm_forward,
    plan_residual_layer_norm_backward,
    plan_residual_layer_norm_forward,
)
from vk_kernels.ops.layer_norm.reference import (
    layer_norm_backward_reference,
    layer_norm_forward_reference,
    layer_norm_reference,
    residual_layer_norm_backward_reference,
    residual_layer_norm_forward_reference,
    residual_layer_norm_reference,
)
from vk_kernels.ops.planning import MAX_GROUPS, dispatch
from vk_kernels.runtime.array_spec import ArraySpec

pytestmark = [needs_vulkan, pytest.mark.usefixtures("strict_dtypes")]

RNG = np.array([42, 7], np.uint32)  # seed, step
EPSILON = 1e-5
# Columns choose the kernel of a layer norm, which a CPU driver takes seconds to compile: these share theirs with each
# other and with other test modules, which take 33 and 36 too.
# Rows of a thread alone are of float32: a dtype is loaded and stored alike whatever the threads of a row.
SHAPES = [(1, 1), (3, 7), (300, 36), (33, 257), (2, 3, 2000), (2, 16384)]


def exact_norm(x, scale, bias):
    """(y, mean, rstd) in float64."""
    x = x.astype(np.float64)
    mean, rstd = x.mean(-1), 1 / np.sqrt(x.var(-1) + EPSILON)
    return (x - mean[..., None]) * rstd[..., None] * scale + bias, mean, rstd


def exact_norm_gradients(x, scale, dy):
    """(dx, dscale, dbias) in float64."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    _, mean, rstd = exact_norm(x, scale, 0)
    n, g = (x - mean[..., None]) * rstd[..., None], dy * scale
    dx = rstd[..., None] * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return dx, (dy * n).sum(rows), dy.sum(rows)


def norm_inputs(shape, dtype):
    x = (normal(*shape) * 3 + 1).astype(dtype)
    return x, normal(shape[-1], seed=1), normal(shape[-1], seed=2)


def in_dtypes(shapes):
    """Each shape in each dtype, rows of up to eight columns in float32."""
    return [(shape, dtype) for shape in shapes for dtype in DTYPES if dtype == F32 or shape[-1] > 8]


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes(SHAPES), ids=str)
def test_layer_norm(device, shape, dtype):
    inputs = norm_inputs(shape, dtype)
    actual = run(device, plan_layer_norm_forward, layer_norm_forward_reference, *inputs)
    plain = jax.jit(layer_norm_forward_reference)(*inputs)
    for name, ours, theirs, exact in zip(("y", "mean", "rstd"), actual, plain, exact_norm(*inputs), strict=True):
        assert_accurate(ours, theirs, exact, what=name)


STRIPS = [(2100, 257), (600, 2500)]  # several rows one after another in a strip, those of a whole workgroup too


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes(SHAPES + STRIPS), ids=str)
def test_layer_norm_gradients(device, shape, dtype):
    x, scale, bias = norm_inputs(shape, dtype)
    dy = normal(*shape, seed=3, dtype=dtype)
    _, mean, rstd = map(np.asarray, jax.jit(layer_norm_forward_reference)(x, scale, bias))
    inputs = (x, scale, mean, rstd, dy)
    actual = run(device, plan_layer_norm_backward, layer_norm_backward_reference, *inputs)
    plain = jax.jit(lambda *xs: jax.vjp(layer_norm_reference, *xs)[1](dy))(x, scale, bias)
    exact = exact_norm_gradients(x, scale, dy)
    for name, ours, theirs, true in zip(("dx", "dscale", "dbias"), actual, plain, exact, strict=True):
        assert_accurate(ours, theirs, true, 3, name)


@pytest.mark.parametrize(
    ("shape", "dtype"),  # columns that do not go into fours, and those that do, of few threads and of all
    [((2, 5, 33), F32), ((70, 36), F32), ((70, 36), BF16), ((2, 5000), F32), ((2, 5001), BF16)],
    ids=str,
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_residual_layer_norm(device, shape, dtype, rate):
    x, scale, bias = norm_inputs(shape, dtype)
    branch = normal(*shape, seed=4, dtype=dtype)
    parameters = {"dropout_rate": rate, "site": 3}
    inputs = (x, branch, scale, bias, RNG)
    forward = residual_layer_norm_forward_reference
    total, y, mean, rstd = run(device, plan_residual_layer_norm_forward, forward, *inputs, **parameters)
    mask = np.asarray(dropout_mask(RNG, 3, rate, (math.prod(shape[:-1]), shape[-1]))).reshape(shape)
    factors = mask * dropout_scale(rate)
    exact_total = x.astype(np.float64) + factors * branch.astype(np.float64)
    plain = jax.jit(functools.partial(forward, **parameters))(*inputs)
    assert_accurate(total, plain[0], exact_total, what="total")
    exact = exact_norm(total, scale, bias)  # of the total as it was stored
    for name, ours, theirs, true in zip(("y", "mean", "rstd"), (y, mean, rstd), plain[1:], exact, strict=True):
        assert_accurate(ours, theirs, true, what=name)

    dtotal, dy = normal(*shape, seed=5, dtype=dtype), normal(*shape, seed=6, dtype=dtype)
    backward = residual_layer_norm_backward_reference
    inputs = (total, scale, mean, rstd, dtotal, dy, RNG)
    actual = run(device, plan_residual_layer_norm_backward, backward, *inputs, **parameters)
    dx, dscale, dbias = exact_norm_gradients(total, scale, dy)
    dx += dtotal.astype(np.float64)
    plain = jax.jit(functools.partial(backward, **parameters))(*inputs)
    names, exact = ("dx", "dbranch", "dscale", "dbias"), (dx, dx * factors, dscale, dbias)
    for name, ours, theirs, true in zip(names, actual, plain, exact, strict=True):
        assert_accurate(ours, theirs, true, 3, name)
    np.testing.assert_array_equal(actual[1] == 0, ~mask | (actual[1] == 0))


def test_residual_layer_norm_without_an_rng_drops_nothing(device):
    x, scale, bias = norm_inputs((5, 33), F32)
    inputs, parameters = (x, 2 * x, scale, bias), {"dropout_rate": 0.5, "site": 0}
    forward = residual_layer_norm_forward_reference
    total, _, mean, rstd = run(device, plan_residual_layer_norm_forward, forward, *inputs, **parameters)
    np.testing.assert_array_equal(total, x + 2 * x)
    backward = residual_layer_norm_backward_reference
    inputs = (total, scale, mean, rstd, x, x)
    dx, dbranch, *_ = run(device, plan_residual_layer_norm_backward, backward, *inputs, **parameters)
    np.testing.assert_array_equal(dx, dbranch)


def pulled_back(fn, *operands):
    """The function that takes a cotangent of fn's results to those of the operands, as one program."""
    return jax.jit(jax.vjp(jax.jit(fn), *operands)[1])


def test_the_backward_references_are_the_gradients_of_the_forward_ones():
    x, scale, bias = map(jnp.asarray, norm_inputs((4, 9), F32))
    dy, dtotal = jnp.asarray(normal(4, 9, seed=3)), jnp.asarray(normal(4, 9, seed=4))
    _, mean, rstd = layer_norm_forward_reference(x, scale, bias)
    expected = pulled_back(layer_norm_reference, x, scale, bias)(dy)
    found = layer_norm_backward_reference(x, scale, mean, rstd, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)

    rng, parameters = jnp.asarray(RNG), {"dropout_rate": 0.3, "site": 1}

    def residual(x, branch, scale, bias):
        return residual_layer_norm_reference(x, branch, scale, bias, rng, **parameters)

    total, _, mean, rstd = residual_layer_norm_forward_reference(x, 2 * x, scale, bias, rng, **parameters)
    expected = pulled_back(residual, x, 2 * x, scale, bias)((dtotal, dy))
    found = residual_layer_norm_backward_reference(total, scale, mean, rstd, dtotal, dy, rng, **parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)

    expected = jax.vjp(gelu_forward_reference, x)[1](dy)[0]
    np.testing.assert_allclose(gelu_backward_reference(x, dy), expected, rtol=1e-4, atol=1e-5)

    ids = jnp.array([3, 1, 1, 0], jnp.int32)
    expected = jax.vjp(lambda table: embedding_forward_reference(table, ids), normal(5, 9))[1](dy)[0]
    np.testing.assert_allclose(embedding_backward_reference(ids, dy, table_rows=5), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (1000,), (2, 5, 33), (257, 64), (1, 100_003), (40_000, 1)])
def test_dropout_draws_the_bits_of_the_mask(device, shape, dtype):
    x = np.ones(shape, dtype)
    for plan, reference in (
        (plan_dropout_forward, dropout_forward_reference),
        (plan_dropout_backward, dropout_backward_reference),
    ):
        (y,) = run(device, plan, reference, x, RNG, rate=0.3, site=5)
        grid = (math.prod(shape[:-1]), math.prod(shape[-1:]))
        mask = np.asarray(dropout_mask(RNG, 5, 0.3, grid)).reshape(shape)
        np.testing.assert_array_equal(y != 0, mask)
        assert (y[mask] == np.asarray(dropout_scale(0.3), dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_dropout_is_the_reference_bit_for_bit(device, rate, dtype):
    x = normal(9, 100, dtype=dtype)
    (y,) = run(device, plan_dropout_forward, dropout_forward_reference, x, RNG, rate=rate, site=1)
    np.testing.assert_array_equal(y, np.asarray(dropout_forward_reference(x, RNG, rate=rate, site=1)))


def exact_gelu(x):
    """(gelu(x), gelu'(x)) in float64."""
    x = x.astype(np.float64)
    slope = math.sqrt(2 / math.pi)
    t = np.tanh(slope * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope * (1 + 3 * 0.044715 * x * x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3, 7), (33, 257), (4, 300_001)], ids=str)
def test_gelu(device, shape, dtype):
    x, dy = (4 * normal(*shape)).astype(dtype), normal(*shape, seed=1).astype(dtype)
    y, slope = exact_gelu(x)
    (actual,) = run(device, plan_gelu_forward, gelu_forward_reference, x)
    assert_accurate(actual, jax.jit(gelu_forward_reference)(x), y)
    (actual,) = run(device, plan_gelu_backward, gelu_backward_reference, x, dy)
    plain = jax.jit(lambda x: jax.vjp(gelu_forward_reference, x)[1](dy)[0])(x)
    assert_accurate(actual, plain, dy.astype(np.float64) * slope, 3)


def test_gelu_of_large_numbers(device):
    x = np.array([1e4, 1e18, 3e38, -1e4, -1e18, -3e38, np.inf, 0, -0.0], np.float32)
    (y,) = run(device, plan_gelu_forward, gelu_forward_reference, x)
    np.testing.assert_array_equal(y, np.where(x > 0, x, 0))
    dy = np.ones_like(x)[:6]
    (dx,) = run(device, plan_gelu_backward, gelu_backward_reference, x[:6], dy)
    np.testing.assert_array_equal(dx, x[:6] > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ids_shape", "columns"), [((), 7), ((1,), 1), ((257,), 33), ((3, 100), 256)], ids=str)
def test_embedding(device, ids_shape, columns, dtype):
    table = normal(50, columns, dtype=dtype)
    ids = np.random.default_rng(1).integers(-2, 52, ids_shape).astype(np.int32)
    (rows,) = run(device, plan_embedding_forward, embedding_forward_reference, table, ids)
    assert rows.tobytes() == np.asarray(embedding_forward_reference(table, ids)).tobytes()
    outside = (ids < 0) | (ids >= 50)
    assert (np.isnan(rows.astype(np.float32)).all(axis=-1) == outside).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("table_rows", "tokens", "columns"),
    [
        (1, 1, 1),
        (7, 33, 33),
        (255, 300, 3),
        (256, 300, 4),
        (257, 1000, 130),
        (70_000, 600, 5),
        (9, 0, 4),
        (20, 3000, 8),
    ],
)
def test_embedding_gradient_is_exact_on_small_integers(device, table_rows, tokens, columns, dtype):
    random = np.random.default_rng(0)
    ids = random.integers(-1, table_rows + 1, (tokens,)).astype(np.int32)
    ids[: tokens // 2] = table_rows // 2  # a row of many tokens
    dy = random.integers(-1, 2, (tokens, columns)).astype(dtype)
    expected = np.zeros((table_rows, columns), np.int64)
    inside = (ids >= 0) & (ids < table_rows)
    np.add.at(expected, ids[inside], dy[inside].astype(np.int64))
    plan, reference = plan_embedding_backward, embedding_backward_reference
    (dtable,) = run(device, plan, reference, ids, dy, table_rows=table_rows)
    assert np.abs(expected).max(initial=0) <= 256  # exact in bf16
    np.testing.assert_array_equal(dtable.astype(np.int64), expected)


def test_embedding_gradient_is_the_same_every_time(device):
    ids = np.random.default_rng(0).zipf(1.3, 2000).astype(np.uint32)
    dy = normal(2000, 40)
    plan, reference = plan_embedding_backward, embedding_backward_reference
    found = [run(device, plan, reference, ids, dy, table_rows=300) for _ in range(3)]
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
    exact = np.zeros((300, 40))
    np.add.at(exact, ids[ids < 300], dy[ids < 300].astype(np.float64))
    assert_accurate(found[0][0], reference(ids, dy, table_rows=300), exact, 3)


def test_layer_norm_gradients_are_the_same_every_time(device):
    shape = STRIPS[0]
    x, scale, bias = norm_inputs(shape, F32)
    _, mean, rstd = map(np.asarray, jax.jit(layer_norm_forward_reference)(x, scale, bias))
    inputs = (x, scale, mean, rstd, normal(*shape, seed=3))
    plan, reference = plan_layer_norm_backward, layer_norm_backward_reference
    assert same_bits(run(device, plan, reference, *inputs), run(device, plan, reference, *inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes_through_its_own_row_alone(device, dtype):
    x, scale, bias = norm_inputs((5, 40), dtype)
    x[2, 17] = np.nan
    y, mean, rstd = run(device, plan_layer_norm_forward, layer_norm_forward_reference, x, scale, bias)
    for rows in (y.astype(np.float32).sum(axis=-1), mean, rstd):
        assert np.isnan(rows).tolist() == [False, False, True, False, False]
    inputs = (x, scale, mean, rstd, normal(5, 40, dtype=dtype))
    dx, *_ = run(device, plan_layer_norm_backward, layer_norm_backward_reference, *inputs)
    assert np.isnan(dx.astype(np.float32)).all(axis=-1).tolist() == [False, False, True, False, False]
    for plan, reference in (
        (plan_gelu_forward, gelu_forward_reference),
        (plan_dropout_forward, dropout_forward_reference),
    ):
        parameters = {} if reference is gelu_forward_reference else {"rate": 0.0, "site": 0}
        (y,) = run(device, plan, reference, x, *([RNG] if parameters else []), **parameters)
        np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), np.isnan(x.astype(np.float32)))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 7)], ids=str)
def test_no_rows(device, shape):
    x, scale, bias = norm_inputs(shape, F32)
    y, mean, rstd = run(device, plan_layer_norm_forward, layer_norm_forward_reference, x, scale, bias)
    assert (y.shape, mean.shape, rstd.shape) == (shape, shape[:-1], shape[:-1])
    inputs = (x, scale, mean, rstd, x)
    _, dscale, dbias = run(device, plan_layer_norm_backward, layer_norm_backward_reference, *inputs)
    assert not dscale.any()
    assert not dbias.any()
    assert run(device, plan_gelu_forward, gelu_forward_reference, x)[0].shape == shape
    assert run(device, plan_dropout_forward, dropout_forward_reference, x, RNG, rate=0.1, site=0)[0].size == 0
    ids = np.zeros(shape[:-1], np.int32)
    rows = run(device, plan_embedding_forward, embedding_forward_reference, normal(3, 4), ids)
    assert rows[0].shape == (*shape[:-1], 4)


def test_more_workgroups_than_one_axis_takes():
    for workgroups, groups in ((MAX_GROUPS + 5, (MAX_GROUPS, 2, 1)), (7, (7, 1, 1))):
        assert dispatch("gelu_forward", "f32", workgroups, constants={"count": 1}, x=0, result=1).groups == groups


def test_what_has_no_kernel_is_refused(device):
    x, ids = ArraySpec((4, 4), np.dtype(np.float16)), ArraySpec((4,), np.dtype(np.int64))
    table = ArraySpec((4, 4), BF16)
    with pytest.raises(ValueError, match=r"take float32 or bfloat16, found float16\[4,4\]"):
        plan_gelu_forward(device.info, [x], [x])
    with pytest.raises(ValueError, match=r"ids must be int32 or uint32, found int64\[4\]"):
        plan_embedding_forward(device.info, [table, ids], [table])
    with pytest.raises(ValueError, match=r"one variant, 'plain', found 'coop2'"):
        plan_gelu_forward(device.info, [table], [table], variant="coop2")
    many = ArraySpec((20_000_000,), np.dtype(np.int32))
    with pytest.raises(ValueError, match=r"16,776,960 tokens and rows at most, found 20,000,000 and 4"):
        plan_embedding_backward(device.info, [many, table], [table], table_rows=4)
