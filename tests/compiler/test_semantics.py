"""Primitives mean more than their names: parameters, the functions it carries, indices out of bounds, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.compiler import parameters
from vk_kernels.errors import UnsupportedError
from vk_kernels.tools.conformance.suite import cases, names

F32, I32 = np.float32, np.int32
X = np.linspace(-1, 1.5, 6, dtype=F32)
MODES = lax.GatherScatterMode
# Rules for derivatives and batches, which are applied before a function is lowered; and what a jaxpr was made from.
RULES = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "transpose_thunk", "rule", "policy", "computation"}


def equations(jaxpr):
    """The equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


@pytest.fixture(scope="module")
def examples():
    """An equation of each primitive that has conformance cases."""
    found = {}
    for name in names():
        for case in cases(name):
            if name not in found:
                traced = equations(jax.make_jaxpr(case.fn)(*case.args).jaxpr)
                found |= {equation.primitive.name: equation for equation in traced}
    return found


def test_a_parameter_that_no_rule_knows_is_refused(examples):
    assert set(names()) <= examples.keys()
    for name in names():
        equation = examples[name]
        parameters.read(equation)
        with pytest.raises(ValueError, match=f"{name} with twist=0.5, a parameter that no kernel is made for"):
            parameters.read(equation.replace(params=equation.params | {"twist": 0.5}))


def test_every_function_that_a_primitive_carries_is_read(examples):
    def is_function(x):
        return hasattr(x, "eqns") or hasattr(x, "jaxpr") or (callable(x) and not isinstance(x, type | np.dtype))

    carried = {
        (name, key)
        for name, equation in examples.items()
        for key, value in equation.params.items()
        if key not in RULES
        and not key.endswith("mesh")
        and any(map(is_function, value if isinstance(value, tuple) else [value]))
    }
    assert {name for name, _ in carried} >= {"reduce", "reduce_window", "scan", "cond", "while", "jit", "scatter-add"}
    assert {(name, key) for name, key in carried if key not in parameters.read(examples[name])} == set()


def compared(*functions, given=()):
    """Runs functions through XLA and here, all in one program; both have the same values."""

    def program(given):
        return [fn(*given) for fn in functions]

    expected = jax.jit(program)(given)
    found = vk_kernels.jit(program, device=SELECTOR)(given)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        for some, other in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            np.testing.assert_allclose(
                np.asarray(some, F32), np.asarray(other, F32), rtol=1e-5, atol=1e-6, err_msg=f"function {i}"
            )


@needs_vulkan
def test_a_function_is_applied_at_indices():
    """Once for every time that an index comes, and not where it is out of bounds."""
    i = np.array([1, 1, 5, -1, 9, -20], I32)
    x = jnp.asarray(X)
    compared(
        lambda: x.at[i].apply(jnp.sin),
        lambda: x.at[i].apply(lambda v: jnp.where(v > 0.5, v * 3 + 1, v - 2)),
        lambda: x.at[i].apply(lambda v: 2.0),
        lambda: x.at[i].apply(lambda v: lax.cond(v > 0, jnp.cos, jnp.exp, v), mode="clip"),
        lambda: x.reshape(2, 3).at[:, i].apply(lambda v: v * v + 1),
        lambda: x.reshape(2, 3).at[1].apply(lambda v: jax.nn.gelu(v) * v),
        lambda: x.astype(jnp.bfloat16).at[i].apply(jnp.exp),
        lambda: (10 * x).astype(int).at[i].apply(lambda v: v // 2),
        lambda: jax.vmap(lambda row, j: row.at[j].apply(jnp.cos))(x.reshape(2, 3), i.reshape(2, 3)),
        lambda: lax.scatter_apply(
            x, i[:2, None], jnp.tanh, lax.ScatterDimensionNumbers((1,), (), (0,)), update_shape=(2, 3)
        ),
    )


def index_cases(count):
    """Gathers and scatters of every kind and mode by a column of indices, of elements and of windows."""
    x = jnp.arange(1, 6, dtype=F32)
    found = []
    for mode in (MODES.CLIP, MODES.FILL_OR_DROP, MODES.PROMISE_IN_BOUNDS):
        for window, axes in ((), (0,)), ((1,), ()):
            size = 1 + len(window)
            numbers = lax.GatherDimensionNumbers(window, axes, (0,))
            found.append(lambda i, m=mode, n=numbers, s=size: lax.gather(x, i, n, (s,), mode=m))
            updates = jnp.linspace(-3, 8, count * size).reshape(count, *[2] * len(window))
            numbers = lax.ScatterDimensionNumbers(window, axes, (0,))
            kinds = [lax.scatter_add, lax.scatter_sub, lax.scatter_mul, lax.scatter_min, lax.scatter_max]
            if size == 1 and mode is not MODES.CLIP:  # else one place comes twice
                kinds.append(lax.scatter)
            for kind in kinds:
                found.append(lambda i, k=kind, m=mode, u=updates, n=numbers: k(x, i, u, n, mode=m))
    for k in range(count):
        found.append(lambda i, k=k: lax.dynamic_slice(x, (i[k, 0],), (2,)))
        found.append(lambda i, k=k: lax.dynamic_update_slice(x, jnp.array([70.0, 80]), (i[k, 0],)))
    for mode in ("clip", "fill", "wrap"):
        found.append(lambda i, m=mode: jnp.take(x, i[:, 0], mode=m))
    for mode in ("clip", "fill"):
        found.append(lambda i, m=mode: jnp.take_along_axis(x, i[:, 0], 0, mode=m))
    return found


@needs_vulkan
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (I32, (4, 5, -1, 100, -(2**31), 2**31 - 1)),
        (np.uint32, (4, 5, 2**31, 2**32 - 1)),
        (np.int8, (4, 5, -1, 127, -128)),
        (np.uint8, (4, 5, 128, 255)),
    ],
)
def test_indices_out_of_bounds_do_what_they_do_in_xla(dtype, values):
    compared(*index_cases(len(values)), given=(np.array(values, dtype)[:, None],))


@needs_vulkan
def test_short_indices_into_a_long_array():
    """Whose bounds they cannot hold."""
    x, numbers = jnp.arange(300, dtype=F32), lax.GatherDimensionNumbers((), (0,), (0,))
    compared(
        *(
            lambda some, others, m=mode: [(x.at[i].get(mode=m), x.at[i].add(1, mode=m)) for i in (some, others)]
            for mode in ("clip", "fill", "promise_in_bounds")
        ),
        lambda some, others: lax.dynamic_slice(x, (some[1],), (60,)),
        lambda some, others: lax.gather(x, others.astype(np.int8)[:, None], numbers, (1,), mode="clip"),
        given=(np.array([127, 255], np.uint8), np.array([127, -100], np.int16)),
    )


@needs_vulkan
def test_derivatives_at_indices_out_of_bounds():
    """JAX's own, of what comes out of bounds too, count on what XLA drops."""
    i = np.array([0, 2, 9, -7], I32)

    def derivatives(fn):
        def both():
            x, v = jnp.asarray(X), jnp.linspace(-2, 3, 4)
            tangents = jax.jvp(fn, (x, v), (jnp.cos(x), v + 1))[1]
            return tangents, jax.grad(lambda *args: (fn(*args) * jnp.arange(6)).sum(), (0, 1))(x, v)

        return both

    compared(
        lambda: jax.grad(lambda x: x.at[np.array([0, 9, 7])].max(3.0).sum())(X),
        lambda: jax.grad(lambda x: x.at[9].min(-3.0).sum())(X),
        *(
            derivatives(lambda x, v, k=kind, m=mode: getattr(x.at[i], k)(v, mode=m))
            for kind in ("set", "add", "subtract", "max", "min")
            for mode in ("drop", "promise_in_bounds")
        ),
        derivatives(lambda x, v: x.at[i].max(v, mode="clip")),
        derivatives(lambda x, v: x.at[np.array([4, 1])].multiply(v[:2], mode="drop", unique_indices=True)),
        *(derivatives(lambda x, v, m=mode: x.at[i].get(mode=m).sum() * x + v[0]) for mode in ("clip", "fill")),
    )


WINDOWS = {
    "padded": ((2, 3), (1, 2), ((1, 1), (2, 0)), (1, 1), (1, 1)),
    "with holes": ((2, 2), (1, 1), ((0, 0), (0, 0)), (2, 3), (1, 1)),
    "both": ((2, 2), (2, 1), ((1, 0), (1, 2)), (2, 1), (2, 2)),
    "cut": ((2, 2), (1, 1), ((-1, 0), (0, -1)), (1, 1), (1, 1)),
    "of padding": ((1, 1), (1, 1), ((3, 2), (0, 0)), (1, 1), (1, 1)),
    "none": ((6, 6), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
}


@needs_vulkan
def test_windows_of_a_function_combine_elements_alone():
    """Not what pads them, whatever the first value is, and not what is between dilated ones."""
    x = (jnp.arange(1, 21, dtype=F32).reshape(4, 5) - 8) / 4

    def best(a, b):
        better = b[0] > a[0]
        return jnp.where(better, b[0], a[0]), jnp.where(better, b[1], a[1])

    compared(
        *(
            lambda w=window, first=first: lax.reduce_window(x, F32(first), lambda a, b: a * 0.5 + b, *w)
            for window in WINDOWS.values()
            for first in (0, 2.5, np.nan)
        ),
        *(
            lambda w=window: lax.reduce_window((x, (3 * x).astype(int)), (F32(-1), I32(7)), best, *w)
            for window in WINDOWS.values()
        ),
        *(lambda a=axes: lax.reduce(x, F32(2.5), lambda a, b: a * b, a) for axes in ((), (0,), (0, 1))),
        lambda: lax.reduce(x[:0], F32(np.nan), lambda a, b: a * b, (0,)),
    )


@needs_vulkan
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda x: x.at[1].apply(lambda v: jnp.arange(3.0)[v.astype(int)]),
            r"a scatter by a function that is not one of two numbers alone has no kernel: scatter\(float32\[6\], int32",
        ),
        (
            lambda x: x.at[1].apply(lambda v: lax.while_loop(lambda c: c > 1, lambda c: c / 2, v)),
            r"a loop whose length is known only on the device: while\(float32\[\]\)",
        ),
        (
            lambda x: lax.mul_p.bind(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), out_dtype=np.dtype(F32)),
            r"mul with out_dtype=float32, which no kernel is made for: mul\(bfloat16\[6\], bfloat16\[6\]\)",
        ),
        (
            lambda x: lax.dot(x, x, precision="BF16_BF16_F32"),
            r"dot_general with precision=BF16_BF16_F32, which no kernel is made for: dot_general\(float32\[6\]",
        ),
        (
            lambda x: lax.gather(x, I32([[1]]), lax.GatherDimensionNumbers((), (0,), (0,)), (1,), mode=MODES.ONE_HOT),
            r"gather with mode=GatherScatterMode.ONE_HOT, which no kernel is made for: gather\(float32\[6\]",
        ),
    ],
)
def test_what_no_kernel_is_made_for_is_refused(fn, message):
    with pytest.raises(UnsupportedError, match=message + ".*test_semantics.py"):
        vk_kernels.jit(lambda x: fn(x), device=SELECTOR)(X)
