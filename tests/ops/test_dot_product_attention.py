"""`ops.dot_product_attention` against jax.nn's, and JAX keys where dropout takes its two numbers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_plan import BF16, F32, normal
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops

pytestmark = [needs_vulkan, pytest.mark.usefixtures("strict_dtypes")]

SHAPE = (2, 19, 3, 8)


@pytest.fixture
def on_vulkan():
    with vk_kernels.use("vulkan", device=SELECTOR):
        yield


def operands(shape=SHAPE, dtype=F32):
    return [jnp.asarray(normal(*shape, seed=i, dtype=dtype)) for i in range(3)]


def with_gradients(attend, q, k, v, **options):
    out, pullback = jax.vjp(functools.partial(attend, **options), q, k, v)
    return out, *pullback(jnp.cos(out))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("shape", "dtype"), [(SHAPE, F32), (SHAPE[1:], F32), (SHAPE, BF16)], ids=str)
def test_results_and_gradients_are_those_of_jax(on_vulkan, shape, dtype, scale):
    options = {"is_causal": True, "scale": scale}
    found = with_gradients(jax.jit(functools.partial(ops.dot_product_attention, **options)), *operands(shape, dtype))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own promotes bf16 scores
        wanted = with_gradients(jax.nn.dot_product_attention, *operands(shape, dtype), **options)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        tolerance = 1e-5 if dtype == F32 else 5e-2
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=tolerance)


def test_on_xla_it_is_jax_s_own():
    q, k, v = operands()
    options = {"mask": jnp.ones((1, 1, 19, 19), bool).at[..., 3].set(False), "bias": jnp.ones((1, 3, 19, 19))}
    found = ops.dot_product_attention(q, k, v, **options)
    np.testing.assert_array_equal(found, jax.nn.dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": False}, r"do causal attention \(is_causal=True\) without bias, .*; found is_causal=False: take"),
        ({"bias": jnp.ones((1, 1, 19, 19))}, r"found bias: take implementation='xla'"),
        ({"mask": jnp.ones((1, 1, 19, 19), bool), "local_window_size": 3}, r"found mask, local_window_size: take"),
        ({"key": jnp.ones((2, 7, 3, 8))}, r"of one shape, .*, found \(2, 19, 3, 8\), \(2, 7, 3, 8\) and"),
    ],
)
def test_what_the_kernels_do_not_do_is_said(on_vulkan, change, message):
    q, k, v = operands()
    given = {"query": q, "key": k, "value": v, "is_causal": True, **change}
    with pytest.raises(ValueError, match=message):
        ops.dot_product_attention(**given)


def test_its_signature_is_jax_s():
    ours, theirs = (
        inspect.signature(function).parameters for function in (ops.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert [*ours] == [name for name in theirs if name in ours]
    assert set(theirs) - set(ours) <= {"return_residual"}
    assert all(ours[name].kind == theirs[name].kind and ours[name].default == theirs[name].default for name in ours)


@pytest.mark.parametrize("implementation", ["xla", "vulkan"])
def test_a_jax_key_of_either_kind_draws_what_its_numbers_draw(implementation):
    with vk_kernels.use(implementation, **({"device": SELECTOR} if implementation == "vulkan" else {})):
        x = jnp.ones((4, 40))
        drop = jax.jit(lambda x, rng: ops.dropout(x, rng, rate=0.5, site=1))
        typed, raw = jax.random.key(7), jax.random.PRNGKey(7)
        wanted = np.asarray(drop(x, jnp.array([0, 7], jnp.uint32)))
        np.testing.assert_array_equal(drop(x, typed), wanted)
        np.testing.assert_array_equal(drop(x, raw), wanted)
        some, other = (np.asarray(drop(x, key)) for key in jax.random.split(typed))
        assert (some != other).any()
        w = jnp.eye(40)
        product = jax.jit(lambda x, rng: ops.matmul(x, w, rng=rng, dropout_rate=0.5, site=1))
        np.testing.assert_array_equal(product(x, typed), product(x, raw))


def test_several_keys_or_another_kind_are_refused():
    x = jnp.ones((4, 40))
    for keys in (jax.random.split(jax.random.key(7)), jax.random.key(7, impl="rbg")):
        with pytest.raises(ValueError, match=r"rng must be one key of two numbers"):
            ops.dropout(x, keys, rate=0.5, site=1)
