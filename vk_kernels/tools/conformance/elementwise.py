"""Cases of primitives that compute every element from those at its place."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vk_kernels.tools.conformance.registry import (
    BOOL,
    DTYPES,
    EXACT,
    EXACT_GRADIENT,
    F32,
    FLOATS,
    INTEGERS,
    NUMBERS,
    SHAPES,
    SIGNED,
    SPECIAL,
    PrimitiveCase,
    cases_of,
    draw,
    register,
    together,
)


def _elementwise(
    *primitives: str,
    fn: Callable[..., Any] | None = None,
    dtypes: Sequence[np.dtype] = FLOATS,
    operands: int = 1,
    gradient: bool = True,
    special: bool = True,
    between: tuple[float, float] = (-3.0, 3.0),
    exact: bool = False,
) -> None:
    def make(name: str, full: bool) -> Iterator[PrimitiveCase]:
        call = fn or getattr(lax, {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}.get(name, name))
        for dtype, shape in together(dtypes, SHAPES, full):
            args = tuple(draw(shape, dtype, i, *between) for i in range(operands))
            floats = dtype in FLOATS
            yield PrimitiveCase(name, "", call, args, gradient and floats, exact or not floats)
        if special and F32 in dtypes:
            grid = np.meshgrid(*(SPECIAL,) * operands) if operands > 1 else [SPECIAL]
            yield PrimitiveCase(name, "of special values", call, tuple(x.ravel() for x in grid), exact=exact)

    register(primitives, make)


_elementwise("exp", "exp2", "expm1", "sin", "cos", "tanh", "logistic", "sinh", "cosh", "asinh", "atan", "erf", "erfc")
_elementwise("log", "log1p", "sqrt", "rsqrt", "cbrt", "lgamma", between=(0.05, 9.0), special=False)
_elementwise("digamma", between=(0.05, 9.0), special=False, gradient=False)
_elementwise("asin", "acos", "atanh", "erf_inv", "tan", between=(-0.95, 0.95), special=False)
_elementwise("acosh", between=(1.1, 9.0), special=False)
_elementwise("floor", "ceil", gradient=False, exact=True)
_elementwise("is_finite", gradient=False, exact=True)
_elementwise("round", fn=lambda x: (lax.round(x), lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)), gradient=False)
_elementwise("neg", dtypes=NUMBERS, exact=True)
_elementwise("sign", dtypes=NUMBERS, gradient=False, exact=True)
_elementwise("abs", dtypes=FLOATS + SIGNED)
_elementwise("square", dtypes=NUMBERS)
if hasattr(lax, "log2"):  # primitives since jax 0.11
    _elementwise("log2", between=(0.05, 9.0), special=False)
    _elementwise("one_minus_square")
_elementwise("not", fn=lax.bitwise_not, dtypes=(*INTEGERS, BOOL))
_elementwise("clz", "population_count", dtypes=INTEGERS)
_elementwise("add", "sub", "mul", dtypes=NUMBERS, operands=2)
_elementwise("div", dtypes=NUMBERS, operands=2, gradient=False)
_elementwise("rem", dtypes=NUMBERS, operands=2, gradient=False, special=False)
_elementwise("max", "min", dtypes=DTYPES, operands=2, exact=True)
_elementwise("and", "or", "xor", dtypes=(*INTEGERS, BOOL), operands=2)
_elementwise("eq", "ne", "lt", "le", "gt", "ge", dtypes=DTYPES, operands=2, gradient=False, exact=True)
_elementwise("shift_left", "shift_right_logical", "shift_right_arithmetic", dtypes=INTEGERS, operands=2)
_elementwise("mulhi", dtypes=INTEGERS, operands=2)
_elementwise("pow", operands=2, between=(0.2, 3.0), special=False)
_elementwise("atan2", operands=2)
_elementwise("nextafter", operands=2, gradient=False, exact=True)
_elementwise("copy", fn=jnp.copy, dtypes=DTYPES, exact=True)
_elementwise("stop_gradient", fn=lax.stop_gradient, dtypes=(F32, BOOL), exact=True)
_elementwise("device_put", fn=jax.device_put, dtypes=(F32, BOOL), exact=True)
_elementwise("name", fn=lambda x: checkpoint_name(x, "it"), dtypes=(F32, BOOL), exact=True)
_elementwise("optimization_barrier", fn=lax.optimization_barrier, dtypes=(F32, BOOL), exact=True)
for _name in ("eq_to", "lt_to", "le_to"):
    _elementwise(
        _name,
        fn=lambda x, y, name=_name: getattr(jax.extend.core.primitives, f"{name}_p").bind(x, y),
        dtypes=DTYPES,
        operands=2,
        gradient=False,
        exact=True,
    )


if hasattr(lax, "polynomial"):  # jax 0.12

    @cases_of("polynomial")
    def _polynomial(full: bool) -> Iterator[tuple]:
        for dtype, degree in together(FLOATS, (0, 1, 4), full):
            args = [draw((3, 5), dtype, i) for i in range(degree + 2)]
            yield f"of degree {degree}", lambda x, *c: lax.polynomial(x, c), args, {"gradient": dtype in FLOATS}


@cases_of("integer_pow")
def _integer_pow(full):
    for y, dtype in together((2, 3, -1, 0, 7, -3), (*FLOATS, np.dtype(np.int32)), full):
        if y >= 0 or dtype in FLOATS:
            yield (
                f"y={y}",
                functools.partial(lax.integer_pow, y=y),
                [draw((3, 5), dtype)],
                {"gradient": dtype in FLOATS},
            )


@cases_of("convert_element_type")
def _convert_element_type(full):
    for source, target in together(DTYPES, (*DTYPES[3:], *DTYPES[:3]), full):
        # XLA does not say what a float out of an integer's range becomes, unless it is its own conversion of f32.
        args = [draw((4, 5), source, low=0.0, high=100.0)]
        yield f"to {target.name}", functools.partial(lax.convert_element_type, new_dtype=target), args, EXACT
    for target in (np.int32, np.uint32, np.int8, np.uint8, np.bool_, jnp.bfloat16, np.float16):
        label = f"to {np.dtype(target).name} of special values"
        yield label, functools.partial(lax.convert_element_type, new_dtype=target), [SPECIAL], EXACT


@cases_of("bitcast_convert_type")
def _bitcast(full):
    for width, dtypes in itertools.groupby(sorted(NUMBERS, key=lambda t: t.itemsize), key=lambda t: t.itemsize):
        dtypes = list(dtypes)
        for source, target in together(dtypes, (*dtypes[1:], dtypes[0]), full):
            args = [draw((3, 4), source)]
            yield f"to {target.name}", functools.partial(lax.bitcast_convert_type, new_dtype=target), args, EXACT
        if width < 4:
            narrow, wide = dtypes[0], np.dtype(np.float32)
            parts = wide.itemsize // width
            yield (
                "wider",
                functools.partial(lax.bitcast_convert_type, new_dtype=wide),
                [draw((3, parts), narrow)],
                EXACT,
            )
            yield "narrower", functools.partial(lax.bitcast_convert_type, new_dtype=narrow), [draw((3,), wide)], EXACT


@cases_of("reduce_precision")
def _reduce_precision(full):
    for exponent, mantissa in ((8, 23), (8, 7), (8, 3), (5, 10)):
        fn = functools.partial(lax.reduce_precision, exponent_bits=exponent, mantissa_bits=mantissa)
        yield f"to {exponent}, {mantissa}", fn, [draw((3, 5), F32)], EXACT


@cases_of("select_n")
def _select_n(full):
    for dtype, shape in together(DTYPES, SHAPES, full):
        args = [draw(shape, BOOL, 5), draw(shape, dtype, 1), draw(shape, dtype, 2)]
        yield "by bool", lax.select_n, args, {"exact": True, "gradient": dtype in FLOATS}
    which = np.array([0, 1, 2, 2, 1], np.int32)
    yield "of three", lax.select_n, [which, *(draw((5,), F32, i) for i in range(3))], EXACT_GRADIENT
    yield "by a scalar", lax.select_n, [np.bool_(True), draw((5,), F32, 1), draw((5,), F32, 2)], EXACT_GRADIENT


@cases_of("clamp")
def _clamp(full):
    for dtype, shape in together(NUMBERS, SHAPES, full):
        low, high = np.asarray(1, dtype), np.asarray(2, dtype)
        yield "by scalars", lax.clamp, [low, draw(shape, dtype), high], EXACT
    args = [draw((7,), F32, 1), draw((7,), F32, 2), draw((7,), F32, 3, 3, 4)]
    yield "by arrays", lax.clamp, args, EXACT_GRADIENT
