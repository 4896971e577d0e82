"""One element at a time: how values of every dtype sit in registers and buffers, and the elementwise primitives.

In registers a bool is a SPIR-V bool; an integer is 32 bits, sign- or zero-extended from its own width; a float is f32,
of a value that its own dtype can hold. In buffers all have the bytes that XLA gives them.
"""

import functools
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from vk_kernels.compiler.codegen.float_math import FloatMath
from vk_kernels.spirv.builder import Id, Module
from vk_kernels.spirv.spec import Ext, Op

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)

_KINDS = {
    "bool": "bool",
    **dict.fromkeys(("int8", "int16", "int32"), "signed"),
    **dict.fromkeys(("uint8", "uint16", "uint32"), "unsigned"),
    **dict.fromkeys(("float32", "bfloat16", "float16"), "float"),
}


@functools.cache
def kind(dtype: np.dtype) -> str:
    """bool, signed, unsigned or float. Raises ValueError for a dtype that kernels are not generated for."""
    found = _KINDS.get(dtype.name)
    if found is None:
        raise ValueError(f"no kernel is generated for {dtype.name}; use one of {', '.join(_KINDS)}")
    return found


# Bits of exponent and of mantissa.
_LAYOUTS = {"float32": (8, 23), "bfloat16": (8, 7), "float16": (5, 10)}


def bits_of(dtype: np.dtype) -> int:
    return 8 * dtype.itemsize


class Scalars:
    """Elements of one module."""

    def __init__(self, module: Module):
        self.m = module
        self.math = FloatMath(module)

    # Between registers, constants and buffers.

    def constant(self, value: object, dtype: np.dtype) -> Id:
        """A constant of the graph: no driver gets to see a zero, an infinity, a NaN or a subnormal number."""
        if kind(dtype) == "bool":
            return self.m.boolean(bool(value))
        if kind(dtype) == "float":
            return self.m.opaque(int(np.asarray(value, dtype).astype(np.float32).view(np.uint32)))
        return self.m.constant(int(value))

    def from_word(self, word: Id, dtype: np.dtype) -> Id:
        """The value that a word of a buffer, zero-extended, holds."""
        m = self.m
        match dtype.name:
            case "bool":
                return m.op(Op.I_NOT_EQUAL, word, m.constant(0))
            case "float32":
                return m.from_bits(word)
            case "bfloat16":
                return m.from_bits(m.op(Op.SHIFT_LEFT, word, m.constant(16), type=m.u32))
            case "float16":
                return self._from_half(word)
        return self._extended(word, dtype)

    def to_word(self, x: Id, dtype: np.dtype) -> Id:
        """The bits of a value, in the low bits of a word."""
        m = self.m
        match dtype.name:
            case "bool":
                return m.select(x, m.constant(1), m.constant(0))
            case "float32":
                return m.bits(x)
            case "bfloat16":
                return m.op(Op.SHIFT_RIGHT_LOGICAL, m.bits(x), m.constant(16), type=m.u32)
            case "float16":
                return self._to_half(x)
        return x

    def _extended(self, x: Id, dtype: np.dtype) -> Id:
        """The low bits of an integer register, extended as the dtype is."""
        m, spare = self.m, 32 - bits_of(dtype)
        if spare == 0:
            return x
        if kind(dtype) == "unsigned":
            return self._masked(x, dtype)
        shift = m.constant(spare)
        left = m.op(Op.SHIFT_LEFT, x, shift, type=m.u32)
        return m.op(Op.SHIFT_RIGHT_ARITHMETIC, left, shift, type=m.u32)

    def _masked(self, x: Id, dtype: np.dtype) -> Id:
        """The low bits of an integer register, zero-extended."""
        if bits_of(dtype) == 32:
            return x
        return self.m.op(Op.AND, x, self.m.constant((1 << bits_of(dtype)) - 1))

    def _from_half(self, word: Id) -> Id:
        m = self.m
        size = m.op(Op.AND, word, m.constant(0x7FFF))
        normal = m.op(Op.I_ADD, m.op(Op.SHIFT_LEFT, size, m.constant(13), type=m.u32), m.constant(112 << 23))
        large = m.op(Op.I_ADD, normal, m.constant(112 << 23))  # infinity and NaN
        small = m.bits(m.op(Op.F_MUL, m.op(Op.U_TO_F, size), m.real(2.0**-24)))
        value = m.select(m.op(Op.U_LESS, size, m.constant(0x0400)), small, normal)
        value = m.select(m.op(Op.U_GREATER_EQUAL, size, m.constant(0x7C00)), large, value)
        sign = m.op(Op.SHIFT_LEFT, m.op(Op.AND, word, m.constant(0x8000)), m.constant(16), type=m.u32)
        return m.from_bits(m.op(Op.OR, value, sign))

    def _to_half(self, x: Id) -> Id:
        """The 16 bits of a value that a half can hold."""
        m = self.m
        bits = m.bits(x)
        size = m.op(Op.AND, bits, m.constant(0x7FFFFFFF))
        normal = m.op(Op.SHIFT_RIGHT_LOGICAL, m.op(Op.I_SUB, size, m.constant(112 << 23)), m.constant(13), type=m.u32)
        small = m.op(Op.F_TO_U, m.op(Op.F_MUL, m.from_bits(size), m.real(2.0**24)))
        value = m.select(m.op(Op.U_LESS, size, m.constant(113 << 23)), small, normal)
        infinite = m.op(Op.U_GREATER_EQUAL, size, m.constant(0x7F800000))
        value = m.select(infinite, m.constant(0x7C00), value)
        value = m.select(m.op(Op.U_GREATER, size, m.constant(0x7F800000)), m.constant(0x7E00), value)
        sign = m.op(Op.SHIFT_RIGHT_LOGICAL, m.op(Op.AND, bits, m.constant(0x80000000)), m.constant(16), type=m.u32)
        return m.op(Op.OR, value, sign)

    def rounded(self, x: Id, dtype: np.dtype) -> Id:
        """The value that a register must hold after arithmetic: the nearest of the dtype, or its low bits."""
        match kind(dtype):
            case "float" if dtype != np.float32:
                return self._rounded_float(x, 7, dtype == F16) if dtype == BF16 else self._rounded_float(x, 10, True)
            case "signed" | "unsigned":
                return self._extended(x, dtype)
        return x

    def _rounded_float(self, x: Id, mantissa: int, half: bool) -> Id:
        """To `mantissa` bits, ties to even; `half`: with the 5 exponent bits of f16 too."""
        m, drop = self.m, 23 - mantissa
        bits = m.bits(x)
        last = m.op(Op.AND, m.op(Op.SHIFT_RIGHT_LOGICAL, bits, m.constant(drop), type=m.u32), m.constant(1))
        carried = m.op(Op.I_ADD, m.op(Op.I_ADD, bits, m.constant((1 << drop - 1) - 1)), last)
        value = m.from_bits(m.op(Op.AND, carried, m.constant(-1 << drop)))
        if half:
            size = self.math.abs(x)
            steps = self.math.round_even(m.op(Op.F_MUL, x, m.real(2.0**24)))
            small = m.op(Op.F_LESS, size, m.real(2.0**-14))
            value = m.select(small, m.op(Op.F_MUL, steps, m.real(2.0**-24)), value)
            infinite = self.math._with_sign(m.real(float("inf")), x)
            value = m.select(m.op(Op.F_GREATER_EQUAL, size, m.real(65520)), infinite, value)
        return m.select(self.math.is_nan(x), m.from_bits(m.op(Op.OR, bits, m.constant(0x7FC00000))), value)

    # Conversions.

    def convert(self, x: Id, source: np.dtype, target: np.dtype) -> Id:
        """Converts as XLA does: floats to integers saturate, and NaN becomes 0."""
        m = self.m
        match kind(source), kind(target):
            case "bool", "bool":
                return x
            case "bool", "float":
                return m.select(x, m.real(1), self.constant(0, target))
            case "bool", _:
                return m.select(x, m.constant(1), m.constant(0))
            case "float", "bool":
                return m.op(Op.F_NOT_EQUAL, x, m.real(0))
            case _, "bool":
                return m.op(Op.I_NOT_EQUAL, x, m.constant(0))
            case "float", "float":
                return self.rounded(x, target)
            case "float", _:
                return self._saturated(x, target)
            case of, "float":
                return self.rounded(m.op(Op.S_TO_F if of == "signed" else Op.U_TO_F, x), target)
        return self._extended(x, target)

    def _saturated(self, x: Id, target: np.dtype) -> Id:
        m, limits = self.m, np.iinfo(target)
        signed = kind(target) == "signed"
        inside = m.op(Op.F_TO_S if signed else Op.F_TO_U, x)
        low = m.op(Op.F_LESS_EQUAL, x, m.real(float(limits.min)))
        high = m.op(Op.F_GREATER_EQUAL, x, m.real(float(limits.max)))  # 2^31 - 1 and 2^32 - 1 round up
        value = m.select(high, m.constant(int(limits.max)), m.select(low, m.constant(int(limits.min)), inside))
        return m.select(self.math.is_nan(x), m.constant(0), value)

    # Arithmetic.

    def binary(self, op: str, a: Id, b: Id, dtype: np.dtype) -> Id:
        """add, mul, max, min, and, or or xor: what reductions are made of, and the rest of `_BINARY`."""
        return _BINARY[op](self, a, b, dtype)

    def apply(self, op: str, args: Sequence[Id], dtypes: Sequence[np.dtype], out: np.dtype, params: dict) -> Id:
        """An elementwise primitive of ELEMENTWISE, on one element."""
        if op in _UNARY_FLOAT:
            return self.rounded(getattr(self.math, op)(args[0]), out)
        if op in _BINARY:
            b = args[1] if op != "pow" else self._exponent(args[1], dtypes[1], dtypes[0])
            return _BINARY[op](self, args[0], b, dtypes[0])
        return _OTHERS[op](self, args, dtypes, out, params)

    def _exponent(self, y: Id, own: np.dtype, base: np.dtype) -> Id:
        return self.convert(y, own, base) if kind(base) == "float" and kind(own) != "float" else y


_Binary = Callable[[Scalars, Id, Id, np.dtype], Id]
_Other = Callable[[Scalars, Sequence[Id], Sequence[np.dtype], np.dtype, dict], Id]


def _by_kind(float_op: Op | None, integer_op: Op, bool_op: Op | None = None) -> _Binary:
    """One instruction for each kind of number."""

    def emit(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
        match kind(dtype):
            case "float":
                return s.rounded(s.m.op(float_op, a, b), dtype)
            case "bool":
                return s.m.op(bool_op, a, b)
        return s.rounded(s.m.op(integer_op, a, b), dtype)

    return emit


def _extreme(name: str, signed: Ext, unsigned: Ext, bool_op: Op) -> _Binary:
    def emit(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
        match kind(dtype):
            case "float":
                return getattr(s.math, name)(a, b)
            case "bool":
                return s.m.op(bool_op, a, b)
            case "signed":
                return s.m.ext(signed, a, b)
        return s.m.ext(unsigned, a, b)

    return emit


def _comparison(float_op: Op, signed: Op, unsigned: Op, bool_op: Op | None = None) -> _Binary:
    def emit(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
        match kind(dtype):
            case "float":
                return s.m.op(float_op, a, b)
            case "bool" if bool_op is not None:
                return s.m.op(bool_op, a, b)
            case "bool":
                a, b = (s.to_word(x, dtype) for x in (a, b))
        return s.m.op(signed if kind(dtype) == "signed" else unsigned, a, b)

    return emit


def _div(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
    """Integers divided by 0 give all ones; the smallest by -1 is itself."""
    m = s.m
    if kind(dtype) == "float":
        return s.rounded(s.math.div(a, b), dtype)
    by_zero, ones = m.op(Op.I_EQUAL, b, m.constant(0)), s.rounded(m.constant(-1), dtype)
    if kind(dtype) == "unsigned":
        return m.select(by_zero, ones, m.op(Op.U_DIV, a, m.select(by_zero, m.constant(1), b)))
    by_minus_one = m.op(Op.I_EQUAL, b, m.constant(-1))
    divisor = m.select(m.op(Op.LOGICAL_OR, by_zero, by_minus_one), m.constant(1), b)
    value = m.select(by_minus_one, m.op(Op.I_SUB, m.constant(0), a), m.op(Op.S_DIV, a, divisor))
    return m.select(by_zero, ones, s.rounded(value, dtype))


def _rem(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
    """By 0 it is the dividend. Not by S_REM, which Vulkan leaves undefined for what is negative."""
    m = s.m
    if kind(dtype) == "float":
        return s.rounded(s.math.rem(a, b), dtype)
    by_zero = m.op(Op.I_EQUAL, b, m.constant(0))
    if kind(dtype) == "unsigned":
        return m.select(by_zero, a, m.op(Op.U_MOD, a, m.select(by_zero, m.constant(1), b)))
    by_minus_one = m.op(Op.I_EQUAL, b, m.constant(-1))
    divisor = m.select(m.op(Op.LOGICAL_OR, by_zero, by_minus_one), m.constant(1), b)
    rest = m.op(Op.I_SUB, a, m.op(Op.I_MUL, m.op(Op.S_DIV, a, divisor), divisor))  # by 1 gives 0, as by -1
    return m.select(by_zero, a, rest)


def _pow(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
    return s.rounded(s.math.pow(a, b), dtype)


def _atan2(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
    return s.rounded(s.math.atan2(a, b), dtype)


def _mulhi(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
    m, signed = s.m, kind(dtype) == "signed"
    if bits_of(dtype) == 32:
        return m.multiply_high(a, b, signed)
    shift = Op.SHIFT_RIGHT_ARITHMETIC if signed else Op.SHIFT_RIGHT_LOGICAL
    return m.op(shift, m.op(Op.I_MUL, a, b), m.constant(bits_of(dtype)), type=m.u32)


def _shift(op: str) -> _Binary:
    """Shifts by the width or more give 0, or the sign."""

    def emit(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
        m, width = s.m, bits_of(dtype)
        amount = s._masked(b, dtype)
        low = m.op(Op.AND, amount, m.constant(31))
        if op == "arithmetic":
            a = s._extended(a, np.dtype(f"int{width}"))
            amount = m.ext(Ext.U_MIN, amount, m.constant(width - 1))
            return s.rounded(m.op(Op.SHIFT_RIGHT_ARITHMETIC, a, amount, type=m.u32), dtype)
        if op == "left":
            value = m.op(Op.SHIFT_LEFT, a, low, type=m.u32)
        else:
            value = m.op(Op.SHIFT_RIGHT_LOGICAL, s._masked(a, dtype), low, type=m.u32)
        too_far = m.op(Op.U_GREATER_EQUAL, amount, m.constant(width))
        return s.rounded(m.select(too_far, m.constant(0), value), dtype)

    return emit


def _nextafter(s: Scalars, a: Id, b: Id, dtype: np.dtype) -> Id:
    """By the bits, in the dtype's own width: comparisons of floats may take subnormal numbers for 0."""
    m = s.m
    sign_bit = 1 << bits_of(dtype) - 1
    here, there = s.to_word(a, dtype), s.to_word(b, dtype)
    sign, size = (m.op(Op.AND, here, m.constant(mask)) for mask in (sign_bit, sign_bit - 1))
    sign_there, size_there = (m.op(Op.AND, there, m.constant(mask)) for mask in (sign_bit, sign_bit - 1))
    zero = m.op(Op.I_EQUAL, size, m.constant(0))
    inwards = m.op(Op.LOGICAL_OR, m.op(Op.I_NOT_EQUAL, sign, sign_there), m.op(Op.U_GREATER, size, size_there))
    moved = m.op(Op.I_ADD, here, m.select(inwards, m.constant(-1), m.constant(1)))
    value = m.select(zero, m.op(Op.OR, sign_there, m.constant(1)), moved)
    both_zero = m.op(Op.I_EQUAL, m.op(Op.OR, size, size_there), m.constant(0))
    equal = m.op(Op.LOGICAL_OR, both_zero, m.op(Op.I_EQUAL, here, there))
    nan = m.op(Op.LOGICAL_OR, s.math.is_nan(a), s.math.is_nan(b))
    return m.select(nan, m.real(float("nan")), s.from_word(m.select(equal, there, value), dtype))


_BINARY: dict[str, _Binary] = {
    "add": _by_kind(Op.F_ADD, Op.I_ADD, Op.LOGICAL_OR),
    "add_any": _by_kind(Op.F_ADD, Op.I_ADD, Op.LOGICAL_OR),
    "sub": _by_kind(Op.F_SUB, Op.I_SUB),
    "mul": _by_kind(Op.F_MUL, Op.I_MUL, Op.LOGICAL_AND),
    "div": _div,
    "rem": _rem,
    "pow": _pow,
    "atan2": _atan2,
    "mulhi": _mulhi,
    "nextafter": _nextafter,
    "max": _extreme("max", Ext.S_MAX, Ext.U_MAX, Op.LOGICAL_OR),
    "min": _extreme("min", Ext.S_MIN, Ext.U_MIN, Op.LOGICAL_AND),
    "and": _by_kind(None, Op.AND, Op.LOGICAL_AND),
    "or": _by_kind(None, Op.OR, Op.LOGICAL_OR),
    "xor": _by_kind(None, Op.XOR, Op.LOGICAL_NOT_EQUAL),
    "eq": _comparison(Op.F_EQUAL, Op.I_EQUAL, Op.I_EQUAL, Op.LOGICAL_EQUAL),
    "ne": _comparison(Op.F_NOT_EQUAL, Op.I_NOT_EQUAL, Op.I_NOT_EQUAL, Op.LOGICAL_NOT_EQUAL),
    "lt": _comparison(Op.F_LESS, Op.S_LESS, Op.U_LESS),
    "le": _comparison(Op.F_LESS_EQUAL, Op.S_LESS_EQUAL, Op.U_LESS_EQUAL),
    "gt": _comparison(Op.F_GREATER, Op.S_GREATER, Op.U_GREATER),
    "ge": _comparison(Op.F_GREATER_EQUAL, Op.S_GREATER_EQUAL, Op.U_GREATER_EQUAL),
    "shift_left": _shift("left"),
    "shift_right_logical": _shift("logical"),
    "shift_right_arithmetic": _shift("arithmetic"),
}

_UNARY_FLOAT = frozenset(
    (
        *("floor", "ceil", "sqrt", "rsqrt", "cbrt", "exp", "exp2"),
        *("expm1", "log", "log1p", "tanh", "logistic", "sinh", "cosh"),
        *("asinh", "acosh", "atanh", "sin", "cos", "tan", "atan"),
        *("asin", "acos", "erf", "erfc", "erf_inv", "lgamma", "digamma"),
    )
)


def _neg(s, args, dtypes, out, params):
    if kind(out) == "float":
        return s.math.neg(args[0])
    return s.rounded(s.m.op(Op.I_SUB, s.m.constant(0), args[0]), out)


def _abs(s, args, dtypes, out, params):
    if kind(out) == "float":
        return s.math.abs(args[0])
    negative = s.m.op(Op.S_LESS, args[0], s.m.constant(0))
    return s.m.select(negative, _neg(s, args, dtypes, out, params), args[0])


def _sign(s, args, dtypes, out, params):
    m, x = s.m, args[0]
    if kind(out) == "float":
        return s.math.sign(x)
    nonzero = m.select(m.op(Op.I_EQUAL, x, m.constant(0)), m.constant(0), m.constant(1))
    if kind(out) == "unsigned":
        return nonzero
    return m.select(m.op(Op.S_LESS, x, m.constant(0)), m.constant(-1), nonzero)


def _not(s, args, dtypes, out, params):
    if kind(out) == "bool":
        return s.m.op(Op.LOGICAL_NOT, args[0])
    return s.rounded(s.m.op(Op.NOT, args[0]), out)


def _round(s, args, dtypes, out, params):
    even = int(params["rounding_method"]) == 1  # lax.RoundingMethod.TO_NEAREST_EVEN
    return s.math.round_even(args[0]) if even else s.math.round_away(args[0])


def _is_finite(s, args, dtypes, out, params):
    return s.math.is_finite(args[0])


def _square(s, args, dtypes, out, params):
    return s.binary("mul", args[0], args[0], out)


def _integer_pow(s, args, dtypes, out, params):
    """By squaring, in f32 for a narrower float."""
    exponent, m = params["y"], s.m
    times = Op.F_MUL if kind(out) == "float" else Op.I_MUL
    value, square, rest = None, args[0], abs(exponent)
    while rest:
        if rest & 1:
            value = square if value is None else m.op(times, value, square)
        rest >>= 1
        if rest:
            square = m.op(times, square, square)
    if value is None:
        return s.constant(1, out)
    return s.rounded(s.math.div(m.real(1), value) if exponent < 0 else value, out)


def _convert(s, args, dtypes, out, params):
    return s.convert(args[0], dtypes[0], out)


def _bitcast(s, args, dtypes, out, params):
    word = s._masked(s.to_word(args[0], dtypes[0]), dtypes[0]) if kind(dtypes[0]) != "bool" else args[0]
    return s.from_word(word, out)


def _select_n(s, args, dtypes, out, params):
    which, cases, m = args[0], args[1:], s.m
    if kind(dtypes[0]) == "bool":
        return m.select(which, cases[-1], cases[0])
    value = cases[-1]
    for i in range(len(cases) - 2, -1, -1):
        value = m.select(m.op(Op.S_LESS_EQUAL, which, m.constant(i)), cases[i], value)
    return value


def _clamp(s, args, dtypes, out, params):
    low, x, high = args
    return s.binary("min", s.binary("max", low, x, out), high, out)


def _reduce_precision(s, args, dtypes, out, params):
    """Rounds as XLA does, by the bits in the dtype's own width: the mantissa goes to the nearest even one.

    Then what is under the smallest normal number of so many exponent bits is 0, and what is over the largest is
    infinite. NaN stays.
    """
    m, (own_exponent, own_mantissa) = s.m, _LAYOUTS[out.name]
    exponent, mantissa = min(params["exponent_bits"], own_exponent), min(params["mantissa_bits"], own_mantissa)
    if (exponent, mantissa) == (own_exponent, own_mantissa):
        return args[0]
    sign = 1 << own_exponent + own_mantissa
    infinity = (1 << own_exponent) - 1 << own_mantissa
    bits = s.to_word(args[0], out)
    value, drop = bits, own_mantissa - mantissa
    if drop:
        last = m.op(Op.AND, m.op(Op.SHIFT_RIGHT_LOGICAL, bits, m.constant(drop), type=m.u32), m.constant(1))
        value = m.op(Op.I_ADD, m.op(Op.I_ADD, bits, last), m.constant((1 << drop - 1) - 1))
        value = m.op(Op.AND, value, m.constant(-1 << drop))
    if exponent < own_exponent:
        bias, own_bias = ((1 << n - 1) - 1 for n in (exponent, own_exponent))
        found = m.op(Op.AND, value, m.constant(infinity))
        zero = m.op(Op.AND, value, m.constant(sign))
        over = m.op(Op.U_GREATER, found, m.constant(own_bias + bias << own_mantissa))
        under = m.op(Op.U_LESS_EQUAL, found, m.constant(own_bias - bias << own_mantissa))
        value = m.select(over, m.op(Op.OR, zero, m.constant(infinity)), value)
        value = m.select(under, zero, value)
    return m.select(s.math.is_nan(args[0]), args[0], s.from_word(s._masked(value, out), out))


def _clz(s, args, dtypes, out, params):
    m, width = s.m, bits_of(out)
    x = s._masked(args[0], out)
    count = m.op(Op.I_SUB, m.constant(width - 1), m.ext(Ext.FIND_U_MSB, x))
    return m.select(m.op(Op.I_EQUAL, x, m.constant(0)), m.constant(width), count)


def _population_count(s, args, dtypes, out, params):
    return s.m.op(Op.BIT_COUNT, s._masked(args[0], out))


_OTHERS: dict[str, _Other] = {
    "neg": _neg,
    "abs": _abs,
    "sign": _sign,
    "not": _not,
    "round": _round,
    "is_finite": _is_finite,
    "square": _square,
    "integer_pow": _integer_pow,
    "convert_element_type": _convert,
    "bitcast_convert_type": _bitcast,
    "select_n": _select_n,
    "clamp": _clamp,
    "reduce_precision": _reduce_precision,
    "clz": _clz,
    "population_count": _population_count,
}

ELEMENTWISE = _UNARY_FLOAT | set(_BINARY) | set(_OTHERS)

_THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(m: Module, k0: Id, k1: Id, x0: Id, x1: Id) -> tuple[Id, Id]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), as `jax.random` has it."""

    def add(a: Id, b: Id) -> Id:
        return m.op(Op.I_ADD, a, b)

    keys = (k0, k1, m.op(Op.XOR, m.op(Op.XOR, k0, k1), m.constant(0x1BD11BDA)))
    x0, x1 = add(x0, k0), add(x1, k1)
    for i in range(5):
        for rotation in _THREEFRY_ROTATIONS[i % 2]:
            x0 = add(x0, x1)
            left = m.op(Op.SHIFT_LEFT, x1, m.constant(rotation), type=m.u32)
            right = m.op(Op.SHIFT_RIGHT_LOGICAL, x1, m.constant(32 - rotation), type=m.u32)
            x1 = m.op(Op.XOR, m.op(Op.OR, left, right), x0)
        x0 = add(x0, keys[(i + 1) % 3])
        x1 = add(add(x1, keys[(i + 2) % 3]), m.constant(i + 1))
    return x0, x1
