"""Every primitive with zeros, infinities, NaN, subnormal and extreme numbers, as literals and in arrays.

A driver's compiler knows a literal and may do algebra with it; an array it does not know. Both are to give what XLA
gives. Small functions of such values, and gradients, are among them: what is a literal may come from afar.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from vk_kernels.tools.conformance.registry import BOOL, DTYPES, FLOATS, INTEGERS, NUMBERS, SIGNED

P = jax.extend.core.primitives


@dataclass(frozen=True, eq=False)
class Item:
    """A function of arrays. operands: of an elementwise primitive, which is `of` them, literals among them."""

    primitive: str
    label: str
    fn: Callable[..., Any]
    args: tuple[np.ndarray, ...]
    of: Callable[..., Any] | None = None
    operands: tuple[np.ndarray, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        return self.args[0].dtype


@functools.cache
def constants(dtype: np.dtype) -> tuple[np.generic, ...]:
    """The literals: 0, -0, 1, -1, the infinities, NaN, the smallest normal number, a subnormal one and the largest."""
    if dtype == BOOL:
        given = (False, True)
    elif dtype in FLOATS:
        info = ml_dtypes.finfo(dtype)
        normal = float(info.smallest_normal)
        given = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, normal, normal / 8, float(info.max))
    else:
        info = np.iinfo(dtype)
        given = (0, 1, info.max, *((-1, info.min) if info.min else ()))
    return tuple(map(dtype.type, given))


@functools.cache
def values(dtype: np.dtype) -> np.ndarray:
    """The array that literals are put beside: the same values, and others."""
    if dtype == BOOL:
        more = ()
    elif dtype in FLOATS:
        more = (*(-float(x) for x in constants(dtype)[-3:]), 0.5, -0.5, 1.5, 2.5, -3.0, 100.0, -100.0, 1e-3)
    else:
        more = (2, 3, 7, 31, 32, 100, np.iinfo(dtype).max - 1, np.iinfo(dtype).min + 1)
    return np.array([*constants(dtype), *map(dtype.type, more)], dtype)


@functools.cache
def grid(some: Callable[[np.dtype], Any], dtype: np.dtype, operands: int) -> tuple[np.ndarray, ...]:
    """All combinations of constants or values, in a row."""
    axes = np.meshgrid(*(np.array(some(dtype), dtype),) * operands)
    return tuple(np.ascontiguousarray(x.ravel()) for x in axes)


# Elementwise primitives: name -> (function, operands, dtypes).


# Without a function in jax.lax.
_BOUND: dict[str, Callable[..., Any]] = {
    "eq_to": lambda x, y: P.eq_to_p.bind(x, y),
    "lt_to": lambda x, y: P.lt_to_p.bind(x, y),
    "le_to": lambda x, y: P.le_to_p.bind(x, y),
    "add_any": lambda x, y: P.add_jaxvals_p.bind(x, y),
}

_UNARY = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "cos", "cosh", "digamma", "erf", "erfc"),
    *("erf_inv", "exp", "exp2", "expm1", "floor", "is_finite", "lgamma", "log", "log1p", "logistic", "rsqrt", "sin"),
    *("sinh", "sqrt", "tan", "tanh"),
)
_Row = tuple[Callable[..., Any], int, Sequence[np.dtype]]
ELEMENTWISE: dict[str, _Row] = {
    **{name: (getattr(lax, name), 1, FLOATS) for name in _UNARY},
    "round": (lax.round, 1, FLOATS),
    "round to even": (lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), 1, FLOATS),
    **{name: (getattr(lax, name), 1, NUMBERS) for name in ("neg", "sign", "square")},
    "abs": (lax.abs, 1, (*FLOATS, *SIGNED)),
    **{
        f"integer_pow {y}": (functools.partial(lax.integer_pow, y=y), 1, FLOATS if y < 0 else NUMBERS)
        for y in (-3, -2, -1, 0, 1, 2, 3)
    },
    **{
        f"reduce_precision {e} {m}": (lambda x, e=e, m=m: lax.reduce_precision(x, e, m), 1, FLOATS)
        for e, m in ((1, 0), (4, 3), (5, 2), (5, 10), (8, 7))
    },
    "not": (lax.bitwise_not, 1, (*INTEGERS, BOOL)),
    **{name: (getattr(lax, name), 1, INTEGERS) for name in ("clz", "population_count")},
    **{name: (getattr(lax, name), 2, NUMBERS) for name in ("add", "sub", "mul", "div", "rem")},
    **{name: (getattr(lax, name), 2, DTYPES) for name in ("max", "min", "eq", "ne", "lt", "le", "gt", "ge")},
    **{name: (fn, 2, DTYPES if name != "add_any" else NUMBERS) for name, fn in _BOUND.items()},
    **{name: (getattr(lax, name), 2, FLOATS) for name in ("pow", "atan2", "nextafter")},
    **{name: (getattr(lax, f"bitwise_{name}"), 2, (*INTEGERS, BOOL)) for name in ("and", "or", "xor")},
    "mulhi": (lax.mulhi, 2, INTEGERS),
    **{
        name: (getattr(lax, name), 2, INTEGERS)
        for name in ("shift_left", "shift_right_logical", "shift_right_arithmetic")
    },
    "clamp": (lax.clamp, 3, NUMBERS),
    "select_n": (lambda x, y, z: lax.select_n(lax.gt(x, y), y, z), 3, DTYPES),
    **{
        f"convert_element_type {target.name}": (
            functools.partial(lax.convert_element_type, new_dtype=target),
            1,
            tuple(dtype for dtype in DTYPES if dtype != target),
        )
        for target in DTYPES
    },
    **{
        f"bitcast_convert_type {target.name}": (
            functools.partial(lax.bitcast_convert_type, new_dtype=target),
            1,
            tuple(dtype for dtype in NUMBERS if dtype != target and dtype.itemsize == target.itemsize),
        )
        for target in NUMBERS
    },
    "copy": (jnp.copy, 1, DTYPES),
    "stop_gradient": (lax.stop_gradient, 1, FLOATS),
}


def _elementwise(name: str, dtype: np.dtype) -> Iterator[Item]:
    """On all combinations of values, and with a literal for each operand in turn."""
    fn, operands, _ = ELEMENTWISE[name]
    primitive, some = name.split()[0], constants if operands > 2 else values
    arrays = grid(some, dtype, operands)
    yield Item(primitive, name, fn, arrays, fn, arrays)
    others = grid(some, dtype, max(operands - 1, 1))
    for at, constant in itertools.product(range(operands), constants(dtype)):
        shown = ", ".join(str(constant) if i == at else "x" for i in range(operands))
        scalar = operands == 1 or (operands == 2 and name not in _BOUND)
        literal = functools.partial(_literal, constant, scalar)
        call = functools.partial(_with_literal, fn, literal, at, operands)
        arrays = () if operands == 1 else others
        whole = *arrays[:at], np.full_like(others[0], constant), *arrays[at:]
        yield Item(primitive, f"{name}({shown})", call, others, fn, whole)


def _literal(constant: np.generic, scalar: bool, like: Any) -> Any:
    return constant if scalar else lax.full_like(like, constant)


def _with_literal(fn: Callable[..., Any], literal: Callable[..., Any], at: int, operands: int, *others: Any) -> Any:
    if operands == 1:
        return fn(lax.full_like(others[0], literal(others[0])))
    return fn(*others[:at], literal(others[0]), *others[at:])


# Primitives that combine elements: on rows that begin with two such values, short (in one thread) and long.

_COMMON = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.5, -3.0)


@functools.cache
def common(dtype: np.dtype) -> np.ndarray:
    """Values of which sums and products do not depend on the order, and no result is subnormal."""
    if dtype == BOOL or dtype not in FLOATS:
        return values(dtype)
    return np.array(_COMMON, np.float32).astype(dtype)


@functools.cache
def rows(dtype: np.dtype, length: int) -> np.ndarray:
    pairs = np.stack(grid(common, dtype, 2), axis=1)
    return np.concatenate([pairs, np.ones((len(pairs), length - 2), dtype)], axis=1)


def _reduce_by(fn: Callable[..., Any], init: Any) -> Callable[..., Any]:
    return lambda x: lax.reduce(x, np.asarray(init, x.dtype), fn, (1,))


def _fewest(dtype: np.dtype) -> Any:
    return -np.inf if dtype in FLOATS else False if dtype == BOOL else np.iinfo(dtype).min


def _most(dtype: np.dtype) -> Any:
    return np.inf if dtype in FLOATS else True if dtype == BOOL else np.iinfo(dtype).max


def _combining(dtype: np.dtype) -> Iterator[Item]:
    arithmetic = {"reduce_sum": (lax.add, 0), "reduce_prod": (lax.mul, 1)} if dtype != BOOL else {}
    functions = {
        **arithmetic,
        "reduce_max": (lax.max, _fewest(dtype)),
        "reduce_min": (lax.min, _most(dtype)),
    }
    if dtype not in FLOATS:
        functions |= {"reduce_or": (lax.bitwise_or, 0), "reduce_xor": (lax.bitwise_xor, 0)}
    for length in (2, 3, 40):
        x = rows(dtype, length)
        for name, (fn, init) in functions.items():
            yield Item(name, f"of {length}", _reduce_by(fn, init), (x,))
            if length == 3:
                for constant in constants(dtype)[:7]:
                    yield Item(name, f"of {length} from {constant}", _reduce_by(fn, constant), (x,))
        for name in ("argmax", "argmin"):
            yield Item(name, f"of {length}", functools.partial(getattr(lax, name), axis=1, index_dtype=np.int32), (x,))
        yield Item("sort", f"of {length}", functools.partial(lax.sort, dimension=1), (x,))
        yield Item("sort", f"places of {length}", functools.partial(jnp.argsort, axis=1), (x,))
        if dtype == BOOL:
            continue
        yield Item("top_k", f"of {length}", functools.partial(lax.top_k, k=2), (x,))
        cumulative = ["cumsum", "cumprod", "cummax", "cummin", *(["cumlogsumexp"] if dtype in FLOATS else [])]
        for name, reverse in itertools.product(cumulative, (False, True)):
            fn = functools.partial(getattr(lax, name), axis=1, reverse=reverse)
            yield Item(name, f"of {length}{' in reverse' if reverse else ''}", fn, (x,))
        for constant in constants(dtype)[:7]:
            shown = f"of {length} with {constant}"
            yield Item("dot_general", shown, lambda x, c=constant: x @ jnp.full((x.shape[1], 2), c), (x,))
    x = rows(dtype, 3)
    if dtype != BOOL:
        large = rows(dtype, 128)  # of as many elements as the kernels of products take
        yield Item("dot_general", "of 128", lambda x: x @ jnp.full((x.shape[1], 64), 1, x.dtype), (large,))
        yield Item("dot_general", "of pairs", lambda x: jnp.einsum("ij,ij->i", x, x[::-1]), (x,))
        for name, fn, init in (("sum", lax.add, 0), ("max", lax.max, _fewest(dtype)), ("min", lax.min, _most(dtype))):
            window = functools.partial(
                lax.reduce_window, window_dimensions=(1, 2), window_strides=(1, 1), padding="SAME"
            )
            call = functools.partial(window, init_value=np.asarray(init, dtype), computation=fn)
            yield Item(f"reduce_window_{name}", "of 2", call, (x,))


# Primitives that move elements, with literals among them.


def _moving(dtype: np.dtype) -> Iterator[Item]:
    x, which = np.resize(common(dtype), 9), np.array([0, 99, -1, 3, -99, 1], np.int32)
    for i, constant in enumerate(constants(dtype)):
        full = functools.partial(jnp.full, (3,), constant)
        functions = {
            "pad": lambda x, c=constant: lax.pad(x, c, [(2, 1, 1)]),
            "concatenate": lambda x, full=full: lax.concatenate([x, full()], 0),
            "dynamic_update_slice": lambda x, full=full: lax.dynamic_update_slice(x, full(), (x.size - 3,)),
            "broadcast_in_dim": lambda x, c=constant: jnp.full((2, 3), c, x.dtype),
            "scatter": lambda x, c=constant: x.at[which].set(c, mode="drop"),
            "select_n": lambda x, c=constant: jnp.where(x > 0, c, x),
        }
        if i != 1:  # JAX takes a fill value of -0 for the 0 before it
            functions["gather"] = lambda x, c=constant: x.at[which].get(mode="fill", fill_value=c.item())
        if dtype != BOOL and i < 7:
            functions |= {
                "scatter_add": lambda x, c=constant: x.at[which].add(c, mode="drop"),
                "scatter_mul": lambda x, c=constant: x.at[which].multiply(c, mode="drop"),
                "scatter_max": lambda x, c=constant: x.at[which].max(c, mode="drop"),
                "scatter_min": lambda x, c=constant: x.at[which].min(c, mode="drop"),
            }
        for name, fn in functions.items():
            yield Item(name, f"with {constant}", fn, (x,))


# Small functions, of two arrays and a literal.


def _functions(c: np.generic) -> dict[str, Callable[..., Any]]:
    return {
        "x / c, where": lambda x, y: jnp.where(y > 0, x / c, 1),
        "(c / x) y": lambda x, y: c / x * y,
        "x + c y": lambda x, y: x + c * y,
        "x - c y": lambda x, y: x - c * y,
        "1 / (c - x)": lambda x, y: 1 / (c - x),
        "where, then times": lambda x, y: jnp.where(x > 0, c, y) * x,
        "where, then divided": lambda x, y: x / jnp.where(x > 0, c, y),
        "a condition times": lambda x, y: lax.convert_element_type(x > 0, x.dtype) * (c * y),
        "a filled array": lambda x, y: jnp.full_like(x, c) * x + y,
        "a filled array of integers": lambda x, y: jnp.zeros(x.shape, np.int32).astype(x.dtype) * x + c,
        "one axis": lambda x, y: lax.broadcasted_iota(x.dtype, (1, x.size), 0)[0] * x + c,
        "one at most": lambda x, y: jnp.minimum(jnp.maximum(x, c), 1),
        "twice": lambda x, y: (x + c) - (x + c),
        "over itself": lambda x, y: (x * c) / (x * c),
        "over its multiple": lambda x, y: x / (x * c),
        "plus its negative": lambda x, y: x * c + -(x * c),
        "of literals": lambda x, y: (jnp.ones_like(x) * c - jnp.ones_like(x) * c) * x,
        "is it NaN": lambda x, y: jnp.isnan(x * c) | jnp.isinf(x + c),
        "nan_to_num": lambda x, y: jnp.nan_to_num(x * c),
        "the mean of nothing": lambda x, y: x * jnp.mean(jnp.full((0,), c)),
        "softmax of two": lambda x, y: jax.nn.softmax(jnp.stack([x, jnp.full_like(x, c)])),
        "logsumexp of two": lambda x, y: jax.nn.logsumexp(jnp.stack([x, jnp.full_like(x, c)]), axis=0),
    }


_DIFFERENTIATED: dict[str, Callable[..., Any]] = {
    **{name: getattr(jnp, name) for name in ("sqrt", "log", "log1p", "exp", "tanh", "abs", "square", "reciprocal")},
    **{name: getattr(jnp, name) for name in ("sin", "cos", "arctan", "cbrt", "expm1", "sinh", "arcsinh", "sign")},
    **{name: getattr(jax.nn, name) for name in ("relu", "gelu", "silu", "sigmoid", "softplus", "elu", "leaky_relu")},
    "log_sigmoid": jax.nn.log_sigmoid,
    "rsqrt": lax.rsqrt,
    "softmax": lambda x: jax.nn.softmax(jnp.stack([x, 2 * x]), axis=0),
    "log_softmax": lambda x: jax.nn.log_softmax(jnp.stack([x, 2 * x]), axis=0),
    "norm": lambda x: jnp.linalg.norm(jnp.stack([x, x]), axis=0),
    "variance": lambda x: jnp.var(jnp.stack([x, x + 1]), axis=0),
    "deviation": lambda x: jnp.std(jnp.stack([x, x]), axis=0),
    "greatest": lambda x: jnp.max(jnp.stack([x, -x]), axis=0),
    "product": lambda x: jnp.prod(jnp.stack([x, x + 1]), axis=0),
    "cumulative product": lambda x: jnp.cumprod(jnp.stack([x, x]), axis=0),
    "safe root": lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0),
}


def _differentiated_with(c: np.generic) -> dict[str, Callable[..., Any]]:
    return {
        f"x / {c}": lambda x: x / c,
        f"{c} / x": lambda x: c / x,
        f"x * {c}": lambda x: x * c,
        f"x - {c}": lambda x: x - c,
        f"max(x, {c})": lambda x: jnp.maximum(x, c),
        f"min(x, {c})": lambda x: jnp.minimum(x, c),
        f"clip(x, {c}, 1)": lambda x: jnp.clip(x, c, 1),
        f"atan2(x, {c})": lambda x: jnp.arctan2(x, c),
        f"atan2({c}, x)": lambda x: jnp.arctan2(c, x),
        f"x ** {c}": lambda x: x**c,
        f"{c} ** x": lambda x: c**x,
        f"logaddexp(x, {c})": lambda x: jnp.logaddexp(x, c),
        f"where(x > 0, x / {c}, 1)": lambda x: jnp.where(x > 0, x / c, 1),
    }


def _chains(dtype: np.dtype) -> Iterator[Item]:
    for constant in common(dtype)[:7]:
        for name, fn in _functions(constant).items():
            yield Item("function", f"{name}, c = {constant}", fn, grid(common, dtype, 2))


def _gradients(dtype: np.dtype) -> Iterator[Item]:
    functions = dict(_DIFFERENTIATED)
    for constant in common(dtype)[:7]:
        functions |= _differentiated_with(constant)
    for name, fn in functions.items():
        yield Item("gradient", name, lambda x, fn=fn: jax.grad(lambda x: fn(x).sum())(x), (common(dtype),))


def has_subnormal_literal(item: Item) -> bool:
    subnormal = constants(item.dtype)[8] if item.dtype in FLOATS else None
    return any((x == subnormal).all() for x in item.operands) if subnormal is not None else False


def items(primitive: str, dtype: np.dtype) -> list[Item]:
    """The items of an elementwise primitive, or of one of the other subjects."""
    if primitive in SUBJECTS:
        make, dtypes = SUBJECTS[primitive]
        return list(make(dtype)) if dtype in dtypes else []
    return list(_elementwise(primitive, dtype)) if dtype in ELEMENTWISE[primitive][2] else []


SUBJECTS: dict[str, tuple[Callable[[np.dtype], Iterator[Item]], Sequence[np.dtype]]] = {
    "combining": (_combining, DTYPES),
    "moving": (_moving, DTYPES),
    "functions": (_chains, FLOATS),
    "gradients": (_gradients, FLOATS),
}
