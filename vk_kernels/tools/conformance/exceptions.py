"""The differences between `vk_kernels.jit` and XLA that are allowed at special values; there are no others."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vk_kernels.tools.conformance.registry import BF16, F16, F32, FLOATS
from vk_kernels.tools.conformance.special_values import Item
from vk_kernels.tools.tolerances import GRADIENT_FACTOR, OUTPUT_FACTOR

# Of finite results, relative to their size.
TOLERANCE = {F32: 1e-5, BF16: 2.0**-7, F16: 2.0**-9}


def alike(x: np.ndarray, y: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Compares two arrays: NaN and infinities in the same places, zeros of the same sign, the rest nearly alike."""
    if dtype not in FLOATS:
        return x == y
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(all="ignore"):
        close = abs(x - y) <= TOLERANCE[dtype] * abs(y)
        same = (x == y) & ((x != 0) | (np.signbit(x) == np.signbit(y)))
    return same | (np.isnan(x) & np.isnan(y)) | (close & np.isfinite(x) & np.isfinite(y) & (x != 0) & (y != 0))


@dataclass(frozen=True, eq=False)
class Difference:
    """Our values and XLA's, for one output of an item."""

    item: Item
    output: int
    found: np.ndarray
    expected: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.found.dtype

    @property
    def elements(self) -> np.ndarray:
        return ~alike(self.found, self.expected, self.dtype)

    @functools.cached_property
    def unfolded(self) -> np.ndarray:
        """XLA's values for one primitive after another, with literals as arguments."""
        return self._eagerly(lambda x: x)

    @functools.cached_property
    def truth(self) -> np.ndarray:
        """The result in float64."""
        return self._in_float64(lambda x: x)

    @functools.cached_property
    def truth_of_zeros(self) -> np.ndarray:
        """The result in float64, with zeros for subnormal operands."""
        return self._in_float64(lambda x: np.where(_subnormal(x, x.dtype), x * 0, x).astype(x.dtype))

    def _in_float64(self, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        with jax.enable_x64(True):
            return self._eagerly(lambda x: change(x).astype(np.float64) if x.dtype in FLOATS else x)

    def _eagerly(self, cast: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        fn, args = (self.item.of, self.item.operands) if self.item.of else (self.item.fn, self.item.args)
        results = jax.tree.leaves(fn(*(jnp.asarray(cast(x)) for x in args)))
        return np.asarray(results[self.output])

    def shown(self, where: np.ndarray) -> str:
        place = tuple(np.argwhere(where)[0])
        given = ", ".join(str(np.broadcast_to(x, self.found.shape)[place]) for x in self.item.operands)
        count = f"{int(where.sum())} of {where.size}"
        at = f"for {given}" if given else f"at {list(map(int, place))}"
        values = f"{self.found[place]}, and XLA has {self.expected[place]}"
        return f"{self.item.dtype} {self.item.label} [{self.output}]: {count}, first {at}: {values}"


@dataclass(frozen=True)
class Allowed:
    """A difference that is no mistake. primitives: of which alone; of all, where there are none.

    Each but the last stands in docs/numbers.md under its name.
    """

    name: str
    holds: Callable[[Difference], np.ndarray]
    primitives: frozenset[str] = frozenset()


_BITS = ("bitcast_convert_type", "nextafter", "reduce_precision")  # what float64 has no truth about


def _accurate(d: Difference) -> np.ndarray:
    """Finite numbers within the tolerance of all other cases: not much further from the truth than XLA's."""
    if d.dtype not in FLOATS or d.item.primitive in _BITS:
        return np.zeros(d.found.shape, bool)
    factor = GRADIENT_FACTOR if d.item.primitive == "gradient" else OUTPUT_FACTOR
    x, y = d.found.astype(np.float64), d.expected.astype(np.float64)
    with np.errstate(all="ignore"):
        allowed = factor * abs(y - d.truth) + TOLERANCE[d.dtype] * abs(d.truth)
        return np.isfinite(x) & np.isfinite(y) & (x != 0) & (abs(x - d.truth) <= allowed)


def _subnormal(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (x != 0) & (abs(x.astype(np.float64)) < float(ml_dtypes.finfo(dtype).smallest_normal))


def _has_subnormal(d: Difference) -> np.ndarray:
    given = [np.broadcast_to(_subnormal(x, x.dtype), d.found.shape) for x in d.item.operands if x.dtype in FLOATS]
    return functools.reduce(np.logical_or, given, np.zeros(d.found.shape, bool))


def _flushed(d: Difference) -> np.ndarray:
    """Subnormal operands or results, kept or taken for 0; or what is nearly 0 for both, with one sign."""
    has = _has_subnormal(d)
    if not d.item.of or d.item.primitive in _BITS:
        return np.zeros(d.found.shape, bool)
    if d.dtype not in FLOATS:
        return has & ((d.found == d.truth) | (d.found == d.truth_of_zeros))
    least = float(ml_dtypes.finfo(d.dtype).smallest_normal)
    with np.errstate(all="ignore"):

        def right(other: np.ndarray) -> np.ndarray:
            nothing = (abs(d.found.astype(np.float64)) < least) & (abs(other.astype(np.float64)) < least)
            return alike(d.found, other.astype(d.dtype), d.dtype) | (
                nothing & (np.signbit(d.found) == np.signbit(other))
            )

        has |= _subnormal(d.truth, d.dtype)
        return has & (right(d.truth) | right(d.truth_of_zeros) | right(d.expected))


def _next(d: Difference) -> np.ndarray:
    """The same, told by the bits."""
    with np.errstate(all="ignore"):
        return _has_subnormal(d) & (d.found == np.nextafter(*d.item.operands))


def _moved(d: Difference) -> np.ndarray:
    """A subnormal literal, kept."""
    return _subnormal(d.found, d.dtype) & (d.expected == 0) & (np.signbit(d.found) == np.signbit(d.expected))


def _pole_at_zero(d: Difference) -> np.ndarray:
    zero = (np.broadcast_to(d.item.operands[0], d.found.shape) == 0) | _has_subnormal(d)
    return zero & np.isneginf(d.found.astype(np.float64)) & np.isnan(d.expected)


def _near_a_zero(d: Difference) -> np.ndarray:
    return abs(d.found.astype(np.float64) - d.truth) <= 1e-6


def _unfolded(d: Difference) -> np.ndarray:
    """Values that XLA itself has where literals are arguments."""
    return alike(d.found, d.unfolded, d.dtype)


def _of_zeros(d: Difference) -> np.ndarray:
    return (d.found == 0) & (d.expected == 0) & _unfolded(d)


def _greater_zero(d: Difference) -> np.ndarray:
    zeros = (d.found == 0) & (d.expected == 0)
    return zeros & (_unfolded(d) | alike(d.found, d.truth.astype(d.dtype), d.dtype))


def _of_literals_alone(d: Difference) -> np.ndarray:
    known = all(x.tobytes() == x.size * x.flat[:1].tobytes() for x in d.item.operands)
    return _unfolded(d) if d.item.of and known else np.zeros(d.found.shape, bool)


def _of_conditions(d: Difference) -> np.ndarray:
    return (np.isnan(d.found) | (d.found == 0)) & (d.expected == 0) & _unfolded(d)


def _of_nan(d: Difference) -> np.ndarray:
    return np.isnan(d.found) & _unfolded(d) if "nan" in d.item.label else np.zeros(d.found.shape, bool)


_EXTREMES = tuple(f"{kind}{name}" for kind in ("", "reduce_", "cum", "scatter_") for name in ("max", "min"))

ALLOWED = (
    Allowed("subnormal numbers", _flushed),
    Allowed("subnormal numbers", _next, frozenset({"nextafter"})),
    Allowed("subnormal numbers", _moved, frozenset({"scatter"})),
    Allowed("digamma at 0", _pole_at_zero, frozenset({"digamma"})),
    Allowed("zeros of the gamma functions", _near_a_zero, frozenset({"lgamma", "digamma"})),
    Allowed("literals alone", _of_literals_alone),
    Allowed("x + 0", _of_zeros, frozenset({"add", "add_any", "sub", "function"})),
    Allowed("division by a literal", _unfolded, frozenset({"div"})),
    Allowed("the greater of two zeros", _greater_zero, frozenset({*_EXTREMES, "clamp"})),
    Allowed("NaN as a literal", _of_nan, frozenset({"function", "gradient"})),
    Allowed("a condition times x", _of_conditions, frozenset({"function", "gradient"})),
    Allowed("no less accurate than XLA", _accurate),
)
