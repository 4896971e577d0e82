"""Products in a user's own function: their kernels beside the generated ones, `ops.matmul` and XLA.

    python benchmarks/products.py [--device gpu] [--only SUBSTRING] [--seconds 0.3]

Each function is timed through `vk_kernels.jit` as it is, and with all its products generated; a plain x @ w also as
`ops.matmul`; and by XLA where JAX has a GPU, float32 there with JAX's default precision and with 'highest', which all
others have. Milliseconds are the device's for all dispatches of a call, and XLA's of calls back to back; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vk_kernels
from vk_kernels import ops
from vk_kernels.compiler.op_registry import register_selection
from vk_kernels.ops.matmul.dot_general import select_product
from vk_kernels.runtime.open_devices import open_device

ROW = "{:<34} {:<9} {:>9} {:>10} {:>10} {:>9} {:>9} {:>9}  {}"


class Case(NamedTuple):
    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    flops: float
    plain: bool = False  # whether it is x @ w


def product(x, w):
    return x @ w


def gradient(x, w):
    return jax.value_and_grad(lambda x, w: jnp.tanh(x @ w).astype(jnp.float32).mean(), argnums=(0, 1))(x, w)


def scores(q, k):
    return jnp.einsum("bhtd,bhsd->bhts", q, k)


def scores_by_token(q, k):
    return jnp.einsum("bthd,bshd->bhts", q, k)


CASES = {
    "x @ w, 4096^3": Case(product, ((4096, 4096), (4096, 4096)), 2 * 4096**3, True),
    "(16, 256, 768) @ (768, 3072)": Case(product, ((16, 256, 768), (768, 3072)), 2 * 4096 * 768 * 3072, True),
    "scores (16, 8, 1024, 64)": Case(scores, ((16, 8, 1024, 64),) * 2, 2 * 16 * 8 * 1024 * 1024 * 64),
    "scores by token (16, 1024, 8, 64)": Case(scores_by_token, ((16, 1024, 8, 64),) * 2, 2 * 128 * 1024 * 1024 * 64),
    "vmap of (512, 512) @ (512, 512)": Case(jax.vmap(product), ((32, 512, 512),) * 2, 2 * 32 * 512**3),
    "gradient of (2048, 1024) @ (1024, 4096)": Case(gradient, ((2048, 1024), (1024, 4096)), 6 * 2048 * 1024 * 4096),
    "(8, 768) @ (768, 50257)": Case(product, ((8, 768), (768, 50257)), 2 * 8 * 768 * 50257, True),
    "(4096, 4096) @ (4096,)": Case(product, ((4096, 4096), (4096,)), 2 * 4096**2),
    "(64, 64) @ (64, 64)": Case(product, ((64, 64), (64, 64)), 2 * 64**3, True),
    "(256, 64) @ (64, 256)": Case(product, ((256, 64), (64, 256)), 2 * 256 * 64 * 256, True),
}


@contextmanager
def all_generated() -> Iterator[None]:
    """No product is one of the kernels'."""
    register_selection("dot_general", lambda *_: None)
    try:
        yield
    finally:
        register_selection("dot_general", select_product)


def vulkan_ms(fn: Callable[..., Any], arguments: list[Any], device: str, seconds: float) -> tuple[float, str]:
    """(milliseconds of a call, its kernels)."""
    jitted = vk_kernels.jit(fn, device=device)
    kernels = [command.label.split(" of ")[0] for command in jitted.lower(*arguments).program.commands]
    times, begin = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() < begin + seconds:
        times.append(1e3 * jitted.profile(*arguments).seconds)
    return statistics.median(times[len(times) // 2 :]), ", ".join(kernels)


def xla_ms(
    fn: Callable[..., Any], arguments: list[np.ndarray], gpu: Any, precision: str | None, seconds: float
) -> float:
    """Milliseconds of a call, of many back to back."""
    with jax.default_matmul_precision(precision):
        jitted = jax.jit(fn)
        given = jax.device_put(arguments, gpu)
        jax.block_until_ready(jitted(*given))
        times, begin = [], time.perf_counter()
        while len(times) < 5 or time.perf_counter() < begin + seconds:
            start = time.perf_counter()
            for _ in range(20):
                found = jitted(*given)
            jax.block_until_ready(found)
            times.append(1e3 * (time.perf_counter() - start) / 20)
    return statistics.median(times[len(times) // 2 :])


def find_gpu() -> Any:
    """A GPU of JAX's own, or None."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="index, 'gpu', 'cpu' or part of a name")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    options = parser.parse_args()
    device, gpu = open_device(options.device), find_gpu()
    print(f"{device.info}; XLA: {gpu}")
    print(ROW.format("ms", "", "jit", "generated", "ops.matmul", "XLA", "highest", "TFLOP/s", "kernels"))
    rng, index = np.random.default_rng(0), str(device.info.index)
    for name, case in CASES.items():
        for dtype in ("float32", "bfloat16") if options.only in name else ():
            host = [rng.standard_normal(shape, np.float32).astype(dtype) for shape in case.shapes]
            arguments = [vk_kernels.device_put(x, index) for x in host]
            ours, kernels = vulkan_ms(case.fn, arguments, index, options.seconds)
            with all_generated():
                generated, _ = vulkan_ms(case.fn, arguments, index, options.seconds)
            op = vulkan_ms(ops.matmul, arguments, index, options.seconds)[0] if case.plain else None
            precisions = (None, "highest") if dtype == "float32" else (None,)
            xla = [xla_ms(case.fn, host, gpu, precision, options.seconds) if gpu else None for precision in precisions]
            rate = f"{case.flops / ours / 1e9:.1f}"
            shown = [f"{x:.4f}" if x else "-" for x in (ours, generated, op, *xla, None)][:5]
            print(ROW.format(name, dtype, *shown, rate, kernels), flush=True)


if __name__ == "__main__":
    main()
