"""Times every operation's kernels on a Vulkan device, beside XLA on the best JAX device.

    python benchmarks/ops.py [--device gpu] [--sizes chat,124M] [--ops matmul,attention] [--repeats 30]

Vulkan: device time, the sum of the timestamps of a plan's dispatches, median over the repeats; no copies to or from the
host are in it. XLA: wall time of the reference under jax.jit, forward and (forward +) backward as XLA sees fit, calls
back to back so that launches overlap, divided by their number. GB/s counts every operand and result once, TFLOP/s the
useful multiplications and additions: half of a causal attention's, and none that a kernel makes again. The ceilings are
a copy, and a large product.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from vk_kernels.bridge.use import use
from vk_kernels.compiler.op_call import CallSite, encode_call, make_plan
from vk_kernels.compiler.op_registry import kernel_op
from vk_kernels.errors import FeatureError
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.dispatch_plan import Plan, record
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.tools.check_ops import VARIANTS
from vk_kernels.tools.floors import copy_rate, random_array, replay_seconds
from vk_kernels.tools.op_cases import BF16, CASES, F32, SIZES, OpCase

ROW = "{:<30} {:<9} {:<5} {:<9} {:<6} {:>10} {:>9} {:>9} {:>10} {:>6}"


def one_pass(case: OpCase, backward: bool) -> Callable[..., Any]:
    """The case as a function of its operands: its results, or the gradients of its first result."""
    if not backward:
        return lambda *operands: case.run(operands)

    def gradients(*operands):
        def of(*some):
            whole = list(operands)
            for i, x in zip(case.differentiable, some, strict=True):
                whole[i] = x
            return case.run(whole)[0]

        y, pullback = jax.vjp(of, *(operands[i] for i in case.differentiable))
        return pullback(y)

    return gradients


def kernel_calls(case: OpCase, operands: Sequence[np.ndarray], target: CallSite) -> Iterator[tuple[str, Any]]:
    """(name, equation) of each primitive that the forward and the backward pass of a case are made of."""
    function = one_pass(case, backward=bool(case.differentiable))
    with use("vulkan", device=target.device, variant=target.variant):
        jaxpr = jax.make_jaxpr(function)(*operands)
    yield from _primitives(jaxpr.jaxpr)


def _primitives(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    for equation in jaxpr.eqns:
        if "target" in equation.params:
            yield equation.primitive.name, equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


def plan_of(device: Device, name: str, equation: Any) -> tuple[Plan, list[ArraySpec], list[ArraySpec]]:
    """The plan of a primitive, and the arrays it reads and writes."""
    parameters = dict(equation.params)
    target = parameters.pop("target")
    reads, writes = (
        [ArraySpec(tuple(v.aval.shape), np.dtype(v.aval.dtype)) for v in variables]
        for variables in (equation.invars, equation.outvars)
    )
    what = encode_call(name, parameters, target).encode()
    return make_plan(device, what, tuple(reads), tuple(writes)), reads, writes


def device_seconds(
    device: Device,
    plan: Plan,
    reads: list[ArraySpec],
    writes: list[ArraySpec],
    operands: Sequence[np.ndarray],
    largest: int,
    repeats: int,
    warm: float = 0.1,
) -> float:
    """Median device time of a plan, on the operands where it reads these, else on random numbers."""
    if [ArraySpec(x.shape, x.dtype) for x in operands] != reads:
        operands = [random_array(array, largest) for array in reads]
    inputs = [device.upload(x) for x in operands]
    others = [device.buffer(array.nbytes) for array in writes] + [device.buffer(size) for size in plan.scratch]
    recorder = device.new_recorder(timestamps=len(plan.dispatches), replay=True)
    try:
        record(recorder, plan, [*inputs, *others])
        recorder.end()
        return replay_seconds(recorder, repeats, warm)
    finally:
        recorder.close()


def useful_flops(name: str, reads: list[ArraySpec], writes: list[ArraySpec]) -> float:
    """FLOPs of the products of a primitive, as the compiler counts them; 0 where there are none."""
    flops = kernel_op(name).flops
    return 0.0 if flops is None else float(flops(SimpleNamespace(inputs=reads, outputs=writes)))


def xla_seconds(case: OpCase, operands: Sequence[np.ndarray], backward: bool, repeats: int) -> float:
    """Wall time of one call of the reference on the best JAX device."""
    device = jax.devices()[0]
    placed = jax.device_put(operands, device)
    with use("xla"), jax.default_matmul_precision("highest"):
        function = jax.jit(one_pass(case, backward))
        jax.block_until_ready(function(*placed))
        start = time.perf_counter()
        results = [function(*placed) for _ in range(repeats)]
        jax.block_until_ready(results)
    return (time.perf_counter() - start) / repeats


def product_rate(device: Device, dtype: np.dtype, variant: str | None, repeats: int, warm: float = 0.1) -> float:
    """FLOPs a second of a large product. Raises FeatureError or ValueError where the variant cannot make it."""
    n = 256 if device.info.kind == "cpu" else 4096
    case = next(case for case in CASES if case.label == "matmul (product)")
    operands = [random_array(ArraySpec((n, n), dtype), 1) for _ in range(2)]
    name, equation = next(kernel_calls(case, operands, CallSite(str(device.info.index), variant)))
    plan, reads, writes = plan_of(device, name, equation)
    return 2 * n**3 / device_seconds(device, plan, reads, writes, (), 1, repeats, warm)


def print_ceilings(device: Device, repeats: int) -> None:
    print(f"copy: {copy_rate(device, repeats) / 1e9:,.0f} GB/s")
    for dtype in (F32, BF16):
        for variant in VARIANTS:
            try:
                rate = product_rate(device, dtype, variant, repeats)
            except (FeatureError, ValueError):
                continue
            print(f"product, {dtype.name}, {variant}: {rate / 1e12:,.1f} TFLOP/s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="", help="of Vulkan: index, 'gpu', 'cpu' or part of a name")
    parser.add_argument("--sizes", default="chat,124M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--ops", default="", help="comma-separated; default: all")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(arguments)
    device = open_device(options.device)
    print(f"Vulkan: {device.info}\nXLA: {jax.devices()[0].device_kind} ({jax.devices()[0].platform})\n")
    print_ceilings(device, options.repeats)
    print(
        "\n" + ROW.format(*("kernels", "size", "dtype", "variant", "pass"), "us", "GB/s", "TFLOP/s", "XLA us", "ratio")
    )
    wanted = set(filter(None, options.ops.split(",")))
    for size in options.sizes.split(","):
        for case in CASES:
            if wanted and case.op not in wanted:
                continue
            for dtype in (F32, BF16):
                measure(device, options.device, case, size, dtype, options.repeats)
    return 0


def measure(device: Device, selector: str, case: OpCase, size: str, dtype: np.dtype, repeats: int) -> None:
    """Prints a row for each variant and pass of a case."""
    sizes = SIZES[size]
    operands = case.operands(sizes, dtype)
    leaves = jax.tree.leaves(operands)
    xla = functools.cache(lambda backward: xla_seconds(case, operands, backward, repeats))
    ended = -math.inf
    for variant in VARIANTS:
        rows = []
        try:
            for name, equation in kernel_calls(case, operands, CallSite(selector, variant)):
                plan, reads, writes = plan_of(device, name, equation)
                rested = time.perf_counter() > ended + 0.3  # while operands were made, or XLA worked on a processor
                warm = 1.0 if rested else 0.1
                seconds = device_seconds(device, plan, reads, writes, leaves, sizes.vocab, repeats, warm)
                ended = time.perf_counter()
                rows.append((name, reads, writes, seconds))
        except (FeatureError, ValueError):
            if variant == "plain":
                raise
            continue
        total = 0.0
        for name, reads, writes, seconds in rows:
            total += seconds
            backward = name.endswith("_backward")
            moved = sum(array.nbytes for array in (*reads, *writes)) / seconds / 1e9
            flops = useful_flops(name, reads, writes) / seconds / 1e12
            reference = xla(backward)
            print(
                ROW.format(
                    *(case.label, size, "f32" if dtype == F32 else "bf16", variant, "both" if backward else "fwd"),
                    f"{1e6 * (total if backward else seconds):,.1f}",
                    f"{moved:,.0f}",
                    f"{flops:,.1f}" if flops else "",
                    f"{1e6 * reference:,.1f}",
                    f"{(total if backward else seconds) / reference:.2f}",
                ),
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
