"""The public operations on Vulkan: every case against its float64 truth, and what callers may do with them."""

import functools
import inspect
import os
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from profiles import NIGHT
from vulkan_devices import SELECTOR, memory_at_rest, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.bridge.custom_call import counts
from vk_kernels.errors import NoDeviceError
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.tools.check_ops import check, outputs_and_gradients
from vk_kernels.tools.op_cases import BF16, CASES, F32, RNG, SIZES, numbers

pytestmark = [needs_vulkan, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def strict(strict_dtypes):
    """Callers may run under strict promotion."""


@pytest.fixture
def on_vulkan():
    with vk_kernels.use("vulkan", device=SELECTOR):
        yield


def on_both(function, *operands):
    """The results of a function of the ops on XLA, and on Vulkan, under jit; kernels must have run for the second."""
    expected = jax.jit(function)(*operands)
    before = counts()
    with vk_kernels.use("vulkan", device=SELECTOR):
        found = jax.block_until_ready(jax.jit(function)(*operands))
    assert counts() != before
    return found, expected


def assert_close(found, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_against_the_truth(case, dtype):
    results = list(check(case, "tiny", dtype, SELECTOR))
    assert results
    assert all(result.passed for result in results), "\n".join(map(str, results))


@pytest.mark.parametrize("op", ["gelu", "layer_norm", "embedding", "dropout"])
def test_over_a_megabyte(op):
    (case,) = (case for case in CASES if case.op == op)
    results = list(check(case, "megabyte", F32, SELECTOR))
    assert all(result.passed for result in results), "\n".join(map(str, results))


def row(seed, *shape):
    return jnp.asarray(numbers(shape, F32, seed))


def matmul_loss(x, w, bias, residual):
    y = ops.matmul(x, w, bias, activation="gelu", residual=residual, rng=jnp.asarray(RNG), dropout_rate=0.2, site=1)
    return jnp.sum(jnp.square(y))


VMAPPED = {
    "matmul": (lambda x: ops.matmul(x, row(1, 6, 5), activation="gelu"), (4, 2, 3, 6)),
    "matmul of each": (lambda w: ops.matmul(row(1, 3, 6), w), (4, 6, 5)),
    "layer_norm": (lambda x: ops.layer_norm(x, row(1, 6), row(2, 6)), (4, 3, 6)),
    "layer_norm of one row": (lambda x: ops.layer_norm(x, row(1, 6), row(2, 6)), (4, 6)),
    # The columns and options of CASES, whose kernels they then run: each more takes a CPU device seconds to compile.
    "residual_layer_norm": (
        lambda x: ops.residual_layer_norm(x, row(1, 3, 36), row(2, 36), row(3, 36)),
        (4, 3, 36),
    ),
    "attention": (lambda x: ops.attention(x, x, x), (3, 2, 5, 2, 4)),
    "attention with cap and dropout": (
        lambda x: ops.attention(x, x, x, jnp.asarray(RNG), cap=20.0, dropout_rate=0.3, site=2),
        (3, 2, 5, 2, 4),
    ),
    "packed_attention": (
        lambda qkv: ops.packed_attention(qkv, jnp.asarray(RNG), cap=20.0, dropout_rate=0.3, site=2),
        (3, 2, 5, 3, 2, 4),
    ),
    "gelu of numbers": (ops.gelu, (7,)),
    "dropout": (lambda x: ops.dropout(x, jnp.asarray(RNG), rate=0.3, site=2), (4, 3, 6)),
    "embedding": (lambda table: ops.embedding(table, jnp.array([[0, 2], [1, 2]], jnp.int32)), (3, 4, 5)),
    "linear_cross_entropy": (
        lambda x: ops.linear_cross_entropy(x, row(1, 6, 9), jnp.array([1, -1, 8], jnp.int32)),
        (4, 3, 6),
    ),
    "linear_cross_entropy of each table": (
        lambda w: ops.linear_cross_entropy(row(1, 3, 6), w, jnp.array([1, -1, 8], jnp.int32), transposed=True),
        (4, 9, 6),
    ),
    "global_norm": (ops.global_norm, (4, 3, 6)),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_and_its_gradient(name):
    """Under vmap an operation does to each element what it does to one: the same dropout mask, for one."""
    function, shape = VMAPPED[name]
    x = row(0, *shape)
    assert_close(*on_both(jax.vmap(function), x))
    if name != "global_norm":
        loss = jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(x))))
        assert_close(*on_both(jax.vmap(loss), x))


def test_optional_operands():
    x, w, bias, residual = row(0, 2, 5, 36), row(1, 36, 7), row(2, 7), row(3, 2, 5, 7)
    assert_close(*on_both(jax.value_and_grad(matmul_loss, argnums=(0, 1, 2, 3)), x, w, bias, residual), 1e-4)
    assert_close(
        *on_both(jax.grad(lambda x, r: jnp.sum(ops.matmul(x, w, residual=r) ** 2), argnums=(0, 1)), x, residual)
    )
    without = jax.grad(lambda x: jnp.sum(ops.residual_layer_norm(x, x, w[:, 0], w[:, 1], dropout_rate=0.5)[1] ** 2))
    assert_close(*on_both(without, x), 1e-4)


def test_scan_over_layers_with_remat():
    weights, x = row(0, 3, 6, 6) * 0.3, row(1, 4, 6)

    def loss(weights, x):
        layer = jax.checkpoint(lambda x, w: (ops.layer_norm(x + ops.matmul(x, w), w[0], w[1]), None))
        return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)

    assert_close(*on_both(jax.grad(loss, argnums=(0, 1)), weights, x), 1e-4)


def test_data_parallel():
    """Half of the batch on each of two CPU devices; the gradients of the shared parameters are summed over both."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    batch, shared = PartitionSpec("data"), PartitionSpec()
    parameters = row(0, 11, 36), row(1, 36, 11), row(2, 36)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 5), dtype=np.int32))

    def local_loss(parameters, tokens):
        table, w, scale = parameters
        x = ops.embedding(table, tokens)
        x = ops.layer_norm(x + ops.attention(*[x.reshape(2, 5, 3, 12)] * 3).reshape(x.shape), scale, scale)
        x = ops.dropout(x, jnp.asarray(RNG), rate=0.1, site=1)
        return ops.linear_cross_entropy(x.reshape(-1, 36), w, tokens.reshape(-1)).mean()

    def mean_of_shards(parameters, tokens):
        return (local_loss(parameters, tokens[:2]) + local_loss(parameters, tokens[2:])) / 2

    sharded = jax.shard_map(
        lambda *arguments: jax.lax.pmean(local_loss(*arguments), "data"),
        mesh=mesh,
        in_specs=(shared, batch),
        out_specs=shared,
    )
    expected = jax.jit(jax.value_and_grad(mean_of_shards))(parameters, tokens)
    with vk_kernels.use("vulkan", device=SELECTOR):
        found = jax.jit(jax.value_and_grad(sharded))(parameters, tokens)
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("implementation", ["xla", "vulkan"])
def test_dropout_of_shards(implementation):
    """Each of two CPU devices drops from its own half what it would alone."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    halves = PartitionSpec("data")

    def value_and_gradient(x):
        y, pullback = jax.vjp(lambda x: ops.dropout(x, jnp.asarray(RNG), rate=0.4, site=5), x)
        return y, *pullback(x)

    sharded = jax.shard_map(value_and_gradient, mesh=mesh, in_specs=halves, out_specs=halves)
    x = row(0, 6, 37)
    with vk_kernels.use(implementation, device=SELECTOR if implementation == "vulkan" else None):
        found = jax.jit(sharded)(x)
    expected = map(jnp.concatenate, zip(*(jax.jit(value_and_gradient)(half) for half in (x[:3], x[3:])), strict=True))
    jax.tree.map(np.testing.assert_array_equal, found, tuple(expected))


def test_dropout_masks_are_those_of_the_reference():
    x = jnp.ones((3, 37))
    found, expected = on_both(lambda x: ops.dropout(x, jnp.asarray(RNG), rate=0.4, site=5), x)
    np.testing.assert_array_equal(found, expected)


def test_shapes_are_found_without_dropouts_bits(on_vulkan, monkeypatch):
    """A trace of the reference tells an op's shapes: once for all rates and sites, and without the masks' generator."""
    for module in ("dropout", "attention.reference"):
        found = sys.modules[f"vk_kernels.ops.{module}"]  # the package has a function of that name
        monkeypatch.setattr(found, "dropout_mask", lambda *_: pytest.fail("bits were traced"))
    rows, qkv, weights = jnp.ones((37, 24), BF16), jnp.ones((3, 7, 3, 2, 12), BF16), jnp.ones((24, 24), BF16)
    scale, rng = jnp.ones(24), jnp.zeros(2, jnp.uint32)

    def sum_of_all(rows, qkv, weights):
        dropped = ops.dropout(rows, rng, rate=0.1, site=1)
        total, normed = ops.residual_layer_norm(rows, dropped, scale, scale, rng, dropout_rate=0.2, site=2)
        product = ops.matmul(normed, weights, residual=total, rng=rng, dropout_rate=0.3, site=3)
        attended = ops.packed_attention(qkv, rng, dropout_rate=0.4, site=4)
        return sum(x.astype(F32).sum() for x in (product, attended))

    gradients = jax.eval_shape(jax.grad(sum_of_all, (0, 1, 2)), rows, qkv, weights)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in (rows, qkv, weights)]


def test_two_runs_are_bit_equal():
    x, w = row(0, 33, 20), row(1, 20, 41)
    targets = jnp.arange(33, dtype=jnp.int32)
    with vk_kernels.use("vulkan", device=SELECTOR):
        run = jax.jit(jax.value_and_grad(lambda x, w: ops.linear_cross_entropy(x, w, targets).sum(), argnums=(0, 1)))
        first, second = run(x, w), run(x, w)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.timeout(1800)
def test_mixed_calls_keep_memory_and_files_flat(on_vulkan):
    """Forward and backward passes of every case, in turn."""
    device, calls = open_device(SELECTOR), []
    for case in CASES:
        operands = jax.tree.map(jnp.asarray, case.operands(SIZES["tiny"], F32))
        calls.append((jax.jit(functools.partial(outputs_and_gradients, case.run, case.differentiable)), operands))

    def run(rounds: int) -> tuple[tuple[int, ...], int]:
        for _ in range(rounds):
            jax.block_until_ready([call(*operands) for call, operands in calls])
        stats = memory_at_rest(device)
        return (stats.used, stats.buffers, stats.reserved), len(os.listdir("/proc/self/fd"))

    memory, files = run(2)
    assert run((10_000 if NIGHT else 250) // len(calls) + 1) == (
        memory,
        pytest.approx(files, abs=9),
    )  # others' come and go


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_rows(shape):
    """Nothing to compute but gradients of parameters, which are 0."""

    def loss(x, scale, w):
        y = ops.matmul(ops.gelu(ops.layer_norm(x, scale, scale)), w)
        return jnp.sum(ops.dropout(y, jnp.asarray(RNG), rate=0.5, site=1))

    assert_close(*on_both(jax.value_and_grad(loss, argnums=(0, 1, 2)), row(0, *shape), row(1, 6), row(2, 6, 5)))


def test_nan_passes_through():
    x = row(0, 4, 6).at[1, 2].set(jnp.nan)
    for function in (
        ops.gelu,
        lambda x: ops.layer_norm(x, row(1, 6), row(2, 6)),
        lambda x: ops.matmul(x, row(1, 6, 3)),
    ):
        found, expected = on_both(function, x)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


def test_eagerly(on_vulkan):
    before = counts().get("gelu_forward.f32", 0)
    ops.gelu(row(0, 3, 4))
    assert counts()["gelu_forward.f32"] == before + 1


def test_by_argument():
    x = row(0, 3, 4)
    before = counts()
    ops.gelu(x, implementation="xla")
    ops.gelu(x)
    assert counts() == before
    with vk_kernels.use("vulkan", device=SELECTOR):
        ops.gelu(x, implementation="xla")
        assert counts() == before
    with pytest.raises(ValueError, match="implementation is None, 'xla' or 'vulkan', not 'cuda'"):
        ops.gelu(x, implementation="cuda")


def test_by_name_without_a_device_raises(monkeypatch):
    def none(*_):
        raise NoDeviceError("no Vulkan driver on this machine")

    monkeypatch.setattr("vk_kernels.runtime.device.survey", none)
    monkeypatch.setattr("vk_kernels.runtime.open_devices._devices", {})
    with pytest.raises(NoDeviceError, match="no Vulkan driver"):
        ops.gelu(row(0, 3), implementation="vulkan")


Q = np.zeros((1, 4, 2, 8), np.float32)

REFUSED = {
    "float16": (lambda: ops.gelu(np.zeros(3, np.float16)), r"gelu\(float16\[3\]\) on .*float32 or bfloat16"),
    "integer input": (lambda: ops.gelu(np.zeros(3, np.int32)), "float32 or bfloat16"),
    "head dim": (
        lambda: ops.attention(*[np.zeros((1, 2, 1, 129), np.float32)] * 3),
        r"head dim .*from 1 to 128, found 129",
    ),
    "k of another shape": (
        lambda: ops.attention(Q, Q[:, :3], Q),
        r"k must be float32\[1,4,2,8\], found float32\[1,3,2,8\]",
    ),
    "k of another dtype": (lambda: ops.attention(Q, Q.astype(ml_dtypes.bfloat16), Q), r"found bfloat16"),
    "w of another dtype": (
        lambda: ops.matmul(np.zeros((2, 3), np.float32), np.zeros((3, 4), ml_dtypes.bfloat16)),
        r"w must be float32\[3,4\], found bfloat16\[3,4\]",
    ),
    "w of another shape": (lambda: ops.matmul(Q, np.zeros((7, 4), np.float32)), r"w must be float32\[8,4\]"),
    "w of three axes": (lambda: ops.matmul(Q, np.zeros((2, 8, 4), np.float32)), r"w \(K, N\)"),
    "bias": (
        lambda: ops.matmul(Q, np.zeros((8, 4), np.float32), np.zeros(1, np.float32)),
        r"bias must be float32\[4\], found float32\[1\]",
    ),
    "residual": (
        lambda: ops.matmul(Q, np.zeros((8, 4), np.float32), residual=np.zeros(4, np.float32)),
        r"residual must be float32\[1,4,2,4\]",
    ),
    "activation": (
        lambda: ops.matmul(Q, np.zeros((8, 4), np.float32), activation="relu"),
        "None or 'gelu', found 'relu'",
    ),
    "scale": (
        lambda: ops.layer_norm(Q, np.ones(1, np.float32), np.ones(8, np.float32)),
        r"scale must be float32\[8\]",
    ),
    "rng": (lambda: ops.dropout(Q, np.zeros(2, np.int32), rate=0.1, site=0), r"rng must be uint32\[2\]"),
    "rate": (lambda: ops.dropout(Q, RNG, rate=1.0, site=0), r"rate must be in \[0, 1\), found 1.0"),
    "site": (lambda: ops.dropout(Q, RNG, rate=0.1, site=-1), "site must be in"),
    "ids": (lambda: ops.embedding(np.zeros((3, 4), np.float32), np.zeros(2, np.int16)), "int32 or uint32"),
    "table of another shape": (
        lambda: ops.linear_cross_entropy(
            Q[0, :, 0], np.zeros((8, 9), np.float32), np.zeros(4, np.int32), transposed=True
        ),
        r"w must be float32\[8,8\], found float32\[8,9\]",
    ),
    "targets": (
        lambda: ops.linear_cross_entropy(Q[0, :, 0], np.zeros((8, 9), np.float32), np.zeros(3, np.int32)),
        r"targets must be int32\[4\], found int32\[3\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name, on_vulkan):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("implementation", ["xla", "vulkan"])
def test_a_call_that_does_not_fit_names_the_op_and_its_operands(implementation):
    with pytest.raises(TypeError, match=r"^layer_norm: missing a required argument: 'scale'"):
        ops.layer_norm(np.ones(3), implementation=implementation)
    with pytest.raises(TypeError, match=r"^gelu: got an unexpected keyword argument 'approximate'"):
        ops.gelu(np.ones(3), approximate=True, implementation=implementation)
    with pytest.raises(ValueError, match=r"\d") as caught:
        ops.matmul(np.ones(4), np.ones((3, 4), np.float32), transposed=False, implementation=implementation)
    assert caught.value.__notes__ == ["called as vk_kernels.ops.matmul(float32[4], float32[3,4], transposed=False)"]


@pytest.mark.parametrize("implementation", ["xla", "vulkan"])
def test_float64_of_numpy_is_taken_as_jax_takes_it(implementation):
    x, w = np.ones((2, 3)), np.ones((3, 4), np.float32)
    found = jax.eval_shape(lambda: ops.matmul(x, w, implementation=implementation))
    assert (found.shape, found.dtype) == ((2, 4), np.float32)


def test_second_derivatives_say_why_not(on_vulkan):
    x = row(0, 3, 4)
    with pytest.raises(TypeError, match=r"gelu.*: the Vulkan kernels have a gradient, but no forward-mode"):
        jax.hessian(lambda x: ops.gelu(x).sum())(x)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(ops.gelu, (x,), (x,))
    with pytest.raises(TypeError, match="global_norm"):
        jax.grad(ops.global_norm)(x)


@pytest.mark.parametrize(
    "name", sorted(set(ops.__all__) - {"IGNORED", "Controls", "Drawn", "Texts", "attention_scores"})
)
def test_signatures_and_docstrings_name_the_implementation(name):
    function = getattr(ops, name)
    assert function.__name__ == name
    assert inspect.signature(function).parameters["implementation"].default is None
    assert "implementation: 'xla', 'vulkan'" in function.__doc__
