"""Cases of primitives that call functions, loop or branch, and of those that draw random bits."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import linear_call

from vk_kernels.tools.conformance.registry import EXACT, F32, PrimitiveCase, cases_of, draw, register

X = draw((3, 5), F32)


def _on_array(primitive: str, *functions: tuple[str, Callable[..., Any]]) -> None:
    """Functions of one array and all their gradients."""

    def make(name: str, full: bool) -> Iterator[PrimitiveCase]:
        for label, fn in functions:
            yield PrimitiveCase(name, label, fn, (X,), gradient=True)

    register([primitive], make)


@jax.custom_jvp
def _clipped(x):
    return jnp.clip(x, -1, 1)


@_clipped.defjvp
def _clipped_jvp(primals, tangents):
    return _clipped(*primals), 2 * tangents[0]


@jax.custom_vjp
def _doubled(x):
    return 2 * x


_doubled.defvjp(lambda x: (2 * x, x), lambda x, g: (g * jnp.cos(x),))


def _layer(x):
    return jnp.tanh(x) * 2 + x.sum()


def _called(primitive, x):
    closed = jax.make_jaxpr(_layer)(x)
    jaxpr = closed if primitive.name == "closed_call" else closed.jaxpr
    return primitive.bind(x, **primitive.get_bind_params({"call_jaxpr": jaxpr}))


_on_array("jit", ("within", lambda x: jax.jit(_layer)(x) + jax.jit(jnp.sin)(x)))
for _primitive in dict.fromkeys((jax.extend.core.primitives.call_p, jax.extend.core.primitives.closed_call_p)):
    _on_array(_primitive.name, ("bound", functools.partial(_called, _primitive)))  # one primitive since jax 0.11
_on_array("custom_jvp_call", ("relu", jax.nn.relu), ("own", _clipped))
_on_array("custom_vjp_call", ("own", _doubled))
_on_array("remat2", ("one", jax.checkpoint(_layer)), ("two", jax.checkpoint(jax.checkpoint(_layer))))
_on_array("linear_call", ("one", lambda x: linear_call(lambda r, y: r * y, lambda r, t: r * t, 3.0, x)))
_on_array(
    "cond",
    ("taken", lambda x: lax.cond(x[0, 0] < 9, jnp.sin, jnp.cos, x)),
    ("not taken", lambda x: lax.cond(x[0, 0] > 9, jnp.sin, jnp.cos, x)),
    ("of three", lambda x: lax.switch(x[0, 0].astype(int) + 7, [jnp.sin, jnp.cos, jnp.tanh], x)),
    ("mapped", jax.vmap(lambda row: lax.cond(row[0] > 0, lambda r: r * 2, jnp.sin, row))),
)
_on_array(
    "platform_index",
    ("default", lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.sin)),
)
_on_array(
    "scan",
    ("forward", lambda x: lax.scan(lambda c, row: (jnp.tanh(c) + row, c * row), jnp.zeros(5), x)),
    ("in reverse", lambda x: lax.scan(lambda c, row: (jnp.sin(c) + row, c), x[0], x, reverse=True)),
    ("without rows", lambda x: lax.scan(lambda c, _: (c * 1.5, None), x, None, length=3)),
    ("of no turn", lambda x: lax.scan(lambda c, row: (c + row, c), x[0], x[:0])),
    ("fori_loop", lambda x: lax.fori_loop(0, 3, lambda i, y: y * 1.5 + i, x)),
    ("associative", lambda x: lax.associative_scan(jnp.add, x, axis=1)),
)


_on_array("add_any", ("twice", jax.grad(lambda x: (x * jnp.sin(x)).sum())))
_on_array("empty2", ("of a cond's gradient", jax.grad(lambda x: lax.cond(x[0, 0] < 9, jnp.sin, jnp.cos, x).sum())))
_on_array(
    "sharding_constraint",
    ("one", lambda x: lax.with_sharding_constraint(x, jax.sharding.SingleDeviceSharding(jax.devices()[0]))),
)


@cases_of("composite")
def _composite(full: bool) -> Iterator[tuple]:
    yield "", lax.composite(jnp.sin, name="vk.sine"), [X]


@cases_of("while")
def _while(full: bool) -> Iterator[tuple]:
    yield "counted", lambda x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * 2, c[1]), (0, x, x)), [X]
    yield "of no turn", lambda x: lax.while_loop(lambda c: c[0] < 0, lambda c: (c[0] + 1, c[1] * 2), (0, x)), [X], EXACT


if hasattr(lax, "polynomial"):  # jax 0.12 makes these functions operations with a definition

    @cases_of("call_hi_primitive")
    def _defined(full: bool) -> Iterator[tuple]:
        row = np.sort(X.ravel())
        for side in ("left", "right"):
            yield side, functools.partial(jnp.searchsorted, side=side), [row, X], EXACT
        yield "nonzero", lambda x: jnp.nonzero(x > 0, size=6, fill_value=-1), [X], EXACT
        yield "ldexp", lambda x: jnp.ldexp(x, 3), [X], EXACT
        yield "frexp", jnp.frexp, [X], EXACT


# Random bits.


def _of_key(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda words: fn(jax.random.wrap_key_data(words))


def _words(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (*shape, 2), np.uint32)


def _key_data(fn: Callable[..., Any]) -> Callable[..., Any]:
    return _of_key(lambda key: jax.random.key_data(fn(key)))


@cases_of("random_bits")
def _random_bits(full: bool) -> Iterator[tuple]:
    for dtype in (np.uint32, np.uint8, np.uint16):
        for shape in ((), (7,), (3, 5), (0,)):
            draw_bits = _of_key(functools.partial(jax.random.bits, shape=shape, dtype=dtype))
            yield f"{shape}", draw_bits, [_words(1)], EXACT
    yield "mapped", jax.vmap(_of_key(lambda key: jax.random.bits(key, (3,)))), [_words(2, 4)], EXACT
    for name in ("uniform", "normal", "bernoulli", "exponential", "gumbel", "laplace", "cauchy"):
        draw_some = getattr(jax.random, name)
        yield name, _of_key(lambda key, draw_some=draw_some: draw_some(key, shape=(5, 3))), [_words(3)]
    yield "randint", _of_key(lambda key: jax.random.randint(key, (20,), -7, 1000)), [_words(4)], EXACT
    yield "permutation", _of_key(lambda key: jax.random.permutation(key, 13)), [_words(4)], EXACT
    yield "categorical", _of_key(lambda key: jax.random.categorical(key, jnp.zeros((3, 11)))), [_words(5)], EXACT
    yield "choice", _of_key(lambda key: jax.random.choice(key, 9, (4,), replace=False)), [_words(5)], EXACT


@cases_of("random_split", "random_wrap", "random_unwrap")
def _random_split(full: bool) -> Iterator[tuple]:
    for shape in (2, 5, (2, 3)):
        yield f"{shape}", _key_data(lambda key, shape=shape: jax.random.split(key, shape)), [_words(1)], EXACT


@cases_of("random_fold_in")
def _random_fold_in(full: bool) -> Iterator[tuple]:
    def fold(words: Any, i: Any) -> Any:
        return _key_data(lambda key: jax.random.fold_in(key, i))(words)

    yield "one", fold, [_words(1), np.int32(7)], EXACT
    yield "mapped", jax.vmap(fold), [_words(1, 3), np.arange(3, dtype=np.uint32)], EXACT


@cases_of("random_seed")
def _random_seed(full: bool) -> Iterator[tuple]:
    for seed in (np.int32(-3), np.int32(2**31 - 1), np.uint32(7)):
        yield "", lambda seed: jax.random.key_data(jax.random.key(seed)), [seed], EXACT


@cases_of("random_clone")
def _random_clone(full: bool) -> Iterator[tuple]:
    yield "", _key_data(jax.random.clone), [_words(1)], EXACT


@cases_of("threefry2x32")
def _threefry(full: bool) -> Iterator[tuple]:
    call = jax.extend.core.primitives.threefry2x32_p
    for shape in ((), (7,), (3, 5), (0,)):
        yield f"{shape}", lambda *xs: call.bind(*xs), [draw(shape, np.dtype(np.uint32), i) for i in range(4)], EXACT
