"""Runs cases through `vk_kernels.jit` and through XLA, many in one program, and says how they differ."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vk_kernels
from vk_kernels.errors import UnsupportedError
from vk_kernels.tools.conformance.registry import FLOATS, PrimitiveCase
from vk_kernels.tools.tolerances import GRADIENT_FACTOR, OUTPUT_FACTOR, SLACK

PROGRAM = 24  # cases in one
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

OutputsAndGradients = tuple[list[Any], list[Any]]  # outputs, gradients


def results(case: PrimitiveCase, *args: Any) -> OutputsAndGradients:
    """The outputs of a case, and the gradients of a fixed combination of them, as flat lists."""
    if not case.gradient:
        return jax.tree.leaves(case.fn(*args)), []
    floats = [i for i, x in enumerate(case.args) if x.dtype in FLOATS]

    def of_floats(*chosen: Any) -> tuple:
        whole = list(args)
        for i, x in zip(floats, chosen, strict=True):
            whole[i] = x
        found = jax.tree.leaves(case.fn(*whole))
        return [x for x in found if _is_float(x)], found

    outs, pull, found = jax.vjp(of_floats, *(jnp.asarray(args[i]) for i in floats), has_aux=True)
    return found, list(pull([_weights(x) for x in outs]))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _weights(x: Any) -> Any:
    """The weights of a combination of an array's elements: a few small numbers in turn."""
    return ((jnp.arange(x.size) % 7 - 3) / 4).reshape(x.shape).astype(x.dtype)


def check(cases: Sequence[PrimitiveCase], device: str | None = None) -> dict[PrimitiveCase, str]:
    """The fault of each case; those that pass are absent. device: as for `vk_kernels.use`."""
    wrong: dict[PrimitiveCase, str] = {}
    for start in range(0, len(cases), PROGRAM):
        wrong |= _check_program(cases[start : start + PROGRAM], device)
    return wrong


def _check_program(cases: Sequence[PrimitiveCase], device: str | None) -> dict[PrimitiveCase, str]:
    arguments = [case.args for case in cases]

    def program(arguments: Any) -> list[OutputsAndGradients]:
        return [results(case, *args) for case, args in zip(cases, arguments, strict=True)]

    try:
        found = vk_kernels.jit(program, device=device)(arguments)
    except UnsupportedError as error:
        if len(cases) == 1:
            return {cases[0]: str(error)}
        alone = (_check_program([case], device) for case in cases)
        return {case: message for wrong in alone for case, message in wrong.items()}
    expected = jax.jit(program).lower(arguments).compile(QUICK_TO_COMPILE)(arguments)
    differences = ((case, _difference(case, *both)) for case, *both in zip(cases, found, expected, strict=True))
    return {case: message for case, message in differences if message}


def _difference(case: PrimitiveCase, found: OutputsAndGradients, expected: OutputsAndGradients) -> str:
    """Empty where there is none that matters."""
    for kind, some, others in zip(("output", "gradient"), found, expected, strict=True):
        for i, (x, y) in enumerate(zip(some, others, strict=True)):
            if described(x) != described(y):
                return f"{kind} {i} is {described(x)}, and XLA's is {described(y)}"
            if message := _distance(case, kind, i, np.asarray(x), np.asarray(y)):
                return f"{kind} {i}: {message}"
    return ""


def described(x: Any) -> str:
    return x.aval.str_short() + ("*" if x.aval.weak_type else "")


def _distance(case: PrimitiveCase, kind: str, i: int, x: np.ndarray, y: np.ndarray) -> str:
    if (case.exact and kind == "output") or not _is_float(x):
        same = (x == y) | ((x != x) & (y != y))
        return "" if np.all(same) else _shown(x, y, ~same)
    if not np.array_equal(np.isnan(x), np.isnan(y)):
        return "NaN elsewhere: " + _shown(x, y, np.isnan(x) != np.isnan(y))
    wide, other = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):
        close = (wide == other) | np.isnan(x) | (abs(wide - other) <= SLACK * _unit(other))
    if np.all(close):
        return ""
    with jax.enable_x64(True):  # the float64 truth decides
        args = [x.astype(np.float64) if x.dtype in FLOATS else x for x in case.args]
        truth = np.asarray(jax.jit(lambda *args: results(case, *args))(*args)[kind == "gradient"][i], np.float64)
    factor = OUTPUT_FACTOR if kind == "output" else GRADIENT_FACTOR
    error, xla_error = (_error(z, truth, other) for z in (wide, other))
    allowed = factor * xla_error + SLACK
    return "" if error <= allowed else f"an error of {error:.2e}, allowed {allowed:.2e}: " + _shown(x, y, ~close)


def _unit(truth: np.ndarray) -> np.ndarray:
    """The unit of the slack: the element, or 1 if it is less."""
    return np.maximum(np.abs(np.where(np.isfinite(truth), truth, 1)), 1)


def _error(x: np.ndarray, truth: np.ndarray, xla: np.ndarray) -> float:
    """The largest of elements that are finite in XLA and in truth; infinite where others are not XLA's."""
    finite = np.isfinite(truth) & np.isfinite(xla)
    with np.errstate(all="ignore"):
        other = np.where((x == xla) | np.isnan(xla), 0, np.inf)
        return float(np.max(np.where(finite, abs(x - truth) / _unit(truth), other), initial=0))


def _shown(x: np.ndarray, y: np.ndarray, where: np.ndarray) -> str:
    places = np.argwhere(where)
    first = tuple(places[0])
    return f"{len(places)} of {x.size}, first at {list(map(int, first))}: {x[first]}, and XLA has {y[first]}"
