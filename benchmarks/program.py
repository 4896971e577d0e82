"""The train step of a config as one Vulkan program: what it is made of, and what a call costs.

    python benchmarks/program.py [--config configs/chat.py] [--device gpu] [--bfloat16] [--text FILE]
    python benchmarks/program.py --calls 100 --profile [--trace FILE]

Without --calls it only traces, compiles and records, on any device, twice: the second time the compiled kernels come
from the cache on disk. With it, steps run with donated state and a batch of numpy arrays: a call is the time until it
returns while nothing waits for the device, the driver's the part of it inside of Vulkan, Python's the rest, as it is
for a core that slept during the step before, and wakes with cold caches, and for one that did not; step is wall time
over all calls. --profile times each dispatch alone, so that their sum is more than a step, and groups them by phase
and by kernel.
"""

import argparse
import ast
import collections
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vk_kernels
from gpt_jax.runs.kernel_floors import kernel_name
from gpt_jax.training.programs import abstract_state, make_train_step
from gpt_jax.training.steps import on_leaves
from vk_kernels.runtime.open_devices import open_device


def load_config(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def make_step(config: Any) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """(the step as the training loop runs it, on the leaves of a state; the state's shapes; a batch)."""
    state = abstract_state(config)
    return on_leaves(make_train_step(config), jax.tree.structure(state)), state, random_batch(config, 0)


def random_batch(config: Any, seed: int) -> dict[str, np.ndarray]:
    shape = (config.batch_size, config.model.block_size + 1)
    stream = np.random.default_rng(seed).integers(0, config.model.vocab_size, shape).astype(np.int32)
    return {"inputs": stream[:, :-1].copy(), "targets": stream[:, 1:].copy()}


def fresh_leaves(shapes: Any) -> tuple[np.ndarray, ...]:
    """Leaves of a state to time a step with: small random parameters, zeros for the optimizer's and the counters."""
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = jax.tree.map(lambda x: (0.02 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype), shapes.params)
    return tuple(jax.tree.leaves(state.replace(params=params)))


def compile_twice(step: Any, state: Any, batch: Any, device: str) -> Any:
    """The compiled step, the second time; prints how long each took."""
    for what in ("first", "warm cache"):
        jax.clear_caches()
        jitted = vk_kernels.jit(step, donate_argnums=0, device=device)
        start = time.perf_counter()
        compiled = jitted.lower(state, batch)
        print(f"trace, plan ({what}): {time.perf_counter() - start:.2f} s")
    return jitted, compiled


def report(compiled: Any, batch: dict[str, np.ndarray]) -> None:
    cost, program = compiled.cost(), compiled.program
    state_bytes = sum(program.inputs[i].nbytes for i in compiled.donated)
    back = [array.nbytes for j, array in enumerate(program.outputs) if j not in program.aliases]
    print(f"dispatches: {cost.dispatches}, barriers: {cost.barriers}, queue submits a call: 1")
    print(
        f"arena: {cost.arena_bytes / 1e6:.1f} MB, state: {state_bytes / 1e6:.1f} MB, constants: {cost.constant_bytes}"
    )
    print(f"host to device a call: {sum(x.nbytes for x in batch.values()):,} bytes in {len(batch)} arrays (the batch)")
    print(f"outputs that are not the state: {sum(back):,} bytes in {len(back)} arrays (the metrics)")
    print(f"useful FLOPs: {cost.flops / 1e9:.1f} G, bytes that dispatches read and write: {cost.bytes / 1e9:.2f} G")
    kinds = collections.Counter(kernel_name(command.label) for command in program.commands)
    print("dispatches by kernel: " + ", ".join(f"{count} {name}" for name, count in kinds.most_common()))


def measure(jitted: Any, state: Any, batch: Any, calls: int) -> Any:
    """Runs steps and prints what they took; gives the state after them."""
    start = time.perf_counter()
    state, metrics = jitted(state, batch)
    float(metrics["loss"])
    print(f"first call (the rest of compilation, and recording): {time.perf_counter() - start:.3f} s")
    for _ in range(5):  # makes what recordings there will be
        state, metrics = jitted(state, batch)
    device = jitted.lower(state, batch).device
    for waiting in ("asleep", "awake"):
        times = []
        with timed_driver(device) as driver:
            for _ in range(calls):  # so that no call waits for the device
                if waiting == "asleep":
                    float(metrics["loss"])
                else:
                    while device.completed() < metrics["loss"].buffer.owner.last_use:
                        pass
                driver.clear()
                begin = time.perf_counter()
                state, metrics = jitted(state, batch)
                times.append((time.perf_counter() - begin, sum(driver)))
        parts = {
            "a call": [a for a, _ in times],
            "the driver's": [b for _, b in times],
            "Python's": [a - b for a, b in times],
        }
        found = (f"{name}: {1e6 * statistics.median(x):.0f} us (least {1e6 * min(x):.0f})" for name, x in parts.items())
        print(f"after a wait {waiting}, {', '.join(found)}")
    float(metrics["loss"])
    begin = time.perf_counter()
    for _ in range(calls):
        state, metrics = jitted(state, batch)
    float(metrics["loss"])
    print(f"step: {1e3 * (time.perf_counter() - begin) / calls:.3f} ms over {calls} calls")
    return state


@contextlib.contextmanager
def timed_driver(device: Any) -> Iterator[list[float]]:
    """A list that grows by the seconds of each Vulkan function that a call of a recorded program uses."""
    spent: list[float] = []

    def timed(function: Any) -> Any:
        def run(*arguments):
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent.append(time.perf_counter() - begin)

        return run

    names = "vkQueueSubmit", "vkGetSemaphoreCounterValue"
    originals = {name: getattr(device.fn, name) for name in names}
    for name, function in originals.items():
        setattr(device.fn, name, timed(function))
    try:
        yield spent
    finally:
        for name, function in originals.items():
            setattr(device.fn, name, function)


def print_profile(profile: Any) -> None:
    print(f"sum over dispatches, each alone: {1e3 * profile.seconds:.3f} ms")
    print("by phase:")
    for name, seconds in profile.by_phase().items():
        print(f"{1e3 * seconds:10.3f} ms  {name or '(none)'}")
    groups: dict[str, list[float]] = {}
    for label, _, seconds in profile.rows:
        groups.setdefault(kernel_name(label), []).append(seconds)
    print("by kernel:")
    for name, seconds in sorted(groups.items(), key=lambda item: -sum(item[1])):
        print(f"{1e3 * sum(seconds):10.3f} ms in {len(seconds):>4}  {name}")
    print("slowest dispatches:")
    for label, scope, seconds in sorted(profile.rows, key=lambda row: -row[2])[:25]:
        print(f"{1e3 * seconds:10.3f} ms  {scope}: {label}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/chat.py")
    parser.add_argument(
        "--device", default="", help="index, 'gpu', 'cpu' or part of a name; the process's own if empty"
    )
    parser.add_argument("--bfloat16", action="store_true", help="matrix products and activations in bfloat16")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the config, as in Python")
    parser.add_argument("--calls", type=int, default=0, help="steps to run and time")
    parser.add_argument("--profile", action="store_true", help="time each dispatch of a step")
    parser.add_argument("--text", type=Path, help="file to write the program's listing to")
    parser.add_argument("--trace", type=Path, help="file to write the profile to, as a Chrome trace")
    options = parser.parse_args()
    config = load_config(options.config)
    if options.bfloat16:
        config.model.dtype = jnp.bfloat16.dtype.name
    config.update_from_flattened_dict(
        {name: ast.literal_eval(value) for name, value in (x.split("=") for x in options.set)}
    )
    print(f"{options.config} ({config.model.dtype}, batch {config.batch_size}) on {open_device(options.device).info}")

    step, shapes, batch = make_step(config)
    device = options.device or None
    jitted, compiled = compile_twice(step, tuple(jax.tree.leaves(shapes)), batch, device)
    report(compiled, batch)
    if options.text:
        options.text.write_text(compiled.as_text())
    if not (options.calls or options.profile):
        return
    state = vk_kernels.device_put(fresh_leaves(shapes), device)
    if options.calls:
        state = measure(jitted, state, batch, options.calls)
    if options.profile:
        profile = jitted.profile(state, batch)
        print_profile(profile)
        if options.trace:
            profile.write_trace(options.trace)


if __name__ == "__main__":
    main()
