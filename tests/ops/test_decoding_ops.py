"""The kernels of decoding: attention over a cache, which is updated in place, and products of few rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_plan import BF16, F32, assert_accurate, normal, run, same_bits
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.ops.attention.decode import decode_attention_reference, plan_decode_attention
from vk_kernels.ops.matmul.planner import plan_matmul_forward
from vk_kernels.ops.matmul.reference import matmul_forward_reference
from vk_kernels.runtime.array_spec import ArraySpec

pytestmark = [needs_vulkan, pytest.mark.timeout(300)]

MATMUL = {"has_residual": False, "dropout_rate": 0.0, "site": 0, "transposed": True}


def without_subgroups(device):
    features = dataclasses.replace(device.info.features, names=device.info.features.names - {"computeFullSubgroups"})
    return dataclasses.replace(device.info, features=features)


def decode_operands(texts, length, heads, head_dim, dtype):
    qkv = normal(texts, 3, heads, head_dim, seed=1, dtype=dtype)
    cache = normal(texts, length, 2, heads, head_dim, seed=2, dtype=dtype)
    return qkv, cache, np.linspace(0, length - 1, texts).astype(np.int32)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "parts", "small"),
    [(F32, 33, 1, False), (BF16, 64, 3, False), (BF16, 100, 1, False), (F32, 8, 2, True)],
)
def test_attention_over_a_cache_by_any_number_of_workgroups(device, dtype, head_dim, parts, small):
    operands = decode_operands(4, 70, 2, head_dim, dtype)
    operands[1][0, 1:], operands[1][1, 24:] = np.nan, np.nan  # what lies past a text is not read
    info = without_subgroups(device) if small else device.info

    @functools.wraps(plan_decode_attention)
    def planner(_, *arrays, **options):
        return plan_decode_attention(info, *arrays, parts=parts, **options)

    found = run(device, planner, decode_attention_reference, *operands, cap=5.0)
    plain = jax.jit(functools.partial(decode_attention_reference, cap=5.0))(*operands)
    with jax.enable_x64(True):
        exact = decode_attention_reference(*(x.astype(np.float64) for x in operands[:2]), operands[2], cap=5.0)
    assert_accurate(found[0], plain[0], np.asarray(exact[0]))
    assert same_bits(found[1:], [np.asarray(plain[1])])
    assert same_bits(found, run(device, planner, decode_attention_reference, *operands, cap=5.0))


def decode_twice(qkv, cache, positions):
    """Two tokens, one after the other."""
    first, cache = ops.decode_attention(qkv, cache, positions)
    second, cache = ops.decode_attention(qkv + first[:, None], cache, positions + 1)
    return cache, second


def test_a_donated_cache_is_updated_where_it_is():
    qkv, cache, positions = decode_operands(2, 16, 2, 8, F32)
    positions = positions // 2
    expected = jax.jit(decode_twice)(qkv, cache, positions)
    with vk_kernels.use("vulkan", device=SELECTOR):
        donating = vk_kernels.jit(decode_twice, donate_argnums=1)
        text = donating.lower(qkv, cache, positions).as_text()
        assert "copy" not in text
        assert text.count("decode_attention.f32_32 of") == 2
        given = vk_kernels.device_put(cache, SELECTOR)
        found = donating(qkv, given, positions)
        assert given.is_deleted()
        kept = vk_kernels.device_put(cache, SELECTOR)
        keeping = vk_kernels.jit(decode_twice)
        text = keeping.lower(qkv, kept, positions).as_text()
        assert text.count("copy_array") == 1  # the second is in place all the same
        again = keeping(qkv, kept, positions)
    np.testing.assert_array_equal(np.asarray(kept), cache)
    for one, other, right in zip(found, again, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        np.testing.assert_allclose(np.asarray(one), right, rtol=1e-5, atol=1e-5)


def test_a_cache_of_more_rows_is_that_of_the_first_texts(device):
    qkv, cache, positions = decode_operands(4, 16, 2, 8, F32)
    first = functools.partial(run, device, plan_decode_attention, decode_attention_reference)
    out, new = first(qkv[:2], cache, positions[:2])
    assert same_bits([out, new[:2]], first(qkv[:2], cache[:2], positions[:2]))
    assert same_bits([new[2:]], [cache[2:]])


def test_an_array_that_is_read_after_its_update_stays_as_it_was():
    def function(qkv, cache, positions):
        out, new = ops.decode_attention(qkv, cache, positions)
        later, _ = ops.decode_attention(qkv + out[:, None], cache, positions)  # of the cache before
        return new, later, jnp.sum(cache)

    operands = decode_operands(2, 16, 2, 8, F32)
    expected = jax.jit(function)(*operands)
    with vk_kernels.use("vulkan", device=SELECTOR):
        found = vk_kernels.jit(function, donate_argnums=1)(*operands)
    for one, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "heads", "head_dim"), [(F32, 2, 8), (BF16, 1, 7)])
def test_a_slot_of_a_donated_cache_is_filled_where_it_is(dtype, heads, head_dim):
    qkv, cache = (
        normal(5, 3, heads, head_dim, seed=1, dtype=dtype),
        normal(3, 9, 2, heads, head_dim, seed=2, dtype=dtype),
    )
    with vk_kernels.use("vulkan", device=SELECTOR):
        fill = vk_kernels.jit(ops.fill_cache, donate_argnums=1)
        text = fill.lower(qkv, cache, np.int32(0)).as_text()
        assert text.startswith("1 dispatches")
        for slot in (0, 2, 7, -3):  # the last two are moved inside
            found = fill(qkv, vk_kernels.device_put(cache, SELECTOR), np.int32(slot))
            assert same_bits([found], [np.asarray(ops.fill_cache(qkv, cache, slot, implementation="xla"))])
            kept = ops.fill_cache(qkv, cache, np.int32(slot))  # of what nobody gives away, a copy
            assert same_bits([kept], [found])


@pytest.mark.parametrize(("dtype", "k"), [(F32, 67), (BF16, 40)])
def test_a_row_of_few_is_the_same_however_many_there_are(device, dtype, k):
    x, w, bias = normal(9, k, seed=1, dtype=dtype), normal(45, k, seed=2, dtype=dtype), normal(45, seed=3, dtype=dtype)
    options = {"activation": "gelu", "has_bias": True, **MATMUL}
    multiply = functools.partial(run, device, plan_matmul_forward, matmul_forward_reference, **options)
    whole = multiply(x, w, bias)
    with jax.enable_x64(True):
        exact = matmul_forward_reference(*(a.astype(np.float64) for a in (x, w, bias)), **options)
    plain = jax.jit(functools.partial(matmul_forward_reference, **options))(x, w, bias)
    for found, other, right in zip(whole, plain, exact, strict=True):
        assert_accurate(found, other, np.asarray(right))
    for rows in (1, 2, 3):
        assert same_bits(multiply(x[:rows], w, bias), [y[:rows] for y in whole])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("has_branch", [False, True])
def test_a_norm_and_its_product_of_a_row_or_more_with_a_branch_or_without(rows, has_branch):
    x, branch, w = normal(rows, 48, seed=1), normal(rows, 48, seed=2), normal(37, 48, seed=3)
    scale, shift = normal(48, seed=4), normal(48, seed=5)
    operands = x, branch if has_branch else None, scale, shift, w
    right = ops.norm_matmul(*operands, implementation="xla")
    with vk_kernels.use("vulkan", device=SELECTOR):
        step = vk_kernels.jit(ops.norm_matmul)
        found, text = step(*operands), step.lower(*operands).as_text()
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)
    assert ("norm_matmul_few" in text) == (rows == 1)


def test_few_rows_have_a_kernel_of_their_own_and_more_or_a_device_without_subgroups_none(device):
    def kernels(info, rows, dtype=BF16, **options):
        specs = [ArraySpec((rows, 64), dtype), ArraySpec((96, 64), dtype)]
        static = {"activation": None, "has_bias": False, **MATMUL, **options}
        return {
            one.kernel for one in plan_matmul_forward(info, specs, [ArraySpec((rows, 96), dtype)], **static).dispatches
        }

    assert kernels(device.info, 1) == kernels(device.info, 32, F32) == {"matmul_few"}
    assert "matmul_few" not in kernels(device.info, 33) | kernels(without_subgroups(device), 4)
