"""vk_kernels.jit on what it cannot do: an error that names the thing, its shape and the user's line; never a number."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, io_callback
from jax.extend.random import define_prng_impl
from jax.sharding import Mesh, PartitionSpec
from run_graph import normal
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.compiler import refusals
from vk_kernels.errors import UnsupportedError
from vk_kernels.tools.conformance.unsupported import UNSUPPORTED, UNSUPPORTED_DTYPES

pytestmark = needs_vulkan

X = normal(2, 3)
HERE = r".* at .*test_refusals.py:\d+"


def vjit(fn, **options):
    return vk_kernels.jit(fn, device=SELECTOR, **options)


# Element types.

NARROW = ["complex64", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4", "uint4", "int2", "uint2"]


@pytest.mark.parametrize("dtype", NARROW)
def test_a_dtype_without_kernels_is_named_with_the_line(dtype):
    x = jnp.ones(3, dtype)
    refused = f"no kernel is generated for {dtype}; use one of .*"
    with pytest.raises(UnsupportedError, match=rf"{refused}: argument tree\['a'\], {_short(dtype)}\[3\]{HERE}"):
        vjit(lambda tree: tree)({"a": x})
    with pytest.raises(UnsupportedError, match=f"{refused}: a constant, .*{HERE}"):
        vjit(lambda y: (y, x))(X)
    with pytest.raises(UnsupportedError, match=rf"{refused}: convert_element_type\(float32\[2,3\]\){HERE}"):
        vjit(lambda y: y.astype(dtype).astype(np.float32))(X)
    with pytest.raises(UnsupportedError, match=refused):
        vjit(lambda y: (y, jnp.zeros((2, 3), dtype)))(X)


def _short(dtype: str) -> str:
    """As JAX writes it in the types of arrays."""
    return str(jax.ShapeDtypeStruct((), dtype).dtype)


def test_a_complex_number_that_is_only_given_back_is_named():
    with pytest.raises(UnsupportedError, match=rf"no kernel is generated for complex64; .*: result\[1\], .*{HERE}"):
        vjit(lambda y: (y, 1j))(X)


def test_every_group_of_refused_dtypes_is_in_the_table():
    for dtype in NARROW:
        assert any(dtype.startswith(name.strip().rstrip("*")) for row in UNSUPPORTED_DTYPES for name in row.split(","))


def test_a_function_of_jax_is_named_by_the_line_that_calls_it():
    with pytest.raises(UnsupportedError, match=rf"argument .*, complex64\[3\]{HERE}"):
        vjit(jnp.logaddexp)(np.ones(3, np.complex64), np.ones(3, np.complex64))
    turn = functools.partial(jax.lax.while_loop, lambda x: x.sum() < 9, lambda x: x + 1)
    with pytest.raises(UnsupportedError, match=rf"while\(float32\[2,3\]\){HERE}"):
        vjit(turn)(X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + 1,
        lambda x: x.sum(axis=0) * 2.5,
        lambda x: jnp.mean(x, axis=1),
        lambda x: jax.nn.softmax(x),
        lambda x: x.astype(np.int16) // np.int16(3),
        lambda x: x.astype(np.int32).sum(),
        lambda x: jnp.arange(3)[None] + x,
        lambda x: jnp.argmax(x),
        lambda x: jnp.sort(x),
        lambda x: x[jnp.array([1, 0])],
        lambda x: x.at[1].set(3.0),
        lambda x: jax.random.normal(jax.random.key(3), (4,), np.float32),
        lambda x: jax.random.uniform(jax.random.wrap_key_data(jnp.array([1, 2], np.uint32)), (5,), np.float32),
        lambda x: jax.random.permutation(jax.random.wrap_key_data(jnp.array([1, 2], np.uint32)), 5),
        lambda x: jnp.linspace(0, 1, 5) * x[0, 0],
        lambda x: jax.lax.scan(lambda c, r: (c + r, c.sum()), x[0], x),
        lambda x: jax.lax.cumsum(x, 1),
        lambda x: jnp.full((2,), 2**40),
    ],
)
def test_with_64_bits_on_a_function_is_right_or_refused(fn):
    with jax.enable_x64(True):
        expected = jax.jit(fn)(X)
        try:
            found, refused = vjit(fn)(X), ""
        except UnsupportedError as error:
            found, refused = expected, str(error)
    if refused:
        assert re.search(r"for u?(int|float)64; .*; JAX_ENABLE_X64 is on: turn it off, or ask for 32 bits", refused)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


# More than a function of arrays.


def test_what_has_effects_is_named_with_the_line():
    ref, struct = jax.new_ref(jnp.ones(3)), jax.ShapeDtypeStruct((2, 3), np.float32)
    mesh = Mesh(np.array(jax.devices()[:1]), ("i",))

    def checked(x):
        checkify.check(x[0, 0] > 9, "too small")
        return x

    def printed(x):
        jax.debug.print("{}", x)
        return x

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, printed, lambda x: x * 2, x)

    for name, advice, fn in [
        ("get", "take the value, and give the new one back", lambda x: ref[...] + x[0]),
        ("swap", "no state on Vulkan", lambda x: jax.ref.swap(ref, ..., x[0])),
        ("new_ref", "no state on Vulkan", lambda x: jax.freeze(jax.new_ref(x))),
        ("check", r"jit checkify.checkify\(fn\)", checked),
        ("check", r"checkify", jax.jit(checked)),
        ("debug_print", "leave callbacks and debug prints out", printed),
        ("debug_print", "no side effects on Vulkan", branches),
        ("debug_print", "no side effects on Vulkan", lambda x: jax.lax.scan(lambda c, r: (c, printed(r)), 0, x)[1]),
        ("debug_print", "no side effects on Vulkan", jax.grad(lambda x: jax.checkpoint(printed)(x).sum())),
        ("debug_callback", "no side effects on Vulkan", lambda x: (jax.debug.callback(print, x), x)[1]),
        ("io_callback", "no calls of the host", lambda x: io_callback(lambda x: x, struct, x)),
        ("pure_callback", "no calls of the host", lambda x: jax.pure_callback(lambda x: x, struct, x)),
        ("shard_map", "no axis of devices", _sharded(mesh)),
    ]:
        with pytest.raises(UnsupportedError, match=rf"{advice}.*: {name}\(.*\[.*3\].*\){HERE}|{advice}.*: check\("):
            vjit(fn)(X)
        assert name in UNSUPPORTED
    with pytest.raises(UnsupportedError, match=rf"no state on Vulkan.*: create_token\(\) -> .*{HERE}"):
        vjit(lambda x: (x, jax.lax.create_token()))(X)
    with pytest.raises(
        UnsupportedError,
        match=r"takes and gives arrays, not Ref\{float32\[3\]\}: pass what it holds, at .*test_refusals.py:\d+",
    ):
        vjit(lambda r: r[...])(ref)


def _sharded(mesh):
    spec = PartitionSpec("i")
    return jax.shard_map(lambda x: jax.lax.psum(x, "i"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())


def test_errors_as_results_and_sums_over_mapped_rows_are_computed():
    def checked(x):
        checkify.check(x[0, 0] > 9, "too small: {}", x[0, 0])
        return x * 2

    error, found = vjit(checkify.checkify(checked))(X)
    np.testing.assert_array_equal(found, X * 2)
    assert "too small" in jax.tree.map(jnp.asarray, error).get()
    for fn in (jax.lax.psum, jax.lax.pmax, jax.lax.pmin, jax.lax.pmean):
        of_rows = jax.vmap(lambda x, fn=fn: x - fn(x, "rows"), axis_name="rows")
        np.testing.assert_allclose(vjit(of_rows)(X), of_rows(X), rtol=1e-6, atol=1e-6)


def test_keys_of_rbg_are_passed_through_or_refused_by_name():
    for impl in ("rbg", "unsafe_rbg"):
        keys = jax.random.split(jax.random.key(0, impl=impl), 3)
        found = vjit(lambda keys: (keys[1:], keys))(keys)
        for x, y in zip(found, (keys[1:], keys), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(jax.random.key_data(x), jax.random.key_data(y))
        refused = r"make them with impl='threefry2x32': rng_bit_generator\(uint32\[4\]\)"
        with pytest.raises(UnsupportedError, match=refused + HERE):
            vjit(lambda keys: jax.random.normal(keys[0], (3,)))(keys)


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("ragged_dot_general", lambda x: jax.lax.ragged_dot(x, jnp.ones((2, 3, 4)), jnp.array([1, 1]))),
        ("triangular_solve", lambda x: jax.lax.linalg.triangular_solve(x[:, :2], x, left_side=True)),
        ("igamma", lambda x: jax.lax.igamma(x, x)),
    ],
)
def test_a_primitive_without_kernels_is_named_with_the_line(name, fn):
    with pytest.raises(UnsupportedError, match=rf"no kernel is generated for .*{name}: {name}\(.*float32\[.*\){HERE}"):
        vjit(lambda x: fn(x))(X)
    assert name in UNSUPPORTED


def test_what_advice_names_is_in_the_table():
    groups = refusals.STATE, refusals.HOST, refusals.ERRORS, refusals.DEVICES, refusals.GENERATORS
    assert frozenset().union(*groups) <= set(UNSUPPORTED)
    assert "remat_opt" in UNSUPPORTED


# What is no longer refused: gradients of integers, keys of any words.


def test_gradients_of_integers_are_float0():
    i, zero = np.arange(6).reshape(2, 3), np.zeros((2, 3), jax.dtypes.float0)

    def times(x, i):
        return x * i, i

    for fn, args in [
        (lambda x, i: jax.vjp(times, x, i)[1]((x, zero)), (X, i)),
        (jax.grad(lambda i, x: (x * i).sum(), argnums=(0, 1), allow_int=True), (i, X)),
        (lambda x, i: jax.jvp(times, (x, i), (x, zero)), (X, i)),
        (lambda x, z: (x + 1, {"z": z}), (X, zero)),
        (lambda x, z: jax.jvp(times, (x, i), (x, z)), (X, zero)),
        (lambda x, z: jax.vjp(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: i, lambda: i + 1), x)[1](z), (X, zero)),
        (functools.partial(jax.value_and_grad, allow_int=True)(lambda b: jnp.where(b, X, 0).sum()), (i > 2,)),
    ]:
        found, expected = vjit(fn)(*args), jax.jit(fn)(*args)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            if x.dtype != jax.dtypes.float0:
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    assert vk_kernels.device_put(zero, SELECTOR) is zero


def _spread(key, shape, step):
    """Words made of those of one key: other ones for each place of a shape."""
    places = jax.lax.iota(np.uint32, int(np.prod(shape))).reshape(*shape, 1, 1)
    return key.reshape((1,) * len(shape) + (2, 2)) * np.uint32(step) + places


SQUARES = define_prng_impl(  # the words of one key have two axes
    key_shape=(2, 2),
    seed=lambda seed: jnp.arange(4, dtype=np.uint32).reshape(2, 2) * seed.astype(np.uint32),
    split=lambda key, shape: _spread(key, shape, 3),
    random_bits=lambda key, width, shape: _spread(key, shape, 5).sum((-2, -1)).astype(f"uint{width}"),
    fold_in=lambda key, data: key + data.astype(np.uint32),
    name="squares",
    tag="squares",
)


@pytest.mark.parametrize("impl", ["threefry2x32", SQUARES])
def test_arrays_of_keys_go_in_and_come_out(impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), (3, 2))

    def fn(keys):
        moved = keys[1], keys.reshape(2, 3).T, jnp.stack([keys[0], keys[2]]), jnp.where(keys == keys[0, 0], keys, keys)
        drawn = jax.vmap(jax.vmap(lambda key: jax.random.bits(key, (2,))))(keys)
        made = jax.vmap(jax.random.split)(keys[:, 0]), jax.vmap(jax.random.fold_in)(keys[:, 1], jnp.arange(3))
        return moved, made, drawn, (keys == keys[:, ::-1], keys != keys[0, 0])

    found, expected = vjit(fn)(keys), jax.jit(fn)(keys)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)
