"""Compile time and code of functions that grow: seconds and bytes of SPIR-V against the number of turns, plotted.

    python benchmarks/compile_time.py [--device cpu] [--most 64] [--plot benchmarks/compile_time.png]

Each point is a process of its own, with empty caches, 4 GB of memory and --limit seconds. Seconds are of processor
time, over all threads, so that what else a machine does counts little. compile: to trace, to generate code and to make
a program of it; first call: all that and the first results, which on a processor is when its driver compiles.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vk_kernels
from vk_kernels.runtime.device import Device

_MEMORY = 4 << 30  # bytes of address space beside what a process has at the start


def scan_gradient(turns: int) -> tuple[Callable[..., Any], tuple]:
    """The gradient of a scan over scalars."""

    def last(c: jax.Array, xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, x: (jnp.tanh(c * x + 1), None), c, xs)[0]

    return jax.grad(last, (0, 1)), (np.float32(0.5), np.linspace(-1, 1, turns, dtype=np.float32))


def elementwise_chain(turns: int) -> tuple[Callable[..., Any], tuple]:
    """Elementwise operations, one after another, each of which needs the last result twice."""

    def chained(x: jax.Array) -> jax.Array:
        for _ in range(turns):
            x = jnp.sin(x) + 0.5 * x
        return x

    return chained, (np.linspace(-1, 1, 64, dtype=np.float32),)


def associative_scan(turns: int) -> tuple[Callable[..., Any], tuple]:
    """Sums of the first rows of as many."""
    return lambda x: jax.lax.associative_scan(jnp.add, x), (np.ones((turns, 2), np.float32),)


def unrolled_mlp(turns: int) -> tuple[Callable[..., Any], tuple]:
    """The gradient of as many layers."""

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in weights:
            x = jnp.tanh(x @ w)
        return x.sum()

    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.3, (8, 8)).astype(np.float32) for _ in range(turns)]
    return jax.grad(loss), (weights, rng.normal(0, 1, (4, 8)).astype(np.float32))


PROGRAMS = {fn.__name__: fn for fn in (scan_gradient, elementwise_chain, associative_scan, unrolled_mlp)}


def measure(name: str, turns: int, device: str | None) -> dict[str, float]:
    """Measures one function in this process, which has compiled nothing before."""
    fn, args = PROGRAMS[name](turns)
    opened = vk_kernels.jit(lambda x: x, device=device).lower(1.0).device
    assert isinstance(opened, Device)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    jitted = vk_kernels.jit(fn, device=device)
    start = time.process_time()
    program = jitted.lower(*args).program
    compiled = time.process_time() - start
    jax.block_until_ready(jitted(*args))
    called = time.process_time() - start
    code = [len(command.kernel) for command in program.commands if isinstance(command.kernel, bytes)]
    return {"compile": compiled, "call": called, "bytes": sum(code), "largest": max(code), "kernels": len(code)}


def measure_apart(name: str, turns: int, device: str | None, limit: float) -> dict[str, float] | None:
    """`measure` in a process of its own; None where that takes longer, or more memory."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", name, str(turns), *(("--device", device) if device else ())]
        environment = os.environ | {
            "VK_KERNELS_CACHE": cache,
            "MESA_SHADER_CACHE_DISABLE": "true",
            "JAX_PLATFORMS": "cpu",
        }
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return None
    return json.loads(done.stdout) if done.returncode == 0 else None


def plot(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """found: what was measured by turns, by program."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = ("call", "processor seconds to the first result"), ("bytes", "bytes of SPIR-V")
    for axis, (key, label) in zip(axes, labels, strict=True):
        for name, points in found.items():
            axis.loglog(points.keys(), [one[key] for one in points.values()], marker="o", label=name.replace("_", " "))
        axis.set_xlabel("turns, operations, rows or layers")
        axis.set_ylabel(label)
        axis.grid(True, alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="index, 'gpu', 'cpu' or part of a name")
    parser.add_argument("--most", type=int, default=64, help="turns")
    parser.add_argument("--limit", type=float, default=100, help="seconds for a point")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("compile_time.png"))
    parser.add_argument("--one", nargs=2, metavar=("PROGRAM", "TURNS"), help="this point alone, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.device)))
        return 0
    found: dict[str, dict[int, dict[str, float]]] = {}
    row = "{:<18} {:>5} {:>10} {:>12} {:>12} {:>14} {:>8}"
    print(row.format("program", "turns", "compile s", "first call s", "SPIR-V", "largest kernel", "kernels"))
    failed = False
    for name in PROGRAMS:
        points = found.setdefault(name, {})
        turns = 4
        while turns <= options.most:
            one = measure_apart(name, turns, options.device, options.limit)
            if one is None:
                print(f"{name:<18} {turns:>5} not in {options.limit:.0f} s and {_MEMORY >> 30} GB", flush=True)
                failed = True
                break
            points[turns] = one
            seconds = f"{one['compile']:.2f}", f"{one['call']:.2f}"
            code = f"{one['bytes']:,}", f"{one['largest']:,}", f"{one['kernels']}"
            print(row.format(name, turns, *seconds, *code), flush=True)
            turns *= 2
    plot(found, options.plot)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
