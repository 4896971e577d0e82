"""The reference operations against float64, finite differences and known answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vk_kernels import ops
from vk_kernels.ops.dropout import dropout_mask, dropout_scale, dropout_threshold
from vk_kernels.ops.philox import philox4x32, random_uint16

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RNG = np.array([42, 7], np.uint32)  # seed, step


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(actual: jax.Array, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual, np.float64) - expected).max(initial=0) <= tolerance * (1 + np.abs(expected).max())


# Published vectors of Random123 (tests/kat_vectors): rounds, counter, key, words.
KNOWN_ANSWERS = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        7,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, counter, key, expected):
    words = philox4x32(tuple(map(jnp.uint32, counter)), tuple(map(jnp.uint32, key)), rounds)
    assert tuple(map(int, words)) == expected


def test_random_bits_follow_the_documented_grid():
    bits = np.asarray(random_uint16(jnp.asarray(RNG), 5, (2, 3, 19)))
    for batch, row, column in [(0, 0, 0), (1, 2, 18), (1, 0, 7), (0, 2, 9)]:
        counter = tuple(map(jnp.uint32, (column // 8, row, batch, RNG[1])))
        word = int(philox4x32(counter, (jnp.uint32(RNG[0]), jnp.uint32(5)))[column % 8 // 2])
        assert bits[batch, row, column] == (word >> 16 if column % 2 else word & 0xFFFF)


def test_dropout_rate_scale_and_sites():
    rate = 0.1
    masks = [np.asarray(dropout_mask(jnp.asarray(RNG), site, rate, (64, 64, 64))) for site in (0, 1)]
    kept = 1 / dropout_scale(rate)
    deviation = math.sqrt(kept * (1 - kept) / masks[0].size)
    for mask in masks:
        assert abs(mask.mean() - kept) < 4 * deviation
    assert abs((masks[0] == masks[1]).mean() - (kept**2 + (1 - kept) ** 2)) < 4 * deviation
    next_step = np.asarray(dropout_mask(jnp.asarray(RNG + np.uint32([0, 1])), 0, rate, (64, 64, 64)))
    assert (next_step != masks[0]).any()


def test_dropout_is_the_masked_and_scaled_input_and_its_own_gradient():
    x = jnp.asarray(normal(3, 5, 20))
    y, pullback = jax.vjp(lambda x: ops.dropout(x, jnp.asarray(RNG), rate=0.3, site=1), x)
    mask = np.asarray(dropout_mask(jnp.asarray(RNG), 1, 0.3, (15, 20))).reshape(x.shape)
    np.testing.assert_array_equal(y, np.where(mask, x * np.float32(dropout_scale(0.3)), 0))
    np.testing.assert_array_equal(pullback(x)[0], y)


def test_dropout_of_nothing_and_of_a_bad_rate():
    x = jnp.ones((4, 4))
    assert ops.dropout(x, None, rate=0.5, site=0) is x
    assert ops.dropout(x, jnp.asarray(RNG), rate=0.0, site=0) is x
    for rate in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"dropout rate must be in \[0, 1\)"):
            dropout_threshold(rate)


def test_gelu():
    x = normal(1000) * 4
    x64 = x.astype(np.float64)
    inner = math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3)
    assert_close(ops.gelu(jnp.asarray(x)), 0.5 * x64 * (1 + np.tanh(inner)))
    check_grads(jax.jit(ops.gelu), (jnp.asarray(x),), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_layer_norm():
    x, scale, bias = normal(7, 33) * 3 + 1, normal(33, seed=1), normal(33, seed=2)
    x64 = x.astype(np.float64)
    normed = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5)
    assert_close(ops.layer_norm(*map(jnp.asarray, (x, scale, bias))), normed * scale + bias)
    check_grads(jax.jit(ops.layer_norm), (x, scale, bias), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_matmul_with_every_epilogue():
    x, w, bias, residual = normal(2, 5, 16), normal(16, 9, seed=1), normal(9, seed=2), normal(2, 5, 9, seed=3)
    y = x.astype(np.float64) @ w.astype(np.float64) + bias
    assert_close(ops.matmul(x, w, bias), y)
    inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    y = 0.5 * y * (1 + np.tanh(inner))
    mask = np.asarray(dropout_mask(jnp.asarray(RNG), 4, 0.2, (10, 9))).reshape(y.shape)
    expected = residual + np.where(mask, y * dropout_scale(0.2), 0)
    actual = ops.matmul(
        x, w, bias, activation="gelu", residual=residual, rng=jnp.asarray(RNG), dropout_rate=0.2, site=4
    )
    assert_close(actual, expected)
    with pytest.raises(ValueError, match="activation must be None or 'gelu', found 'relu'"):
        ops.matmul(x, w, activation="relu")


def test_embedding_and_its_gradient():
    table, ids = jnp.asarray(normal(11, 4)), jnp.array([[3, 3, 0], [10, 3, 11]])
    rows, pullback = jax.vjp(lambda table: ops.embedding(table, ids), table)
    np.testing.assert_array_equal(rows[:, :2], np.asarray(table)[np.asarray(ids)[:, :2]])
    assert np.isnan(rows[1, 2]).all()
    counts = np.zeros((11, 4), np.float32)
    counts[3], counts[0], counts[10] = 3, 1, 1
    np.testing.assert_array_equal(pullback(jnp.ones_like(rows))[0], counts)


def attention_in_float64(q, k, v, cap=None, mask=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    length = q.shape[1]
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    weights = weights if mask is None else weights * mask
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (1, 1, 1, 8), (1, 17, 2, 5)])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_attention(shape, cap):
    q, k, v = (normal(*shape, seed=seed) * 2 for seed in range(3))
    attend = jax.jit(ops.attention, static_argnames=("cap", "dropout_rate", "site"))
    assert_close(attend(q, k, v, cap=cap), attention_in_float64(q, k, v, cap))
    batch, length, heads, _ = shape
    mask = np.asarray(dropout_mask(jnp.asarray(RNG), 2, 0.4, (batch * heads, length, length)))
    mask = mask.reshape(batch, heads, length, length) * dropout_scale(0.4)
    dropped = attend(q, k, v, jnp.asarray(RNG), cap=cap, dropout_rate=0.4, site=2)
    assert_close(dropped, attention_in_float64(q, k, v, cap, mask))


def test_attention_gradient():
    q, k, v = (jnp.asarray(normal(1, 6, 2, 4, seed=seed)) for seed in range(3))

    @jax.jit
    def attend(q, k, v):
        return ops.attention(q, k, v, jnp.asarray(RNG), cap=3.0, dropout_rate=0.2)

    check_grads(attend, (q, k, v), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_packed_attention_is_attention_of_its_parts():
    qkv, options = jnp.asarray(normal(2, 9, 3, 2, 4)), {"cap": 3.0, "dropout_rate": 0.2, "site": 5}
    rng = jnp.asarray(RNG)

    @jax.jit
    def apart(qkv):
        return ops.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], rng, **options)

    together = jax.jit(lambda qkv: ops.packed_attention(qkv, rng, **options))
    np.testing.assert_array_equal(together(qkv), apart(qkv))
    check_grads(together, (qkv,), 1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_attention_sees_no_later_token():
    q, k, v = (normal(1, 9, 2, 4, seed=seed) for seed in range(3))
    before = ops.attention(q, k, v)
    k[:, 5:], v[:, 5:] = 99, -99
    np.testing.assert_array_equal(before[:, :5], ops.attention(q, k, v)[:, :5])


def test_linear_cross_entropy():
    x, w = normal(6, 5), normal(5, 9, seed=1)
    targets = np.array([0, 8, ops.IGNORED, 3, 3, ops.IGNORED], np.int32)
    logits = x.astype(np.float64) @ w
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), np.maximum(targets, 0)]
    expected[targets < 0] = 0
    assert_close(ops.linear_cross_entropy(x, w, targets), expected)
    gradient = jax.grad(lambda x: ops.linear_cross_entropy(x, w, targets).sum())(jnp.asarray(x))
    assert not np.asarray(gradient)[targets < 0].any()
    losses = jax.jit(lambda x, w: ops.linear_cross_entropy(x, w, targets))
    check_grads(losses, (x, w), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_bf16_in_gives_bf16_out_from_f32_sums():
    q, k, v = (jnp.asarray(normal(2, 16, 2, 8, seed=seed), jnp.bfloat16) for seed in range(3))
    attended = ops.attention(q, k, v, cap=30.0)
    assert attended.dtype == jnp.bfloat16
    assert_close(attended, attention_in_float64(q, k, v, 30.0), tolerance=1e-2)
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.full((4096, 1), 0.125, jnp.bfloat16)
    assert ops.matmul(x, w).dtype == jnp.bfloat16
    assert float(ops.matmul(x, w)[0, 0]) == 512
    assert ops.layer_norm(q, jnp.ones(8), jnp.zeros(8)).dtype == jnp.bfloat16
    assert ops.linear_cross_entropy(x, w, jnp.zeros(1, jnp.int32)).dtype == jnp.float32
