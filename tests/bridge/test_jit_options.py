"""The options of vk_kernels.jit beside those of jax.jit: the same where they are taken, one line where they are not."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_graph import normal
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.runtime.device import Device

X = normal(3, 4)
BOTH = {"jax": jax.jit, "ours": functools.partial(vk_kernels.jit, device=SELECTOR)}


def scaled(x, y, n=2):
    return x * n, y + 1


def rows_first(a, /, b, *rest, c=1, **named):
    return a * c, b + sum(rest) + sum(named.values())


def raised(call):
    """The type of what a call raises, in one line; None where it raises nothing."""
    try:
        call()
    except Exception as error:
        return type(error) if "\n" not in str(error) else str(error)
    return None


# Options that do not fit.


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 3},
        {"static_argnums": -4},
        {"static_argnums": (0, 7)},
        {"donate_argnums": 3},
        {"donate_argnums": -4},
        {"static_argnames": "z"},
        {"static_argnames": ("x", "z")},
        {"donate_argnames": "z"},
        {"static_argnums": 0, "donate_argnums": 0},
        {"static_argnames": "x", "donate_argnums": 0},
        {"static_argnums": 0, "donate_argnames": "x"},
        {"static_argnums": "x"},
        {"static_argnums": 1.0},
        {"static_argnums": (1.0,)},
        {"static_argnums": [None]},
        {"donate_argnums": "x"},
        {"donate_argnums": 0.0},
        {"static_argnames": 1},
        {"static_argnames": (1,)},
        {"donate_argnames": 1},
        {"donate_argnames": ["x", None]},
        {"no_such_option": 1},
        {},
        {"static_argnums": np.int64(2), "donate_argnums": np.int32(0)},
        {"static_argnums": np.array(2)},
        {"static_argnums": (2, 2, -1), "donate_argnums": [0, 0]},
        {"static_argnames": {"n"}, "donate_argnames": {"x": 1}},
        {"static_argnums": None, "static_argnames": None, "donate_argnums": None, "donate_argnames": None},
        {"static_argnums": (), "static_argnames": [], "donate_argnums": (), "donate_argnames": ""},
        {"keep_unused": True},
        {"backend": None, "inline": False, "in_shardings": None, "out_shardings": None, "compiler_options": None},
    ],
    ids=str,
)
def test_options_are_refused_where_jax_refuses_them(options):
    assert raised(lambda: vk_kernels.jit(scaled, **options)) == raised(lambda: jax.jit(scaled, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_shardings": "x"}, r"does not take in_shardings='x': a function runs on one Vulkan device"),
        ({"out_shardings": 1}, r"does not take out_shardings=1: results lie on the one"),
        ({"backend": "gpu"}, r"does not take backend='gpu': device= names a Vulkan device"),
        ({"inline": True}, r"does not take inline=True"),
        ({"compiler_options": 1}, r"compiler_options is a dict of options of this compiler, not 1"),
        ({"compiler_options": {"xla": 1}}, r"does not take 'xla' in compiler_options: it has output_groups alone"),
        ({"compiler_options": {"output_groups": 1}}, r"output_groups is a sequence of sequences of numbers .*, not 1"),
        ({"compiler_options": {"output_groups": [0]}}, r"output_groups is a sequence of sequences of .*, not \[0\]"),
        ({"compiler_options": {"output_groups": [[-1]]}}, r"output_groups is .*, from 0, not \[\[-1\]\]"),
        ({"abstracted_axes": ("n",)}, r"does not take abstracted_axes=\('n',\): a function is compiled for each shape"),
        ({"nonsense": 1}, r"unexpected keyword argument 'nonsense'"),
        ({"device": jax.devices()[0]}, r"device is a Vulkan device's index, 'gpu', 'cpu' or part of its name, not Cpu"),
        ({"device": 1.5}, r"device is .* not 1.5"),
        ({"keep_unused": "yes"}, r"keep_unused is True or False, not 'yes'"),
        ({"static_argnums": "x"}, r"static_argnums is an argument's number, or several, not 'x'"),
        ({"donate_argnums": [0, 1.0]}, r"donate_argnums is an argument's number, or several, not \[0, 1.0\]"),
        ({"static_argnames": 3}, r"static_argnames is an argument's name, or several, not 3"),
        ({"donate_argnames": ["x", 1]}, r"donate_argnames is an argument's name, or several, not \['x', 1\]"),
    ],
    ids=str,
)
def test_what_is_not_taken_is_one_line_that_names_it(options, message):
    for make in (lambda: vk_kernels.jit(scaled, **options), lambda: vk_kernels.jit(**options)):
        with pytest.raises(TypeError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fn", [None, 3, "f", iter])
@pytest.mark.parametrize("options", [{}, {"static_argnums": 0}, {"donate_argnames": "x"}])
def test_what_is_no_function_is_refused_as_jax_refuses_it(fn, options):
    assert raised(lambda: vk_kernels.jit(fn, **options)) == raised(lambda: jax.jit(fn, **options))


def test_the_function_is_given_by_position():
    for call in (lambda jit: jit(fn=scaled), lambda jit: jit(fun=scaled), lambda jit: jit(scaled, 0)):
        assert raised(lambda call=call: call(vk_kernels.jit)) is raised(lambda call=call: call(jax.jit)) is TypeError


# The decorator.


def test_with_and_without_parentheses():
    plain, empty, named = vk_kernels.jit(scaled), vk_kernels.jit()(scaled), vk_kernels.jit(static_argnames="n")(scaled)
    for jitted in (plain, empty, named):
        assert jitted.__wrapped__ is scaled
        assert (jitted.__name__, jitted.__qualname__, jitted.__module__) == ("scaled", "scaled", __name__)
        assert inspect.signature(jitted) == inspect.signature(scaled)
        assert callable(jitted)
    decorate = vk_kernels.jit(donate_argnums=0)
    assert decorate(scaled) is not decorate(scaled)


@needs_vulkan
def test_attributes_of_a_function_are_shown_and_change_nothing():
    @functools.wraps(BOTH["ours"](rows_first, static_argnames="c"))
    def fn(x):
        return x

    fn.note = "kept"
    jitted = BOTH["ours"](fn)
    assert (jitted.note, jitted.__name__, jitted.__wrapped__) == ("kept", "rows_first", fn)
    assert jitted.eval_shape(X).shape == X.shape


# Static and donated arguments, by number and by name.

CALLS = [((X, X), {}), ((X, X, 3), {}), ((X, X), {"n": 3}), ((X,), {"y": X}), ((), {"x": X, "y": X, "n": 3})]


def seen_by(name, fn, options, args, kwargs):
    """The results' shapes, and the arguments that are no tracers where the function runs."""
    static = []

    @functools.wraps(fn)
    def spied(*args, **kwargs):
        named = {**dict(enumerate(args)), **kwargs}
        static.append({name for name, x in named.items() if not isinstance(x, jax.core.Tracer)})
        return fn(*args, **kwargs)

    shapes = BOTH[name](spied, **options).eval_shape(*args, **kwargs)
    return static, [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]


@needs_vulkan
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_argnums": 2},
        {"static_argnames": "n"},
        {"static_argnums": (2,), "static_argnames": ()},
        {"static_argnums": (), "static_argnames": ("n",)},
        {"static_argnums": 2, "static_argnames": "n", "donate_argnums": 0},
        {"static_argnames": ["n"], "donate_argnames": ["x", "y"]},
    ],
    ids=str,
)
def test_arguments_are_static_where_they_are_to_jax(options):
    for args, kwargs in CALLS:
        assert seen_by("ours", scaled, options, args, kwargs) == seen_by("jax", scaled, options, args, kwargs)


@needs_vulkan
@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 0},
        {"static_argnums": -1},
        {"static_argnums": (1, 2), "static_argnames": "c"},
        {"static_argnames": ("c", "d")},
        {"static_argnames": "b"},
        {"static_argnums": 5},
    ],
    ids=str,
)
def test_arguments_of_every_kind_are_static_where_they_are_to_jax(options):
    for args, kwargs in [((2, 1), {}), ((2, 1, 3), {"c": 4, "d": 5}), ((2, 1, 3, 4), {"d": 1}), ((2,), {"b": 3})]:
        assert len({str(seen_by(name, rows_first, options, args, kwargs)) for name in BOTH}) == 1


class Settings:
    """A pytree that is static as it is: JAX takes it apart nowhere, and neither do we."""


jax.tree_util.register_pytree_node(Settings, lambda x: ((1,), None), lambda _, children: Settings())


@needs_vulkan
def test_static_arguments_arrive_as_they_are():
    settings, seen = Settings(), []

    def fn(x, first, *, second):
        seen.append((first, second))
        return x

    jitted = BOTH["ours"](fn, static_argnums=1, static_argnames="second")
    jitted.eval_shape(X, settings, second=settings)
    jitted.trace(X, settings, second=settings)
    assert all(x is settings for pair in seen for x in pair)


@needs_vulkan
@pytest.mark.parametrize(
    "options",
    [
        {"donate_argnums": 0},
        {"donate_argnums": (0, 1)},
        {"donate_argnums": -2},
        {"donate_argnames": "y"},
        {"donate_argnames": ("x", "y"), "static_argnames": "n"},
        {"donate_argnums": (0,), "donate_argnames": ("y",)},
        {"donate_argnums": (1,), "donate_argnames": ()},
        {"donate_argnums": (), "donate_argnames": ("x",)},
    ],
    ids=str,
)
def test_arguments_are_donated_where_they_are_to_jax(options):
    for by_name in ((), ("y",), ("x", "y")):
        found = {}
        for name, jit in BOTH.items():
            given = {"x": jnp.array(X), "y": jnp.array(X)}
            jitted = jit(scaled, **options)
            args = [x for key, x in given.items() if key not in by_name]
            results = jitted(*args, **{key: given[key] for key in by_name})
            found[name] = {key: x.is_deleted() for key, x in given.items()}
            for result, expected in zip(results, scaled(X, X), strict=True):
                np.testing.assert_array_equal(result, expected)
        assert found["ours"] == found["jax"], by_name


@needs_vulkan
def test_a_loop_over_a_state_that_is_donated_by_name():
    step = BOTH["ours"](lambda batch, *, state: (state + batch, batch.sum()), donate_argnames="state")
    state = vk_kernels.device_put(X, SELECTOR)
    for _ in range(4):
        before = state
        state, _ = step(X, state=state)
        assert before.is_deleted()
    np.testing.assert_allclose(state, 5 * X, rtol=1e-6)


# Arguments that the function does not read.


def unread(x, y, z):
    """z is of another shape than the results: none can take its memory."""
    return x + 1


@needs_vulkan
def test_unread_arguments_are_not_donated_unless_they_are_kept():
    for number in range(3):
        found = {}
        for name, jit in BOTH.items():
            given = [jnp.array(X), jnp.array(X[0]), jnp.array(X[:, 0])]
            result = jit(unread, donate_argnums=number)(*given)
            np.testing.assert_array_equal(result, X + 1)
            found[name] = [x.is_deleted() for x in given]
        assert found["ours"] == found["jax"], number
    given = [jnp.array(X), jnp.array(X[0]), jnp.array(X[:, 0])]
    BOTH["ours"](unread, donate_argnums=(1, 2), keep_unused=True)(*given)
    assert [x.is_deleted() for x in given] == [False, True, True]


@needs_vulkan
def test_unread_arguments_are_not_uploaded(monkeypatch):
    sizes, buffer = [], Device.buffer
    monkeypatch.setattr(Device, "buffer", lambda self, size, **rest: sizes.append(size) or buffer(self, size, **rest))
    large = np.zeros(100_000, np.float32)
    for keep_unused in (False, True):
        sizes.clear()
        jitted = BOTH["ours"](unread, keep_unused=keep_unused)
        for _ in range(3):
            np.testing.assert_array_equal(jitted(X, large, vk_kernels.device_put(X, SELECTOR)), X + 1)
        assert (large.nbytes in sizes) == keep_unused
        assert len(jitted.profile(X, large, X).rows) == 1
        with pytest.raises(TypeError, match=r"compiled with args\[1\] of float32\[100000\]"):
            jitted.lower(X, large, X).compile()(X, large[1:], X)


# Stages.


def test_a_profile_asks_nothing_of_an_argument_that_is_not_read():
    jitted = vk_kernels.jit(lambda x, unread: x * 2, device=SELECTOR)
    unread = vk_kernels.device_put(np.zeros(3, np.float32), SELECTOR)
    unread.delete()
    assert len(jitted.profile(np.ones(4, np.float32), unread).rows) == 1


@needs_vulkan
def test_traced_lowered_compiled_called():
    for name, jit in BOTH.items():
        jitted = jit(scaled, static_argnames="n", donate_argnums=0)
        traced = jitted.trace(X, X, n=3)
        assert traced.fun_name == "scaled"
        assert traced.out_info == jitted.eval_shape(X, X, n=3), name
        assert len(traced.jaxpr.jaxpr.invars) == 2
        lowered = traced.lower()
        assert jax.tree.map(lambda info: (info.shape, info.dtype, info.donated), lowered.args_info) == (
            ((X.shape, X.dtype, True), (X.shape, X.dtype, False)),
            {},
        )
        assert [x.shape for x in jax.tree.leaves(lowered.out_info)] == [X.shape] * 2
        for compiled in (lowered.compile(), jitted.lower(X, X, n=3).compile()):
            given = jnp.array(X)
            found = compiled(given, X)
            assert given.is_deleted()
            np.testing.assert_array_equal(found[0], X * 3)
        if name == "ours":
            assert isinstance(found[0], vk_kernels.Array)


@needs_vulkan
def test_what_is_traced_is_lowered_once_for_all():
    jitted = BOTH["ours"](scaled)
    traced = jitted.trace(vk_kernels.device_put(X, SELECTOR), jax.ShapeDtypeStruct(X.shape, X.dtype))
    compiled = traced.lower().compile()
    assert compiled is traced.lower().compile() is jitted.lower(X, X).compile()


@needs_vulkan
@pytest.mark.parametrize("stage", ["__call__", "trace", "eval_shape", "lower", "cost", "profile"])
def test_every_stage_names_the_argument_that_it_does_not_take(stage):
    use = getattr(BOTH["ours"](lambda tree, n: tree, static_argnums=1), stage)
    with pytest.raises(TypeError, match=r"path tree\['x'\]"):
        use({"x": "a"}, 1)
    with pytest.raises(ValueError, match=r"^static argument number 1 must be hashable, found a list: unhashable"):
        use({"x": X}, [1])


@needs_vulkan
def test_what_is_compiled_looks_for_special_values_too():
    compiled = BOTH["ours"](lambda x: {"log": jnp.log(x), "inf": 1 / x}).lower(X).compile()
    positive = np.abs(X) + 1
    assert np.isnan(compiled(-positive)["log"].numpy()).all()
    with jax.debug_nans(True):
        compiled(positive)
        with pytest.raises(FloatingPointError, match=r"nan in result\['log'\], float32\[3,4\], of <lambda>: call"):
            compiled(-positive)
    with jax.debug_infs(True):
        compiled(-positive)
        with pytest.raises(FloatingPointError, match=r"inf in result\['inf'\], float32\[3,4\], of <lambda>"):
            compiled(0 * X)


@needs_vulkan
def test_options_are_pickled_with_the_function():
    names = (name for name in "c")  # read once
    jitted = pickle.loads(pickle.dumps(vk_kernels.jit(rows_first, static_argnames=names, device=SELECTOR)))
    assert jitted._options == vk_kernels.jit(rows_first, static_argnames=("c",), device=SELECTOR)._options
    np.testing.assert_array_equal(jitted(X, X, c=2)[0], X * 2)
