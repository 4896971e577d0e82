"""vk_kernels.jit where jax.jit was: what programs and JAX's own tests do with a jitted function and its results."""

import copy
import functools
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_graph import normal
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.compiler import from_jaxpr
from vk_kernels.errors import UnsupportedError

pytestmark = needs_vulkan

X = normal(5, 7)


def vjit(fn, **options):
    return vk_kernels.jit(fn, device=SELECTOR, **options)


def put(x):
    return vk_kernels.device_put(x, SELECTOR)


def described(x):
    """All that JAX's tests look at."""
    return np.shape(x), np.dtype(x.dtype), x.aval.weak_type, x.ndim, x.size


def same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert described(x) == described(y)
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


# What functions take and give.


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda: None, ()),
        (lambda x: ((), {}, [], None), (X,)),
        (lambda x: x, (X,)),
        (lambda x, y: (y, x, y), (X, 3)),
        (lambda x: (x + 1, 1, 2.5, True, np.int8(3), np.arange(3)), (1,)),
        (lambda x: [x + 1, x - 1.5], (np.int8(3),)),
        (lambda x: {"b": ~x, "a": (x, [x])}, (True,)),
        (lambda xs: [x * 2 for x in xs], ([1, 2.0, np.float16(3), X[:0]],)),
        (lambda x: x[:, :0].sum(1), (X,)),
        (lambda x: jnp.zeros((0, 3)), (X,)),
        (lambda x: x.astype(jnp.bfloat16).astype(int), (X,)),
        (lambda x: jax.nn.one_hot(x, 3), (2,)),
        (lambda x: x + np.arange(3, dtype=np.int64), (np.arange(3),)),
        (lambda x: x / 2, (np.arange(3, dtype=np.float64),)),
        (lambda f, x: f(x), (jax.tree_util.Partial(jnp.sin), X)),
    ],
)
def test_results_are_described_as_xla_describes_them(fn, args):
    same(vjit(fn)(*args), jax.jit(fn)(*args))


def test_keyword_defaults_and_variable_arguments():
    def fn(x, *rest, scale=2, **named):
        return x * scale + sum(rest) + sum(named.values())

    for args, kwargs in [((X,), {}), ((X, 1, 2), {"scale": 3}), ((X, X), {"b": 1.0, "a": X})]:
        same(vjit(fn)(*args, **kwargs), jax.jit(fn)(*args, **kwargs))


def test_static_arguments_by_position_and_name():
    def fn(x, n, *, mode):
        return x * n if mode == "times" else x + n

    jitted = vjit(fn, static_argnums=1, static_argnames="mode")
    same(jitted(X, 2, mode="times"), X * 2 + jnp.zeros(()))
    same(jitted(X, 2, mode="plus"), X + 2 + jnp.zeros(()))
    with pytest.raises(ValueError, match=r"static argument number 1 must be hashable, found a list: unhashable"):
        jitted(X, [2], mode="plus")
    with pytest.raises(ValueError, match=r"static argument 'mode' must be hashable, found a tuple: unhashable"):
        jitted(X, 2, mode=(np.arange(3),))


def test_what_is_compiled_depends_on_types_of_static_arguments_and_on_the_configuration():
    def fn(x, n):
        return jnp.full(3, n) + x, jax.random.bits(jax.random.key(x[0]), (5,))

    ours, jax_own, x = vjit(fn, static_argnums=1), jax.jit(fn, static_argnums=1), np.ones(3, np.int32)
    for n in (1, 1.0, True, 2):
        same(ours(x, n), jax_own(x, n))
    with jax.threefry_partitionable(False):
        same(ours(x, 1), jax_own(x, 1))
    same(ours(x, 1), jax_own(x, 1))


def test_a_function_of_a_class_is_a_method():
    class Scaled:
        scale = 3.0

        @functools.partial(vk_kernels.jit, static_argnums=0, device=SELECTOR)
        def of(self, x):
            """Its doc."""
            return x * self.scale

    same(Scaled().of(X), jnp.asarray(X) * 3)
    same(Scaled.of(Scaled(), X), jnp.asarray(X) * 3)
    assert Scaled.of.__doc__ == "Its doc."


@pytest.mark.parametrize("bad", ["a", object(), np.array(["a"]), np.array([object()])])
def test_what_is_no_array_is_an_error(bad):
    with pytest.raises(TypeError, match=r"path tree\['x'\]|JAX array type"):
        vjit(lambda tree: tree)({"x": bad})


@pytest.mark.parametrize("bad", [1j, np.complex64(1)])
def test_complex_numbers_are_an_error_in_words(bad):
    with pytest.raises(UnsupportedError, match=r"no kernel is generated for complex64; use one of .*float32"):
        vjit(lambda x: x + 1)(bad)


def test_numbers_of_64_bits_are_an_error_in_words():
    with jax.enable_x64(True), pytest.raises(UnsupportedError, match="no kernel is generated for int64; use one of"):
        vjit(lambda x: x + 1)(np.arange(3))


def test_an_error_of_the_function_is_its_own():
    with pytest.raises(ZeroDivisionError):
        vjit(lambda x: x * (1 // 0))(X)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        vjit(lambda x: 1 if x.sum() > 0 else 2)(X)
    with pytest.raises(TypeError):
        vjit(lambda x: x)()


# Results in JAX and numpy.

RESULT = functools.cache(lambda: vjit(lambda x: x * 1)(X))
TRUTH = functools.cache(lambda: jnp.asarray(X))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x + np.ones(7, np.float32)[None],
        lambda x: np.ones((5, 7), np.float32) - x,
        lambda x: jnp.ones((5, 7)) / x,
        lambda x: x @ x.T,
        lambda x: -x,
        lambda x: +x,
        lambda x: abs(x) ** 2,
        lambda x: x // 0.5,
        lambda x: divmod(x, 0.5),
        lambda x: x == x,
        lambda x: x < 0,
        lambda x: (x > 0) & ~(x > 1) | (x >= 2) ^ (x != 0),
        lambda x: x[1],
        lambda x: x[1:, ::-1],
        lambda x: x[x[:, 0] > 0],
        lambda x: x[[0, 2], None],
        lambda x: x[..., jnp.array([1, 1])],
        lambda x: x.at[1].set(3.0),
        lambda x: x.at[:, 2].add(x[:, 0]),
        lambda x: x.astype(jnp.bfloat16),
        lambda x: x.reshape(7, -1),
        lambda x: x.reshape(-1).T,
        lambda x: x.transpose(1, 0),
        lambda x: (x.sum(), x.mean(axis=0), x.max(1), x.min(keepdims=True), x.std(), x.var(0), x.prod(), x.ravel()),
        lambda x: (x.argmax(), x.argmin(1), x.any(), x.all(0), x.cumsum(1), x.round(1), x.clip(0, 1), x.flatten()),
        lambda x: list(x),
        lambda x: list(reversed(x[0])),
        lambda x: jnp.concatenate([x, x]),
        lambda x: jnp.stack([x[0], x[1]]),
        lambda x: jnp.array([x[0], 1 + x[1]]),
        lambda x: jnp.where(x > 0, x, 0),
        lambda x: jnp.einsum("ij,kj->ik", x, x),
        lambda x: jax.lax.add(x, x),
        lambda x: jax.lax.dot(x, x.T),
        lambda x: jax.lax.scan(lambda c, row: (c + row, c.sum()), x[0], x),
        lambda x: jax.lax.cond((x.sum() > 0), lambda: x, lambda: x * 2),
        lambda x: jax.jit(lambda y: y + x)(x),
        lambda x: jax.grad(lambda y: (y**2).sum())(x),
        lambda x: jax.vmap(lambda row: row.sum())(x),
        lambda x: jax.tree.map(jnp.add, {"a": x}, {"a": x}),
        lambda x: jax.tree.map(operator.add, [x, (x,)], [1, (2,)]),
        lambda x: jax.device_put(x),
        lambda x: jnp.asarray(x),
        lambda x: jnp.asarray(x, jnp.float16),
        lambda x: jnp.zeros_like(x),
    ],
)
def test_results_are_used_as_those_of_jax(use):
    same(use(RESULT()), use(TRUTH()))


def test_results_in_plain_python_and_numpy():
    x, y = RESULT(), TRUTH()
    np.testing.assert_array_equal(jax.device_get({"a": x})["a"], X)
    assert type(jax.device_get(x)) is np.ndarray
    np.testing.assert_array_equal(np.sin(x), np.sin(X))
    np.testing.assert_array_equal(np.maximum(x, 0), np.maximum(X, 0))
    assert jax.block_until_ready([x])[0] is x
    assert x.tolist() == X.tolist()
    assert x.tobytes() == X.tobytes()
    assert (jnp.shape(x), jnp.ndim(x), jnp.size(x), jnp.result_type(x)) == ((5, 7), 2, 35, np.float32)
    assert jax.eval_shape(lambda x: x[0], x) == jax.ShapeDtypeStruct((7,), np.float32)
    assert jax.typeof(x) == jax.typeof(y) == x.aval
    assert [row.shape for row in x] == [(7,)] * 5
    for copied in (copy.copy(x), copy.deepcopy({"a": x})["a"], x.copy()):
        assert copied.buffer is not x.buffer
        np.testing.assert_array_equal(copied, X)
    with pytest.raises(TypeError, match="unhashable"):
        hash(x)


def test_scalars_are_numbers():
    s, n = vjit(lambda: (jnp.float32(2.75), jnp.int32(-3)))()
    assert (f"{s:.1f}", round(s), float(s), int(n), abs(n), complex(s)) == ("2.8", 3, 2.75, -3, 3, 2.75 + 0j)
    assert "abcdef"[n] == "d"
    assert bool(n)
    assert max(s, s + 1) == 3.75
    assert n in (1, -3)
    with pytest.raises(TypeError, match="iteration"):
        iter(s)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(RESULT())


def test_weak_types_go_on_in_jax():
    weak = vjit(lambda x: x * 2)(3.0)
    assert jnp.asarray(weak).weak_type
    assert (weak + 1).weak_type
    half = jnp.ones(3, jnp.bfloat16)
    for found in (half * weak, weak * half, jax.jit(operator.mul)(weak, half), vjit(operator.mul)(weak, half)):
        assert found.dtype == jnp.bfloat16
    row = vjit(lambda x: jnp.broadcast_to(x, (3,)))(3.0)
    assert (row * half).dtype == jnp.bfloat16


# In and around transformations.

SQUARES = vjit(lambda x: (jnp.sin(x) ** 2).sum())


@pytest.mark.parametrize(
    "use",
    [
        lambda f, x: jax.grad(f)(x),
        lambda f, x: jax.value_and_grad(f)(x),
        lambda f, x: jax.vmap(f)(x),
        lambda f, x: jax.vmap(jax.grad(f))(x),
        lambda f, x: jax.jit(f)(x),
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.vjp(f, x)[1](jnp.float32(2)),
        lambda f, x: jax.linearize(f, x)[1](x),
        lambda f, x: jax.hessian(f)(x[0]),
        lambda f, x: jax.jacfwd(f)(x[0]),
        lambda f, x: jax.checkpoint(f)(x),
        lambda f, x: jax.lax.map(f, x),
        lambda f, x: jax.lax.scan(lambda c, row: (c + f(row), f(row)), 0.0, x),
    ],
)
def test_jitted_functions_are_transformed(use):
    for x in (X, RESULT()):
        same(use(SQUARES, x), use(jax.jit(SQUARES.__wrapped__), jnp.asarray(x)))


@pytest.mark.parametrize(
    "fn",
    [
        SQUARES,
        jax.jit(SQUARES.__wrapped__),
        jax.grad(SQUARES),
        jax.vmap(SQUARES),
        jax.vmap(jax.grad(jax.jit(SQUARES))),
        lambda x: jax.jvp(SQUARES, (x,), (x,)),
        lambda x: jax.vjp(SQUARES, x)[1](2.0),
        lambda x: jax.linearize(SQUARES, x)[1](x),
        lambda x: jax.jacrev(jax.grad(SQUARES))(x[0]),
        lambda x: jax.checkpoint(SQUARES)(x),
        lambda x: x + RESULT(),
        lambda x: jnp.dot(RESULT(), x.T),
    ],
)
def test_transformed_functions_are_jitted(fn):
    found, expected = vjit(fn)(X), jax.jit(fn)(X)
    assert all(isinstance(x, vk_kernels.Array) for x in jax.tree.leaves(found))
    same(found, expected)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.grad(f)(3.0),
        lambda f: jax.vmap(f)(X[0]),
        lambda f: jax.jit(f)(3.0),
        lambda f: vjit(f)(3.0),
        lambda f: jax.lax.scan(lambda c, y: (c + f(y), f(y)), 0.0, X[0]),
        lambda f: jax.eval_shape(f, 3.0),
    ],
)
def test_a_jitted_function_closes_over_what_is_traced_around_it(transform):
    def around(jit):
        return lambda y: jit(lambda x: x * y)(2.0) + jit(lambda: jnp.sin(y))()

    found, expected = transform(around(vjit)), transform(around(jax.jit))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jax.typeof(x) == jax.typeof(y)
        if not isinstance(y, jax.ShapeDtypeStruct):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_a_tracer_that_escaped_is_an_error_of_jax():
    leaked = []
    vjit(lambda x: (leaked.append(x), x)[1])(X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        vjit(lambda: leaked[0] + 1)()
    with pytest.raises(ValueError, match=r"<lambda> reads values that are being traced around it: make them arguments"):
        jax.jit(lambda y: vjit(lambda: y + 1).lower())(X)


def test_what_a_jitted_function_shows_of_itself():
    def fn(x):
        """It doubles."""
        return x * 2

    jitted = vjit(fn)
    assert (jitted.__name__, jitted.__doc__, jitted.__wrapped__) == ("fn", "It doubles.", fn)
    assert jax.eval_shape(jitted, X) == jax.ShapeDtypeStruct((5, 7), np.float32)
    assert "mul" in str(jax.make_jaxpr(jitted)(X))
    assert "mul" in str(jitted.trace(RESULT()).jaxpr)
    assert jitted.eval_shape(RESULT()) == jax.ShapeDtypeStruct((5, 7), np.float32)
    assert repr(jitted) == f"<vk_kernels.jit of {fn.__qualname__}>"
    assert repr(vjit(functools.partial(fn))) == "<vk_kernels.jit of partial>"


# Loops.


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jax.lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * 2, c[1]), (0, x, x)),
        lambda x: jax.lax.while_loop(
            lambda c: (c[0] < c[2]) & (c[3] > 0), lambda c: (c[0] + c[3], c[1] * 2, c[2], c[3]), (0, x, 7, 2)
        ),
        lambda x: jax.lax.while_loop(lambda c: c[0] < 0, lambda c: (c[0] + 1, c[1] * 2), (0, x)),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y.at[i].multiply(2), x),
        lambda x: jax.lax.platform_dependent(x, cpu=jnp.sin, default=jnp.sin),
        lambda x: jnp.searchsorted(jnp.sort(x[:, 0]), x[:, 1]),
        lambda x: jax.lax.switch(jnp.argmax(x[0]) % 3, [jnp.sin, jnp.cos, jnp.tanh], x),
    ],
)
def test_control_flow(fn):
    same(vjit(fn)(X), jax.jit(fn)(X))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 5, lambda x: x + 1, x),
        lambda x: jax.lax.fori_loop(0, x[0, 0].astype(int), lambda i, x: x * 2, x),
    ],
)
def test_a_loop_as_long_as_data_say_is_an_error_in_words(fn):
    with pytest.raises(UnsupportedError, match=r"length is known only on the device: while\(.*test_dropin.py:\d+"):
        vjit(fn)(X)


def test_a_loop_without_end_is_an_error_in_words(monkeypatch):
    monkeypatch.setattr(from_jaxpr, "UNROLLED", 100)
    with pytest.raises(UnsupportedError, match="shorten this one"):
        vjit(lambda x: jax.lax.while_loop(lambda c: c[0] >= 0, lambda c: (c[0] * 1, c[1] * 2), (0, x)))(X)


# Options, JAX's own switches, pickles.


@pytest.mark.parametrize("name", ["static_argnums", "static_argnames", "donate_argnums", "donate_argnames"])
def test_options_that_are_none(name):
    same(vjit(lambda x: x + 1, **{name: None})(X), jnp.asarray(X) + 1)


@pytest.mark.parametrize("option", ["static_argnums", "donate_argnums"])
@pytest.mark.parametrize("number", [3, -4])
def test_an_argument_that_is_not_there_is_an_error(option, number):
    with pytest.raises(ValueError, match=str(number)):
        vjit(lambda a, b, c: a, **{option: number})


def test_static_arguments_beside_others_of_every_kind():
    def fn(a, /, b, *rest, c=1.0):
        return b * a + sum(rest) * c

    for options, args, kwargs in [
        ({"static_argnums": 0}, (2,), {"b": X}),
        ({"static_argnums": (0, -1)}, (2, X, X, 3), {"c": 2.0}),
        ({"static_argnums": 0, "static_argnames": "c"}, (2, X, X), {"c": 4}),
    ]:
        same(vjit(fn, **options)(*args, **kwargs), jax.jit(fn, **options)(*args, **kwargs))


def test_static_arguments_by_position_and_by_name_may_differ():
    traced = []

    def fn(x, n):
        traced.append(type(n))
        return x * n

    jitted = vjit(fn, static_argnums=1, static_argnames=())
    same(jitted(X, 2), jnp.asarray(X) * 2)
    same(jitted(X, n=2), jnp.asarray(X) * 2)
    assert traced[0] is int
    assert issubclass(traced[1], jax.core.Tracer)


def test_donated_arrays_of_jax_are_gone_too():
    step = vjit(lambda state, x: (state + x, x.sum()), donate_argnums=0)
    state = jnp.array(X)
    found, _ = step(state, X)
    assert state.is_deleted()
    same(found, jnp.asarray(X) + X)
    kept = np.array(X)
    step(kept, X)
    np.testing.assert_array_equal(kept, X)


def test_a_decorator_with_options():
    @vk_kernels.jit(static_argnames="n", donate_argnums=0, device=SELECTOR)
    def fn(x, n):
        """Its doc."""
        return x * n

    x = put(X)
    same(fn(x, n=3), jnp.asarray(X) * 3)
    assert x.is_deleted()
    assert (fn.__name__, fn.__doc__) == ("fn", "Its doc.")


def test_without_jit_a_function_is_itself():
    seen = []

    def fn(x, n):
        seen.append(type(x))
        return ops.gelu(x) * n, x * 2.0

    jitted, weak = vjit(fn, static_argnums=1), vjit(lambda x: x * 2)(3.0)
    expected = jitted(X, 2)
    assert issubclass(seen.pop(), jax.core.Tracer)
    with jax.disable_jit():
        for x in (X, put(X), jnp.asarray(X)):
            same(jax.tree.map(jnp.asarray, jitted(x, 2)), jax.tree.map(jnp.asarray, expected))
        assert seen == [np.ndarray, vk_kernels.Array, type(jnp.asarray(X))]
        assert (weak + 1).weak_type
        assert vjit(lambda x: x + 1)(weak).weak_type
        assert float(vjit(jnp.sin)(weak)) == pytest.approx(np.sin(6), abs=1e-6)
    same(jitted(X, 2), jax.tree.map(jnp.asarray, expected))


def logarithm(state, x):
    return {"log": jnp.log(state["a"]) * x, "a": state["a"] - 1}


def test_debug_nans_names_the_operation():
    step = vjit(logarithm, donate_argnums=0)
    with jax.debug_nans(True):
        state = step({"a": put(X**2 + 0.5)}, X)
        assert isinstance(state["log"], vk_kernels.Array)
        rest = {"a": state["a"]}
        with pytest.raises(FloatingPointError, match=r"invalid value \(nan\) encountered in log") as caught:
            step(rest, X)
    assert caught.value.__notes__[-1].startswith("vk_kernels.jit: nan in result['log'], float32[5,7], of logarithm")
    assert any("in logarithm" in str(entry) for entry in caught.traceback)
    assert np.isnan(step({"a": put(X - 9)}, X)["log"].numpy()).all()


def test_debug_nans_calls_again_with_arrays_of_jax_that_were_donated():
    step, rest = vjit(logarithm, donate_argnums=0), vjit(lambda x, key: x[1:], donate_argnums=0)
    state, given = {"a": jnp.asarray(X) - 9}, (jnp.array([np.nan, 1]), jax.random.key(0))
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match=r"invalid value \(nan\) encountered in log"):
            step(state, X)
        same(rest(*given), jnp.ones(1))  # only results count
    assert state["a"].is_deleted()


def test_debug_nans_where_jax_itself_looks():
    log, minus = vjit(jnp.log), np.float32(-1)
    message = r"\(nan\) encountered in log"
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match=message):
            jax.grad(log)(minus)
        with jax.disable_jit(), pytest.raises(FloatingPointError, match=message):
            log(minus)


def test_debug_infs_and_values_that_no_operation_made():
    with jax.debug_infs(True):
        with pytest.raises(FloatingPointError, match=r"\(inf\) encountered in div"):
            vjit(lambda x: 1 / (x - x))(X)
        same(vjit(lambda x: jnp.log(x - x - 1))(X), jnp.log(jnp.asarray(X) * 0 - 1))  # a NaN is no infinity
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match=r"nan in result.* on Vulkan, but not operation by operation"):
            vjit(lambda x: (x, np.float32(np.nan)))(X)
        same(vjit(lambda x: (x + 1, x > 0, jnp.int32(3)))(X), (jnp.asarray(X) + 1, jnp.asarray(X) > 0, jnp.int32(3)))
        assert jax.grad(lambda x: vjit(jnp.sum)(x))(X).shape == X.shape


def doubled(x):
    return x * 2


@functools.partial(vk_kernels.jit, device=SELECTOR)
def tripled(x):
    return x * 3


def test_jitted_functions_are_pickled_and_copied():
    by_value = pickle.loads(pickle.dumps(vjit(doubled, donate_argnums=0)))
    x = put(X)
    same(by_value(x), jnp.asarray(X) * 2)
    assert x.is_deleted()
    assert pickle.loads(pickle.dumps(tripled)) is tripled
    assert copy.deepcopy([tripled])[0] is copy.copy(tripled) is tripled
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(vjit(lambda x: x))
