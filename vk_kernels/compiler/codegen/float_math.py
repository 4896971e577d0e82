"""Functions of f32 as SPIR-V instructions, accurate to a few units in the last place on every driver.

GLSL.std.450 allows errors that are too large for us (sin and cos: 2^-11), so only its exact instructions, sqrt and
fma are used (and fma may round twice). NaN is told by its bits, which no compiler may assume away.

Sources: the polynomials of exp, log, sin, cos, tanh and atan on their reduced ranges are those of Moshier's Cephes
library, single precision; erf_inv is M. Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011);
lgamma and digamma are the Lanczos approximation (g = 7, n = 9).
"""

import itertools
import math

import numpy as np

from vk_kernels.spirv.builder import Id, Module
from vk_kernels.spirv.spec import Ext, Op

_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LOG2E = math.log2(math.e)
_LOG2E_HIGH = float(np.float32(_LOG2E))
# pi/2 in pieces of so few bits that small multiples of the first two are exact, also where fma rounds twice.
_HALF_PI = (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8)
_TWO_OVER_PI = (
    0xA2F9836E,
    0x4E441529,
    0xFC2757D1,
    0xF534DDC0,
    0xDB629599,
    0x3C439041,
    0xFE5163AB,
)  # bits after the point
_SMALLEST_NORMAL = 2.0**-126

# Coefficients stand highest power first.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_ATAN = (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1)
_ERF_INV_CENTRE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_ERF_INV_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)
_LANCZOS = (
    *(676.520368121885098567009190444019, -1259.13921672240287047156078755283),
    *(771.3234287776530788486528258894, -176.61502916214059906584551354),
    *(12.507343278686904814458936853, -0.13857109526572011689554706984971),
    *(9.984369578019570859563e-6, 1.50563273514931155834e-7),
)


def _chebyshev(function, low: float, high: float, degree: int) -> tuple[float, ...]:
    """The polynomial through `function` at the Chebyshev points of [low, high]; highest power first."""
    fit = np.polynomial.Chebyshev.interpolate(np.vectorize(function), degree, [low, high])
    return tuple(fit.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist())


# erf(x) = x P(x^2) to 1; erfc(x) = exp(-x^2) Q(1 / (1 + x/2)) from there.
_ERF = _chebyshev(lambda z: math.erf(math.sqrt(z)) / math.sqrt(z), 0.0, 1.0, 7)
_ERFC = _chebyshev(
    lambda t: math.exp((2 / t - 2) ** 2) * math.erfc(2 / t - 2), 1 / (1 + 10.2 / 2), 1 / (1 + 0.9 / 2), 10
)


class FloatMath:
    """Functions of f32 values of one module. The public names are those of JAX's primitives."""

    def __init__(self, module: Module):
        self._m = module

    # Short names for what every formula is made of.

    def _c(self, value: float) -> Id:
        return self._m.real(value)

    def _add(self, a: Id, b: Id) -> Id:
        return self._m.op(Op.F_ADD, a, b)

    def _sub(self, a: Id, b: Id) -> Id:
        return self._m.op(Op.F_SUB, a, b)

    def _mul(self, a: Id, b: Id) -> Id:
        return self._m.op(Op.F_MUL, a, b)

    def div(self, a: Id, b: Id) -> Id:
        """a / b for every b: a driver may divide by way of 1 / b, and its own range is 2^-126 to 2^126 only.

        It may cancel what a and b have in common, too, and x / x is then 1 for 0, infinity and NaN (NVIDIA's, driver
        580.159.04, through the factor): so it does not know what b is made of.
        """
        m = self._m
        known = m.known_real(b)
        if known is not None and 2.0**-100 <= abs(known) <= 2.0**100:
            return m.op(Op.F_DIV, a, b)
        b = m.hidden(b)
        size = self.abs(b)
        large, small = m.op(Op.F_GREATER, size, self._c(2.0**100)), self._less(size, self._c(2.0**-100))
        factor = m.select(large, self._c(2.0**-64), m.select(small, self._c(2.0**64), self._c(1)))
        return self._mul(m.op(Op.F_DIV, a, self._mul(b, factor)), factor)

    def _fma(self, a: Id, b: Id, c: Id) -> Id:
        return self._m.ext(Ext.FMA, a, b, c)

    def _less(self, a: Id, b: Id) -> Id:
        return self._m.op(Op.F_LESS, a, b)

    def _polynomial(self, x: Id, coefficients: tuple[float, ...]) -> Id:
        value = self._c(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self._fma(value, x, self._c(coefficient))
        return value

    def _two_product(self, a: Id, b: Id) -> tuple[Id, Id]:
        """The product and its rounding error, exactly (Dekker): each factor as halves of 12 bits."""
        m = self._m

        def halves(x: Id) -> tuple[Id, Id]:
            high = m.from_bits(m.op(Op.AND, m.bits(x), m.constant(0xFFFFF000)))
            return high, self._sub(x, high)

        product = self._mul(a, b)
        (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
        error = self._sub(self._mul(a_high, b_high), product)
        error = self._add(self._add(error, self._mul(a_high, b_low)), self._mul(a_low, b_high))
        return product, self._add(error, self._mul(a_low, b_low))

    def is_nan(self, x: Id) -> Id:
        m = self._m
        return m.op(Op.U_GREATER, m.op(Op.AND, m.bits(x), m.constant(0x7FFFFFFF)), m.constant(0x7F800000))

    def is_finite(self, x: Id) -> Id:
        m = self._m
        return m.op(Op.U_LESS, m.op(Op.AND, m.bits(x), m.constant(0x7FFFFFFF)), m.constant(0x7F800000))

    def neg(self, x: Id) -> Id:
        m = self._m
        return m.from_bits(m.op(Op.XOR, m.bits(x), m.constant(0x80000000)))

    def abs(self, x: Id) -> Id:
        m = self._m
        return m.from_bits(m.op(Op.AND, m.bits(x), m.constant(0x7FFFFFFF)))

    def _with_sign(self, magnitude: Id, sign_of: Id) -> Id:
        """`magnitude`, which is not negative, with the sign of the other."""
        m = self._m
        sign = m.op(Op.AND, m.bits(sign_of), m.constant(0x80000000))
        return m.from_bits(m.op(Op.OR, m.bits(magnitude), sign))

    def max(self, a: Id, b: Id) -> Id:
        """NaN where either is; 0 is more than -0."""
        m = self._m
        alike = m.from_bits(m.op(Op.AND, m.bits(a), m.bits(b)))  # of zeros, the one that is 0
        value = m.select(m.op(Op.F_EQUAL, a, b), alike, b)
        return self._or_nan(m.select(m.op(Op.F_GREATER, a, b), a, value), a, b)

    def min(self, a: Id, b: Id) -> Id:
        """NaN where either is; -0 is less than 0."""
        m = self._m
        alike = m.from_bits(m.op(Op.OR, m.bits(a), m.bits(b)))
        value = m.select(m.op(Op.F_EQUAL, a, b), alike, b)
        return self._or_nan(m.select(self._less(a, b), a, value), a, b)

    def _or_nan(self, value: Id, *operands: Id) -> Id:
        """NaN where an operand is: a comparison and a select may become an instruction that has no NaN."""
        for x in operands:
            value = self._m.select(self.is_nan(x), x, value)
        return value

    def sign(self, x: Id) -> Id:
        m = self._m
        zero = self._c(0)
        one = self._with_sign(self._c(1), x)
        keep = m.op(Op.LOGICAL_OR, m.op(Op.F_EQUAL, x, zero), self.is_nan(x))
        return m.select(keep, x, one)

    def floor(self, x: Id) -> Id:
        return self._m.ext(Ext.FLOOR, x)

    def ceil(self, x: Id) -> Id:
        return self._m.ext(Ext.CEIL, x)

    def round_even(self, x: Id) -> Id:
        return self._m.ext(Ext.ROUND_EVEN, x)

    def round_away(self, x: Id) -> Id:
        """Halves away from zero."""
        m = self._m
        size = self.abs(x)
        down = m.ext(Ext.FLOOR, size)
        up = m.op(Op.F_GREATER_EQUAL, self._sub(size, down), self._c(0.5))
        return self._with_sign(m.select(up, self._add(down, self._c(1)), down), x)

    def rem(self, x: Id, y: Id) -> Id:
        """The remainder with the sign of x, exactly: long division, some 20 bits of the quotient at a time."""
        m = self._m
        rest, by = self.abs(x), self.abs(y)
        exponent = m.op(Op.SHIFT_RIGHT_LOGICAL, m.bits(by), m.constant(23), type=m.u32)
        for _ in range(14):  # exponents differ by 254 at most, or 277 for what is not normal
            ahead = m.op(Op.SHIFT_RIGHT_LOGICAL, m.bits(rest), m.constant(23), type=m.u32)
            shift = m.op(Op.I_SUB, m.op(Op.I_SUB, ahead, exponent), m.constant(20))
            power = m.op(Op.S_TO_F, m.ext(Ext.S_MAX, shift, m.constant(0)))
            step = self._scale(by, power)
            quotient = m.ext(Ext.TRUNC, self.div(rest, step))
            product, error = self._two_product(quotient, step)
            rest = self._sub(self._sub(rest, product), error)
            rest = m.select(self._less(rest, self._c(0)), self._add(rest, step), rest)
            rest = m.select(m.op(Op.F_GREATER_EQUAL, rest, step), self._sub(rest, step), rest)
        infinite = m.op(Op.LOGICAL_AND, self.is_finite(x), m.op(Op.F_EQUAL, by, self._c(math.inf)))
        undefined = m.op(Op.LOGICAL_NOT, self.is_finite(x))
        for condition in (m.op(Op.F_EQUAL, by, self._c(0)), self.is_nan(y)):
            undefined = m.op(Op.LOGICAL_OR, undefined, condition)
        value = m.select(undefined, self._c(math.nan), self._with_sign(rest, x))
        return m.select(infinite, x, value)

    def sqrt(self, x: Id) -> Id:
        return self._m.ext(Ext.SQRT, x)

    def rsqrt(self, x: Id) -> Id:
        return self._m.ext(Ext.INVERSE_SQRT, x)

    def cbrt(self, x: Id) -> Id:
        m = self._m
        size = self.abs(x)
        guess = m.op(Op.I_ADD, m.op(Op.U_DIV, m.bits(size), m.constant(3)), m.constant(0x2A5137A0))
        y = m.from_bits(guess)
        third = self._c(1 / 3)
        for _ in range(4):
            y = self._sub(y, self._mul(self._sub(y, self.div(size, self._mul(y, y))), third))
        usual = m.op(Op.LOGICAL_AND, self.is_finite(x), m.op(Op.F_GREATER, size, self._c(0)))
        return m.select(usual, self._with_sign(y, x), x)

    # Exponentials and logarithms.

    def _scale(self, x: Id, power: Id) -> Id:
        """x 2^power, for a float `power` that is an integer; in two steps, so that no factor overflows."""
        m = self._m
        n = m.op(Op.F_TO_S, power)
        half = m.op(Op.SHIFT_RIGHT_ARITHMETIC, n, m.constant(1), type=m.u32)
        for part in (half, m.op(Op.I_SUB, n, half)):
            x = self._mul(x, self._power_of_two(part))
        return x

    def _power_of_two(self, n: Id) -> Id:
        """2^n, for an integer n of -126 to 127."""
        m = self._m
        return m.from_bits(m.op(Op.SHIFT_LEFT, m.op(Op.I_ADD, n, m.constant(127)), m.constant(23)))

    def _clamped(self, x: Id, low: float, high: float) -> Id:
        """NaN stays NaN."""
        m = self._m
        value = m.select(self._less(x, self._c(low)), self._c(low), x)
        return self._or_nan(m.select(m.op(Op.F_GREATER, value, self._c(high)), self._c(high), value), x)

    def _exp_reduced(self, r: Id) -> Id:
        """exp, for |r| <= ln(2) / 2."""
        return self._add(self._fma(self._mul(r, r), self._polynomial(r, _EXP), r), self._c(1))

    def exp(self, x: Id) -> Id:
        n, r = self._reduced(self._clamped(x, -104, 89))
        return self._scale(self._exp_reduced(r), n)

    def _reduced(self, x: Id) -> tuple[Id, Id]:
        """(n, r): x = n ln(2) + r, with an integer n and |r| <= ln(2) / 2."""
        n = self.round_even(self._mul(x, self._c(_LOG2E)))
        return n, self._fma(n, self._c(-_LN2_LOW), self._fma(n, self._c(-_LN2_HIGH), x))

    def exp2(self, x: Id) -> Id:
        x = self._clamped(x, -151, 129)
        n = self.round_even(x)
        return self._scale(self._exp_reduced(self._mul(self._sub(x, n), self._c(math.log(2)))), n)

    def expm1(self, x: Id) -> Id:
        """(e^x - 1) x / log(e^x): the errors of e^x cancel (Kahan)."""
        m = self._m
        e = self.exp(x)
        less = self._sub(e, self._c(1))
        value = self._mul(less, self.div(x, self.log(e)))
        value = m.select(m.op(Op.F_EQUAL, e, self._c(1)), x, value)
        value = m.select(m.op(Op.F_EQUAL, less, self._c(-1)), less, value)
        return m.select(m.op(Op.F_GREATER, x, self._c(40)), e, value)

    def _split(self, x: Id) -> tuple[Id, Id]:
        """(f, e): x = (1 + f) 2^e with 1 + f between the roots of 1/2 and 2; for positive finite x."""
        m = self._m
        tiny = self._less(x, self._c(_SMALLEST_NORMAL))
        bits = m.bits(m.select(tiny, self._mul(x, self._c(2.0**23)), x))
        shifted = m.op(Op.I_SUB, bits, m.constant(0x3F3504F3))
        e = m.op(Op.S_TO_F, m.op(Op.SHIFT_RIGHT_ARITHMETIC, shifted, m.constant(23), type=m.u32))
        e = m.select(tiny, self._sub(e, self._c(23)), e)
        mantissa = m.op(Op.AND, shifted, m.constant(0x007FFFFF))
        one_f = m.from_bits(m.op(Op.I_ADD, mantissa, m.constant(0x3F3504F3)))
        return self._sub(one_f, self._c(1)), e

    def log(self, x: Id) -> Id:
        m = self._m
        f, e = self._split(x)
        z = self._mul(f, f)
        y = self._mul(self._mul(f, z), self._polynomial(f, _LOG))
        y = self._fma(e, self._c(_LN2_LOW), y)
        y = self._fma(z, self._c(-0.5), y)
        value = self._fma(e, self._c(_LN2_HIGH), self._add(f, y))
        value = m.select(self._less(x, self._c(0)), self._c(math.nan), value)
        value = m.select(m.op(Op.F_EQUAL, x, self._c(0)), self._c(-math.inf), value)
        greatest = m.op(Op.LOGICAL_OR, m.op(Op.F_EQUAL, x, self._c(math.inf)), self.is_nan(x))
        return m.select(greatest, x, value)

    def log1p(self, x: Id) -> Id:
        """log(1 + x) x / ((1 + x) - 1) (Kahan)."""
        m = self._m
        u = self._add(x, self._c(1))
        value = self._mul(self.log(u), self.div(x, self._sub(u, self._c(1))))
        value = m.select(m.op(Op.F_EQUAL, u, self._c(1)), x, value)
        infinite = m.op(Op.F_EQUAL, u, self._c(math.inf))
        return m.select(infinite, u, m.select(m.op(Op.F_EQUAL, u, self._c(0)), self._c(-math.inf), value))

    def pow(self, x: Id, y: Id) -> Id:
        """2^(y log2|x|), the logarithm and the product with twice the digits, and the cases of C's pow."""
        m, c = self._m, self._c
        size = self.abs(x)
        f, e = self._split(size)
        d = self._add(c(2), f)  # log(1 + f) = 2 atanh(s), s = f / (2 + f)
        d_low = self._sub(f, self._sub(d, c(2)))
        s = self.div(f, d)
        product, error = self._two_product(s, d)
        rest = self._sub(self._sub(f, product), error)
        s_low = self.div(self._sub(rest, self._mul(s, d_low)), d)
        z = self._mul(s, s)
        series = self._polynomial(z, (2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))
        high = self._mul(c(2), s)
        low = self._fma(self._mul(s, z), series, self._mul(c(2), s_low))
        p, p_low = self._two_product(high, c(_LOG2E_HIGH))
        p_low = self._fma(high, c(_LOG2E - _LOG2E_HIGH), self._fma(low, c(_LOG2E), p_low))
        t = self._add(e, p)
        t_low = self._add(self._sub(p, self._sub(t, e)), p_low)
        q, q_low = self._two_product(y, t)
        q_low = self._fma(y, t_low, q_low)
        inside = self._less(self.abs(q), c(200))
        q, q_low = self._clamped(q, -200, 200), m.select(inside, q_low, c(0))
        n = self.round_even(q)
        r = self._mul(self._add(self._sub(q, n), q_low), c(math.log(2)))
        value = self._scale(self._exp_reduced(r), n)
        # Zero and infinity go up or down with the sign of y; so do all finite values for an infinite y.
        is_zero, is_infinite = m.op(Op.F_EQUAL, size, c(0)), m.op(Op.F_EQUAL, size, c(math.inf))
        up = m.op(Op.LOGICAL_NOT_EQUAL, is_zero, m.op(Op.F_GREATER, y, c(0)))
        extreme = m.select(up, c(math.inf), c(0))
        value = m.select(m.op(Op.LOGICAL_OR, is_zero, is_infinite), extreme, value)
        y_infinite = m.op(Op.F_EQUAL, self.abs(y), c(math.inf))
        grows = m.op(Op.LOGICAL_EQUAL, self._less(c(1), size), m.op(Op.F_GREATER, y, c(0)))
        value = m.select(y_infinite, m.select(grows, c(math.inf), c(0)), value)
        # The sign: negative x to an odd integer is negative, to no integer is NaN.
        whole = m.op(Op.F_EQUAL, m.ext(Ext.TRUNC, y), y)
        half = self._mul(y, c(0.5))
        odd = m.op(Op.LOGICAL_AND, whole, m.op(Op.F_NOT_EQUAL, m.ext(Ext.TRUNC, half), half))
        negative = m.op(Op.I_NOT_EQUAL, m.op(Op.AND, m.bits(x), m.constant(0x80000000)), m.constant(0))
        value = m.select(m.op(Op.LOGICAL_AND, odd, negative), self.neg(value), value)
        below = m.op(Op.LOGICAL_AND, self._less(x, c(0)), m.op(Op.LOGICAL_NOT, is_infinite))
        value = m.select(m.op(Op.LOGICAL_AND, below, m.op(Op.LOGICAL_NOT, whole)), c(math.nan), value)
        value = m.select(m.op(Op.LOGICAL_OR, self.is_nan(x), self.is_nan(y)), c(math.nan), value)
        y_infinite_at_one = m.op(Op.LOGICAL_AND, y_infinite, m.op(Op.F_EQUAL, size, c(1)))
        one = m.op(Op.LOGICAL_OR, m.op(Op.F_EQUAL, x, c(1)), m.op(Op.F_EQUAL, y, c(0)))
        return m.select(m.op(Op.LOGICAL_OR, one, y_infinite_at_one), c(1), value)

    # Hyperbolic functions and what is made of exponentials.

    def tanh(self, x: Id) -> Id:
        m = self._m
        size, z = self.abs(x), self._mul(x, x)
        near = self._fma(self._mul(self._polynomial(z, _TANH), z), size, size)
        # 1 from 9.01 on, so that e^2x is a normal number, and e^2x + 1 one that every driver divides by.
        double = self._add(size, size)
        n, r = self._reduced(self._or_nan(m.select(self._less(double, self._c(20)), double, self._c(20)), double))
        e = self._mul(self._exp_reduced(r), self._power_of_two(m.op(Op.F_TO_S, n)))
        far = self._sub(self._c(1), m.op(Op.F_DIV, self._c(2), self._add(e, self._c(1))))
        return self._with_sign(m.select(self._less(size, self._c(0.625)), near, far), x)

    def logistic(self, x: Id) -> Id:
        return self.div(self._c(1), self._add(self._c(1), self.exp(self.neg(x))))

    def sinh(self, x: Id) -> Id:
        size = self.abs(x)
        less = self.expm1(size)
        near = self._mul(self._c(0.5), self._add(less, self.div(less, self._add(less, self._c(1)))))
        far = self.exp(self._sub(size, self._c(math.log(2))))
        return self._with_sign(self._m.select(self._less(size, self._c(20)), near, far), x)

    def cosh(self, x: Id) -> Id:
        half = self.exp(self._sub(self.abs(x), self._c(math.log(2))))
        return self._add(half, self.div(self._c(0.25), half))

    def asinh(self, x: Id) -> Id:
        size = self.abs(x)
        z = self._mul(size, size)
        root = self._add(self._c(1), self.sqrt(self._add(z, self._c(1))))
        near = self.log1p(self._add(size, self.div(z, root)))
        far = self._add(self.log(size), self._c(math.log(2)))
        return self._with_sign(self._m.select(self._less(size, self._c(1e9)), near, far), x)

    def acosh(self, x: Id) -> Id:
        m, t = self._m, self._sub(x, self._c(1))
        near = self.log1p(self._add(t, self.sqrt(self._mul(t, self._add(t, self._c(2))))))
        far = self._add(self.log(x), self._c(math.log(2)))
        value = m.select(m.op(Op.F_GREATER, x, self._c(1e9)), far, near)
        return m.select(self._less(x, self._c(1)), self._c(math.nan), value)

    def atanh(self, x: Id) -> Id:
        return self._mul(self._c(0.5), self._sub(self.log1p(x), self.log1p(self.neg(x))))

    # Trigonometry.

    def _sin_cos(self, x: Id) -> tuple[Id, Id, Id]:
        """(sin r, cos r, n) with x = r + n pi/2 and |r| <= pi/4, n as an integer."""
        m = self._m
        turns = self.round_even(self._mul(x, self._c(2 / math.pi)))
        r = x
        for part in _HALF_PI:
            r = self._sub(r, self._mul(turns, self._c(part)))
        n = m.op(Op.F_TO_S, turns)
        far_r, far_n = self._reduced_far(x)
        far = m.op(Op.F_GREATER, self.abs(x), self._c(2.0**13))
        r, n = m.select(far, far_r, r), m.select(far, far_n, n)
        z = self._mul(r, r)
        sine = self._fma(self._mul(self._polynomial(z, _SIN), z), r, r)
        cosine = self._fma(z, self._c(-0.5), self._mul(self._mul(z, z), self._polynomial(z, _COS)))
        finite = self.is_finite(x)
        sine = m.select(finite, sine, self._c(math.nan))
        return sine, m.select(finite, self._add(cosine, self._c(1)), self._c(math.nan)), n

    def _reduced_far(self, x: Id) -> tuple[Id, Id]:
        """(r, n) for |x| >= 2^13: x/(2 pi) modulo 1 as an integer of 64 bits (Payne and Hanek).

        With x = M 2^E, that is M times the bits of (2/pi) 2^(E-2) after the point, of which 96 are enough.
        """
        m = self._m

        def op(code: Op, a: Id, b: Id) -> Id:
            return m.op(code, a, b, type=m.u32)

        bits = m.bits(self.abs(x))
        mantissa = m.op(Op.OR, m.op(Op.AND, bits, m.constant(0x007FFFFF)), m.constant(0x00800000))
        # E = exponent - 150; the first bit wanted is E - 2, counted with a word of zeros before the point.
        first = op(Op.I_SUB, op(Op.SHIFT_RIGHT_LOGICAL, bits, m.constant(23)), m.constant(150 + 2 - 32))
        word, shift = op(Op.SHIFT_RIGHT_LOGICAL, first, m.constant(5)), op(Op.AND, first, m.constant(31))
        table = (0, *_TWO_OVER_PI)

        def pick(offset: int) -> Id:
            found = m.constant(table[offset])
            for i in range(1, 5):
                found = m.select(m.op(Op.I_EQUAL, word, m.constant(i)), m.constant(table[i + offset]), found)
            return found

        words = [pick(offset) for offset in range(4)]
        window = []
        for high, low in itertools.pairwise(words):
            below = op(Op.SHIFT_RIGHT_LOGICAL, low, m.constant(1))
            below = op(Op.SHIFT_RIGHT_LOGICAL, below, op(Op.I_SUB, m.constant(31), shift))
            window.append(op(Op.OR, op(Op.SHIFT_LEFT, high, shift), below))
        carry = m.multiply_high(mantissa, window[2], signed=False)
        low = op(Op.I_ADD, op(Op.I_MUL, mantissa, window[1]), carry)
        over = m.select(m.op(Op.U_LESS, low, carry), m.constant(1), m.constant(0))
        high = op(Op.I_ADD, op(Op.I_MUL, mantissa, window[0]), m.multiply_high(mantissa, window[1], signed=False))
        high = op(Op.I_ADD, high, over)
        n = op(Op.SHIFT_RIGHT_LOGICAL, op(Op.I_ADD, high, m.constant(0x20000000)), m.constant(30))
        left = op(Op.I_SUB, high, op(Op.SHIFT_LEFT, n, m.constant(30)))
        turn = self._mul(m.op(Op.S_TO_F, left), self._c(2.0**-32))
        turn = self._add(turn, self._mul(m.op(Op.U_TO_F, low), self._c(2.0**-64)))
        r = self._mul(turn, self._c(2 * math.pi))
        negative = self._less(x, self._c(0))
        return m.select(negative, self.neg(r), r), m.select(negative, op(Op.I_SUB, m.constant(0), n), n)

    def _quadrant(self, sine: Id, cosine: Id, n: Id) -> Id:
        """The sine after n quarter turns."""
        m = self._m
        odd = m.op(Op.I_NOT_EQUAL, m.op(Op.AND, n, m.constant(1)), m.constant(0))
        back = m.op(Op.I_NOT_EQUAL, m.op(Op.AND, n, m.constant(2)), m.constant(0))
        value = m.select(odd, cosine, sine)
        return m.select(back, self.neg(value), value)

    def sin(self, x: Id) -> Id:
        """0 has its own sign."""
        return self._m.select(self._m.op(Op.F_EQUAL, x, self._c(0)), x, self._quadrant(*self._sin_cos(x)))

    def cos(self, x: Id) -> Id:
        sine, cosine, n = self._sin_cos(x)
        return self._quadrant(sine, cosine, self._m.op(Op.I_ADD, n, self._m.constant(1)))

    def tan(self, x: Id) -> Id:
        return self.div(self.sin(x), self.cos(x))

    def atan(self, x: Id) -> Id:
        m, c = self._m, self._c
        size = self.abs(x)
        large, middle = (
            m.op(Op.F_GREATER, size, c(math.tan(3 * math.pi / 8))),
            m.op(Op.F_GREATER, size, c(0.41421356)),
        )
        turned = m.select(middle, self.div(self._sub(size, c(1)), self._add(size, c(1))), size)
        turned = m.select(large, self.div(c(-1), size), turned)
        base = m.select(large, c(math.pi / 2), m.select(middle, c(math.pi / 4), c(0)))
        z = self._mul(turned, turned)
        value = self._fma(self._mul(self._polynomial(z, _ATAN), z), turned, turned)
        return self._with_sign(self._add(base, value), x)

    def atan2(self, y: Id, x: Id) -> Id:
        m, c = self._m, self._c
        up, across = self.abs(y), self.abs(x)
        equal = m.op(Op.F_EQUAL, up, across)  # both 0 or both infinite too
        ratio = m.select(equal, m.select(m.op(Op.F_EQUAL, up, c(0)), c(0), c(1)), self.div(up, across))
        angle = self.atan(ratio)
        negative = m.op(Op.I_NOT_EQUAL, m.op(Op.AND, m.bits(x), m.constant(0x80000000)), m.constant(0))
        angle = m.select(negative, self._sub(c(math.pi), angle), angle)
        value = self._with_sign(angle, y)
        return m.select(m.op(Op.LOGICAL_OR, self.is_nan(x), self.is_nan(y)), c(math.nan), value)

    def asin(self, x: Id) -> Id:
        root = self.sqrt(self._mul(self._sub(self._c(1), x), self._add(self._c(1), x)))
        return self._mul(self._c(2), self.atan2(x, self._add(self._c(1), root)))

    def acos(self, x: Id) -> Id:
        root = self.sqrt(self._mul(self._sub(self._c(1), x), self._add(self._c(1), x)))
        angle = self._mul(self._c(2), self.atan2(root, self._add(self._c(1), x)))
        return self._m.select(self._m.op(Op.F_EQUAL, x, self._c(-1)), self._c(math.pi), angle)

    # The error function and the gamma function.

    def _erfc_far(self, size: Id) -> Id:
        """erfc, for size >= 0.9. The square of `size` is split, so that its error is not magnified by exp."""
        size = self._clamped(size, 0.9, 10.2)
        z, z_low = self._two_product(size, size)
        e = self.exp(self.neg(z))
        e = self._sub(e, self._mul(e, z_low))
        t = self.div(self._c(1), self._fma(size, self._c(0.5), self._c(1)))
        return self._mul(e, self._polynomial(t, _ERFC))

    def erf(self, x: Id) -> Id:
        size = self.abs(x)
        near = self._mul(size, self._polynomial(self._mul(x, x), _ERF))
        far = self._sub(self._c(1), self._erfc_far(size))
        value = self._with_sign(self._m.select(self._less(size, self._c(1)), near, far), x)
        return self._m.select(self.is_nan(x), x, value)

    def erfc(self, x: Id) -> Id:
        m = self._m
        far = self._erfc_far(self.abs(x))
        far = m.select(self._less(x, self._c(0)), self._sub(self._c(2), far), far)
        near = self._sub(self._c(1), self._mul(x, self._polynomial(self._mul(x, x), _ERF)))
        value = m.select(self._less(self.abs(x), self._c(1)), near, far)
        return m.select(self.is_nan(x), x, value)

    def erf_inv(self, x: Id) -> Id:
        m = self._m
        w = self.neg(self.log1p(self.neg(self._mul(x, x))))
        centre = self._polynomial(self._sub(w, self._c(2.5)), _ERF_INV_CENTRE)
        tail = self._polynomial(self._sub(self.sqrt(w), self._c(3)), _ERF_INV_TAIL)
        value = self._mul(m.select(self._less(w, self._c(5)), centre, tail), x)
        end = m.op(Op.F_EQUAL, self.abs(x), self._c(1))
        return m.select(end, self._mul(x, self._c(math.inf)), value)

    def _lanczos(self, x: Id) -> tuple[Id, Id, Id]:
        """(z, series, its derivative): Gamma(z + 1) is made of them; z = x - 1, or -x left of 1/2."""
        m, c = self._m, self._c
        z = m.select(self._less(x, c(0.5)), self.neg(x), self._sub(x, c(1)))
        series, slope = c(0.99999999999980993227684700473478), c(0)
        for i, coefficient in enumerate(_LANCZOS):
            below = self._add(z, c(i + 1))
            term = self.div(c(coefficient), below)
            series, slope = self._add(series, term), self._sub(slope, self.div(term, below))
        return z, series, slope

    def lgamma(self, x: Id) -> Id:
        m, c = self._m, self._c
        z, series, _ = self._lanczos(x)
        log_t = self._add(c(math.log(7.5)), self.log1p(self.div(z, c(7.5))))
        t = self._add(c(7.5), z)
        body = self._mul(self._sub(self._add(z, c(0.5)), self.div(t, log_t)), log_t)
        value = self._add(c(math.log(2 * math.pi) / 2), self._add(body, self.log(series)))
        size = self.abs(x)
        fraction = self._sub(size, self.floor(size))
        fraction = m.select(m.op(Op.F_GREATER, fraction, c(0.5)), self._sub(c(1), fraction), fraction)
        reflected = self.log(self.sin(self._mul(c(math.pi), fraction)))
        reflected = m.select(
            self.is_finite(reflected),
            self._sub(self._sub(c(math.log(math.pi)), reflected), value),
            self.neg(reflected),
        )
        value = m.select(self._less(x, c(0.5)), reflected, value)
        return m.select(m.op(Op.F_EQUAL, size, c(math.inf)), c(math.inf), value)

    def digamma(self, x: Id) -> Id:
        m, c = self._m, self._c
        z, series, slope = self._lanczos(x)
        log_t = self._add(c(math.log(7.5)), self.log1p(self.div(z, c(7.5))))
        value = self._sub(self._add(log_t, self.div(slope, series)), self.div(c(7), self._add(z, c(7.5))))
        fraction = self._mul(c(math.pi), self._add(x, self.abs(self.floor(self._add(x, c(0.5))))))
        reflected = self._sub(value, self.div(self._mul(c(math.pi), self.cos(fraction)), self.sin(fraction)))
        value = m.select(self._less(x, c(0.5)), reflected, value)
        pole = m.op(Op.LOGICAL_AND, m.op(Op.F_LESS_EQUAL, x, c(0)), m.op(Op.F_EQUAL, self.floor(x), x))
        at_zero = m.op(Op.F_EQUAL, x, c(0))
        return m.select(at_zero, c(-math.inf), m.select(pole, c(math.nan), value))  # at 0 as XLA from jax 0.11 on
