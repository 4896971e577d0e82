"""Calls of every JAX primitive that `vk_kernels.jit` knows, over shapes, dtypes, axes and dimension numbers.

Small ones: what they find is in how an element's place is computed and in the edges of a dtype, not in size.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from vk_kernels.compiler.op_call import describe_call
from vk_kernels.runtime.array_spec import ArraySpec

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
FLOATS = (F32, BF16, F16)
SIGNED = tuple(map(np.dtype, (np.int32, np.int8, np.int16)))
UNSIGNED = tuple(map(np.dtype, (np.uint32, np.uint8, np.uint16)))
INTEGERS = SIGNED + UNSIGNED
BOOL = np.dtype(bool)
NUMBERS = FLOATS + INTEGERS
DTYPES = (*NUMBERS, BOOL)

SHAPES = ((3, 5), (), (7,), (2, 0, 3), (1, 37), (2, 3, 4, 5))
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, -3.5, np.inf, -np.inf, np.nan, 1e-30, -1e30, 100.0, -100.0, 3e38], F32
)


@dataclass(frozen=True, eq=False)
class PrimitiveCase:
    """A function of arrays that calls a primitive.

    gradient: whether the gradient by its arrays of floats is compared too. exact: its results are to be XLA's bits.
    """

    primitive: str
    label: str
    fn: Callable[..., Any]
    args: tuple[np.ndarray, ...]
    gradient: bool = False
    exact: bool = False

    def __str__(self) -> str:
        return describe_call(f"{self.primitive} {self.label}", [ArraySpec(x.shape, x.dtype) for x in self.args])


_MAKERS: dict[str, Callable[[str, bool], Iterator[PrimitiveCase]]] = {}


def names(module: str = "") -> list[str]:
    """The primitives that there are cases of; module: that has the cases."""
    return sorted(name for name, make in _MAKERS.items() if make.__module__.endswith(module))


def cases(primitive: str, full: bool = False) -> list[PrimitiveCase]:
    """The cases of a primitive. full: every dtype in every shape; else each comes once and only f32 has gradients."""
    found = list(_MAKERS[primitive](primitive, full))
    return found if full else [replace(case, gradient=case.gradient and _is_single(case)) for case in found]


def _is_single(case: PrimitiveCase) -> bool:
    return all(x.dtype == F32 for x in case.args if x.dtype in FLOATS)


def register(primitives: Sequence[str], make: Callable[[str, bool], Iterator[PrimitiveCase]]) -> None:
    _MAKERS.update(dict.fromkeys(primitives, make))


def together(some: Sequence[Any], others: Sequence[Any], full: bool) -> Iterator[tuple[Any, Any]]:
    """All pairs, or each once."""
    if full:
        return itertools.product(some, others)
    longest = max(len(some), len(others))
    return itertools.islice(zip(itertools.cycle(some), itertools.cycle(others), strict=False), longest)


def draw(shape: Sequence[int], dtype: np.dtype, seed: int = 0, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    """Floats between bounds; integers of all sizes, the extremes among them."""
    rng = np.random.default_rng((seed, *shape))
    if dtype == BOOL:
        return np.asarray(rng.random(shape) < 0.5)
    if dtype in FLOATS:
        return np.asarray(rng.uniform(low, high, shape).astype(dtype))
    limits = np.iinfo(dtype)
    small, large = (
        rng.integers(max(limits.min, -5), 6, shape),
        rng.integers(limits.min, limits.max, shape, endpoint=True),
    )
    values = np.asarray(np.where(rng.random(shape) < 0.5, small, large).astype(dtype))
    if values.size > 2:
        values.flat[:2] = limits.min, limits.max
    return values


def distinct(shape: Sequence[int], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """No two alike, so that extremes and orders have gradients."""
    size = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(size) / 8 - 2).reshape(shape).astype(dtype)


def cases_of(*primitives: str) -> Callable[[Callable], Callable]:
    """Registers a function of (full) that gives (label, fn, args) or (label, fn, args, options)."""

    def decorate(make: Callable[[bool], Iterator[tuple]]) -> Callable:
        def of(name: str, full: bool) -> Iterator[PrimitiveCase]:
            for label, fn, args, *options in make(full):
                yield PrimitiveCase(name, label, fn, tuple(args), **(options[0] if options else {}))

        of.__module__ = make.__module__
        register(primitives, of)
        return make

    return decorate


EXACT, GRADIENT = {"exact": True}, {"gradient": True}
EXACT_GRADIENT = EXACT | GRADIENT
