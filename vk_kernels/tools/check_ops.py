"""Compares every kernel with a float64 truth and with XLA, on whatever device is present.

    python -m vk_kernels.tools.check_ops [--ops matmul,attention] [--sizes tiny,chat] [--device cpu] [--quick]

A result passes if its error is at most twice that of the XLA implementation at the same precision (three times for
gradients), plus 1e-5, and plausible for its precision, which catches a truth that is itself wrong. Errors are the
largest of any element, in units of the truth's largest element.
Exit code: 0 if everything passed, else 1.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.bridge.custom_call import counts
from vk_kernels.bridge.use import use
from vk_kernels.errors import FeatureError, NoDeviceError
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.tools.arguments import BAD_INPUT, ArgumentParser, run_tool
from vk_kernels.tools.op_cases import BF16, CASES, F32, SIZES, OpCase, Operands
from vk_kernels.tools.tolerances import GRADIENT_FACTOR, OUTPUT_FACTOR, SLACK

VARIANTS = ("coop2", "coop1", "plain")
PLAUSIBLE = {F32: 1e-4, BF16: 5e-2}
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}

HEADER = f"{'operation':<34} {'size':<9} {'dtype':<8} {'variant':<8} {'of':<9} {'error':>9} {'XLA':>9} {'limit':>9}"


@dataclass(frozen=True)
class Result:
    """The worst output, or the worst gradient, of a case run by one variant."""

    case: OpCase
    size: str
    dtype: str
    variant: str
    of: str  # 'output' or 'gradient', and its index
    error: float
    xla_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # not so for NaN

    def __str__(self) -> str:
        numbers = f"{self.error:9.2e} {self.xla_error:9.2e} {self.limit:9.2e}"
        where = f"{self.case.label:<34} {self.size:<9} {self.dtype:<8} {self.variant:<8} {self.of:<9}"
        return f"{where} {numbers} {'pass' if self.passed else 'FAIL'}"


class Deviation(NamedTuple):
    """Distance of one output or gradient of a variant from the truth, and the largest one allowed."""

    variant: str
    of: str  # 'output' or 'gradient', and its index
    error: float
    xla_error: float
    allowed: float


def check(case: OpCase, size: str, dtype: np.dtype, device: str | None = None) -> Iterator[Result]:
    """Runs a case with each variant that the device offers for it; raises as `compare`."""
    differences = compare(case, [case.operands(SIZES[size], dtype)], device)
    for _, group in itertools.groupby(differences, key=lambda found: (found.variant, found.of.split()[0])):
        rows = [
            Result(case, size, dtype.name, *found[:-1], limit=min(found.allowed, PLAUSIBLE[dtype])) for found in group
        ]
        yield max(rows, key=lambda row: np.nan_to_num(row.error / row.limit, nan=np.inf))


def compare(
    case: OpCase,
    draws: Sequence[Operands],
    device: str | None = None,
    *,
    variants: Sequence[str] = VARIANTS,
    unit: float = 0.0,
    few: bool = False,
    compiler_options: dict[str, Any] | None = None,
) -> Iterator[Deviation]:
    """Runs a case on some operands, all of the same shapes, with each of `variants` that the device offers for them.

    An error is the largest of any draw. It is in units of the truth's largest element, or of `unit` if that is more:
    where terms of that size cancel, what is left of them does not say how exact a result can be. few: of elements, so
    that XLA's error may be next to nothing by chance: it counts for half a unit in the last place at least.
    compiler_options: XLA's, for its implementation.

    Raises RuntimeError if no kernel ran though there was something to compute, or if a second run gave other bits; and
    what the operation raises.
    """
    truths = _truths(case, draws)
    jitted = jax.jit(functools.partial(outputs_and_gradients, case.run, case.differentiable))
    with use("xla"):
        reference = jitted.lower(*draws[0]).compile(compiler_options)
    references = [reference(*operands) for operands in draws]
    for variant in variants:
        with use("vulkan", device=device, variant=variant):
            try:
                compiled = jitted.lower(*draws[0]).compile()
            except (FeatureError, ValueError):
                if variant == "plain":  # every device has it
                    raise
                continue
            before = sum(counts().values())
            results = [jax.block_until_ready(compiled(*operands)) for operands in draws]
            again = compiled(*draws[0])
        if sum(counts().values()) == before and any(x.size for x in jax.tree.leaves(again)):
            raise RuntimeError(f"{case.label}: no kernel ran")
        if _bits(again) != _bits(results[0]):
            raise RuntimeError(f"{case.label}: a second run gave other bits")
        for place, (of, factor) in enumerate((("output", OUTPUT_FACTOR), ("gradient", GRADIENT_FACTOR))):
            for i in range(len(truths[0][place])):
                error, xla_error = (
                    float(np.max([_error(y[place][i], t[place][i], unit) for y, t in zip(ys, truths, strict=True)]))
                    for ys in (results, references)
                )
                dtype = results[0][place][i].dtype
                rounding = float(jnp.finfo(dtype).eps) / 2 if few and jnp.issubdtype(dtype, jnp.inexact) else 0.0
                allowed = factor * max(xla_error, rounding) + SLACK
                yield Deviation(variant, f"{of} {i}", error, xla_error, allowed)


def outputs_and_gradients(function: Any, differentiable: Sequence[int], *operands: Any) -> tuple[Any, Any]:
    """The results, and the gradients of a fixed random combination of them."""

    def of_differentiable(*chosen):
        whole = list(operands)
        for i, x in zip(differentiable, chosen, strict=True):
            whole[i] = x
        return function(whole)

    if not differentiable:
        return tuple(jax.tree.leaves(function(operands))), ()
    outputs, pullback = jax.vjp(of_differentiable, *(operands[i] for i in differentiable))
    return outputs, pullback(tuple(_cotangent(y.shape, i).astype(y.dtype) for i, y in enumerate(outputs)))


def _cotangent(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Normal numbers that bf16 holds exactly, so that every precision has the same."""
    values = np.random.default_rng(100 + seed).standard_normal(shape, np.float32)
    return jnp.asarray(values.astype(BF16))


def _bits(results: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(results)]


def _truths(case: OpCase, draws: Sequence[Operands]) -> list[tuple[Any, Any]]:
    with jax.enable_x64(True):
        function = jax.jit(
            functools.partial(outputs_and_gradients, case.run_truth, case.differentiable),
            compiler_options=QUICK_TO_COMPILE,
        )
        return [jax.tree.map(np.asarray, function(*jax.tree.map(_exact, operands))) for operands in draws]


def truth_of(case: OpCase, operands: Operands) -> np.ndarray:
    """The first result of a case on some operands, in float64."""
    with jax.enable_x64(True):
        return np.asarray(case.run_truth(jax.tree.map(_exact, operands))[0], np.float64)


def _exact(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64) if x.dtype in (F32, BF16) else x


def _error(found: Any, truth: np.ndarray, unit: float = 0.0) -> float:
    """Largest difference of any element, in units of the truth's largest finite one or of `unit`; NaN for NaN alone."""
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    same = (found == truth) | (np.isnan(found) & np.isnan(truth))
    scale = max(np.abs(truth).max(initial=0, where=np.isfinite(truth)), unit) or 1.0
    return float(np.abs(np.where(same, 0, found - truth)).max(initial=0) / scale)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m vk_kernels.tools.check_ops", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", help="comma-separated; default: all")
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}; default: tiny, and on a GPU the others too")
    parser.add_argument("--device", help="index, 'gpu', 'cpu' or part of a name; default: VK_KERNELS_DEVICE, or a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes only")
    options = parser.parse_args(arguments)
    all_ops = {case.op for case in CASES}
    chosen_ops = _chosen(parser, options.ops, all_ops) or all_ops
    sizes = _chosen(parser, options.sizes, SIZES)
    jax.config.update("jax_platforms", "cpu")  # which the kernels are called from
    try:
        device = open_device(options.device or "")
    except NoDeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if options.device else 1
    default = ("tiny",) if options.quick or device.info.kind == "cpu" else tuple(SIZES)
    cases = [case for case in CASES if case.op in chosen_ops]
    return 0 if report(cases, sizes or default, options.device) else 1


def _chosen(parser: argparse.ArgumentParser, value: str | None, known: Any) -> list[str]:
    names = value.split(",") if value else []
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return names


def report(cases: Sequence[OpCase], sizes: Sequence[str], device: str | None = None) -> bool:
    """Prints the table; whether everything passed."""
    print(open_device(device or "").info)
    print(HEADER)
    failures = count = 0
    for case in cases:
        for size in sizes:
            for dtype in (F32, BF16):
                try:
                    for result in check(case, size, dtype, device):
                        count, failures = count + 1, failures + (not result.passed)
                        print(result, flush=True)
                except Exception as error:  # the table goes on: it shows what else fails
                    count, failures = count + 1, failures + 1
                    print(f"{case.label:<34} {size:<9} {dtype.name:<8} FAIL {type(error).__name__}: {error}")
    print(f"{count - failures} of {count} passed" if failures else f"all {count} passed")
    return not failures


if __name__ == "__main__":
    run_tool(main)
