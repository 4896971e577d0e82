"""Times the full train step, ours beside XLA's and torch.compile's, each in processes of its own, one after another.

    python benchmarks/train_step.py [--cases chat-f32,chat-bf16,124m-b4] [--rivals xla,cudnn,torch] [--steps 100]

The maths is the same on every side: dropout and soft cap as the config has them (cases named `plain` have neither), the
precision named in the table (XLA's float32 is `highest`: no TF32), a new batch from the host each step, the loss of
every tenth step read back. `xla` runs this repository's reference operations. In bf16, without dropout and soft cap,
rivals have fused attention: `cudnn` is XLA with `jax.nn.dot_product_attention(implementation="cudnn")`, and
torch.compile takes PyTorch's. ms is the median over the steps, in tens, after a warm-up. The first step is counted from
the start of the process, imports included: cold with empty caches of compiled kernels and of Python's bytecode, warm in
a second process that finds them (XLA: its compilation cache). Memory is the most that was in use on the device; MFU
(gpt_jax/runs/flops.py has its formula) is of the published peak of the device, where it is known.

After the table, where the time of our step goes: each kernel's device time beside its floor, the larger of its bytes
at the bandwidth of a large copy and its FLOPs at the rate of a large product, both measured in the same process.
"""

import argparse
import collections
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
GPT2_124M = {"accumulate_steps": 1, "model.dropout_rate": 0.1, "model.soft_cap": 30.0}
BF16 = {"model.dtype": "bfloat16"}


class StepCase(NamedTuple):
    """The train step of a config of which some fields are changed."""

    config: str
    fields: dict[str, Any]

    def load(self) -> Any:
        import program  # of the tree that is measured, and so are the configs

        config = program.load_config(str(Path(program.__file__).parents[1] / "configs" / self.config))
        config.update_from_flattened_dict(self.fields)
        return config


CASES = {
    "chat-f32": StepCase("chat.py", {}),
    "chat-bf16": StepCase("chat.py", BF16),
    "124m-b1": StepCase("gpt2_124m.py", GPT2_124M | {"batch_size": 1}),
    "124m-b4": StepCase("gpt2_124m.py", GPT2_124M | {"batch_size": 4}),
    "124m-b16": StepCase("gpt2_124m.py", GPT2_124M | {"batch_size": 16}),
    "124m-plain-b4": StepCase("gpt2_124m.py", {"accumulate_steps": 1, "batch_size": 4}),
    "124m-plain-b16": StepCase("gpt2_124m.py", {"accumulate_steps": 1, "batch_size": 16}),
    "tiny-f32": StepCase("chat_tiny.py", {}),
}
RIVALS = ("xla", "cudnn", "torch")
WARM_UP = 1.0  # seconds of steps: clocks of a device that rested while kernels were compiled are low for that long


def case_of(name: str) -> StepCase:
    """One of CASES, or chat-DTYPE-bB-tT: the chat config with a batch and a block of that size, for scaling.

    With -loraR behind it: the same with adapters of rank R, that alone are trained. Ends the program, in one line, for
    another name.
    """
    if name in CASES:
        return CASES[name]
    whole, _, rank = name.rpartition("-lora")
    if rank.isdecimal():
        config, fields = case_of(whole)
        return StepCase(config, fields | {"lora.rank": int(rank)})
    found = re.fullmatch(r"chat-(f32|bf16)-b(\d+)-t(\d+)", name)
    if found is None:
        known = ", ".join(CASES)
        raise SystemExit(f"error: there is no case {name!r}: give {known}, or chat-bf16-b32-t512 and the like")
    fields = {"batch_size": int(found[2]), "model.block_size": int(found[3])}
    return StepCase("chat.py", fields | (BF16 if found[1] == "bf16" else {}))


# One side, in a process of its own. Everything is imported here, so that imports are in the time of the first step.


def run_side(side: str, case: StepCase, steps: int, profile: bool) -> dict[str, Any]:
    """Runs one side of a case; returns the figures of the table and of the profile."""
    config = case.load()
    if side == "torch":
        from torch_step import make_side
    else:
        make_side = {"vulkan": vulkan_side, "xla": xla_side, "cudnn": cudnn_side}[side]
    step, finish = make_side(config)
    from program import random_batch

    batches = [random_batch(config, seed) for seed in range(8)]
    loss = step(batches[0])
    float(loss())
    found: dict[str, Any] = {"first_s": time.time() - float(os.environ["BENCHMARK_START"])}
    if steps:
        ready = time.perf_counter() + WARM_UP
        while time.perf_counter() < ready:
            timed(step, batches, 1)
        times = timed(step, batches, max(1, steps // 10))
        found |= {"ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times), "loss": float(loss())}
    return found | {"tokens": config.batch_size * config.model.block_size} | finish(profile)


def timed(step: Callable[[Any], Any], batches: list[Any], tens: int) -> list[float]:
    """Seconds a step of each ten, whose last loss is waited for."""
    times = []
    for ten in range(tens):
        start = time.perf_counter()
        for i in range(10):
            loss = step(batches[(10 * ten + i) % len(batches)])
        float(loss())
        times.append((time.perf_counter() - start) / 10)
    return times


def vulkan_side(config: Any) -> tuple[Callable[[Any], Any], Callable[[bool], dict[str, Any]]]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from program import fresh_leaves, make_step

    import vk_kernels
    from vk_kernels.runtime.open_devices import open_device

    step, shapes, batch = make_step(config)
    jitted = vk_kernels.jit(step, donate_argnums=0)
    state = vk_kernels.device_put(fresh_leaves(shapes))

    def run(batch: Any) -> Callable[[], float]:
        nonlocal state
        state, metrics = jitted(state, batch)
        return lambda: float(metrics["loss"])

    def finish(profile: bool) -> dict[str, Any]:
        device = open_device("")
        cost = jitted.cost(state, batch)
        memory = device.memory_stats().peak  # before the profile, which copies the state
        found = {"device": device.info.name, "memory": memory, "dispatches": cost.dispatches, "arena": cost.arena_bytes}
        return found | ({"profile": profile_step(jitted, state, batch, device, config)} if profile else {})

    return run, finish


def matmul_precision(config: Any) -> str:
    """XLA's precision of products that a config asks for: no TF32 in f32, which Vulkan has no use for either."""
    return "default" if config.model.dtype == "bfloat16" else "highest"


def xla_side(config: Any) -> tuple[Callable[[Any], Any], Callable[[bool], dict[str, Any]]]:
    import jax
    from program import fresh_leaves, make_step

    step, shapes, _ = make_step(config)
    precision = matmul_precision(config)
    jitted = jax.jit(step, donate_argnums=0)
    state = jax.device_put(fresh_leaves(shapes))

    def run(batch: Any) -> Callable[[], float]:
        nonlocal state
        with jax.default_matmul_precision(precision):
            state, metrics = jitted(state, batch)
        return lambda: float(metrics["loss"])

    def finish(_: bool) -> dict[str, Any]:
        device = jax.devices()[0]
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {"device": f"{device.device_kind} ({device.platform})", "memory": memory}

    return run, finish


def can_fuse_attention(config: Any) -> bool:
    """Whether the rivals have a fused attention for a config."""
    model = config.model
    return model.dtype == "bfloat16" and not model.soft_cap and not model.dropout_rate


def fuse_attention() -> None:
    """Makes the model's attention cuDNN's, in this process."""
    import jax

    from vk_kernels import ops

    def fused(qkv: jax.Array, **_: Any) -> jax.Array:
        q, k, v = (qkv[:, :, i] for i in range(3))  # each (B, T, H, D)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    ops.packed_attention = fused


def cudnn_side(config: Any) -> tuple[Callable[[Any], Any], Callable[[bool], dict[str, Any]]]:
    fuse_attention()
    return xla_side(config)


def profile_step(jitted: Any, state: Any, batch: Any, device: Any, config: Any) -> dict[str, Any]:
    """Time, bytes and FLOPs of each dispatch, and the device's ceilings."""
    from vk_kernels.tools.floors import profile_with_floors

    model = config.model
    shape = (config.batch_size, model.block_size, 1, model.embed_dim)
    return profile_with_floors(jitted, (state, batch), device, model.dtype, shape, repeats=5)


# All sides.


def measure(
    name: str, side: str, steps: int, profile: bool, caches: str, timeout: float = 600, tree: Path = HERE.parent
) -> dict[str, Any]:
    """Runs one side of a case, with packages, configs and program.py of `tree`; {"error": ...} where it fails."""
    environment = os.environ | {
        "BENCHMARK_START": str(time.time()),
        "PYTHONPATH": f"{tree}:{tree / 'benchmarks'}:{HERE}:{os.environ.get('PYTHONPATH', '')}",
        "VK_KERNELS_CACHE": f"{caches}/vulkan",
        "__GL_SHADER_DISK_CACHE_PATH": f"{caches}/nvidia",
        "MESA_SHADER_CACHE_DIR": f"{caches}/mesa",
        "PYTHONPYCACHEPREFIX": f"{caches}/python",
        "PYTHONDONTWRITEBYTECODE": "",
        "JAX_COMPILATION_CACHE_DIR": f"{caches}/xla",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    Path(f"{caches}/nvidia").mkdir(parents=True, exist_ok=True)
    # -P: this folder does not come before those of the tree, whose program.py knows its packages.
    command = [sys.executable, "-P", __file__, "--side", side, "--cases", name, "--steps", str(steps)]
    try:
        done = subprocess.run(
            command + ["--profile"] * profile, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took over {timeout:.0f} s"}
    if done.returncode:
        return {"error": reason(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def reason(errors: str) -> str:
    """The line of what a process wrote that says why it ended: the last with an exception, or the last one."""
    lines = errors.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)), lines[-1])


def have(side: str) -> bool:
    import importlib.util

    return side != "torch" or importlib.util.find_spec("torch") is not None


ROW = "{:<16} {:<7} {:>9} {:>7} {:>12} {:>6} {:>9} {:>9} {:>9} {:>6}"


def table(names: list[str], sides: list[str], steps: int, warm: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prints a line for each case and side; gives what was found of our own."""
    print(ROW.format("case", "side", "ms", "ratio", "tokens/s", "MFU", "memory", "cold s", "warm s", "disp."))
    for name in names:
        ours = None
        for side in sides:
            if side == "cudnn" and not can_fuse_attention(case_of(name).load()):
                continue
            with tempfile.TemporaryDirectory() as caches:
                found = measure(name, side, steps, side == "vulkan", caches)
                again = measure(name, side, 0, False, caches) if warm and "error" not in found else {}
            if side == "vulkan":
                ours = found
            print(line(name, side, found, again, ours), flush=True)
            if side == "vulkan" and "error" not in found:
                yield name, found


def line(name: str, side: str, found: dict[str, Any], again: dict[str, Any], ours: dict[str, Any] | None) -> str:
    if "error" in found:
        return f"{name:<16} {side:<7} failed: {found['error']}"
    from gpt_jax.runs.flops import device_peak_flops, model_flops_utilisation

    ms, model = found["ms"], case_of(name).load().model
    tokens_per_second = found["tokens"] / ms * 1e3
    peak = device_peak_flops(found["device"].split(" (")[0], model.dtype)
    utilisation = model_flops_utilisation(model, tokens_per_second, peak)
    mfu = "-" if utilisation is None else f"{100 * utilisation:.0f}%"
    memory = f"{found['memory'] / 1e6:,.0f} MB" if found.get("memory") else "-"
    ratio = f"{ms / ours['ms']:.2f}" if ours and "ms" in ours else "-"
    first = f"{again['first_s']:.1f}" if "first_s" in again else "-"
    numbers = (f"{tokens_per_second:,.0f}", mfu, memory, f"{found['first_s']:.1f}", first)
    return ROW.format(name, side, f"{ms:.3f}", ratio, *numbers, found.get("dispatches", "-"))


def print_floors(name: str, found: dict[str, Any]) -> None:
    """Kernels of our step, those first that are furthest from their floor."""
    from gpt_jax.runs.kernel_floors import kernel_times

    profile = found["profile"]
    bandwidth, rate = profile["bytes_per_second"], profile["flops_per_second"]
    print(
        f"\n{name}: {found['ms']:.3f} ms a step; copy {bandwidth / 1e9:,.0f} GB/s, product {rate / 1e12:,.1f} TFLOP/s"
    )
    phases: collections.Counter[str] = collections.Counter()
    for dispatch in profile["dispatches"]:
        phases[dispatch["phase"] or "other"] += dispatch["seconds"]
    print("each dispatch alone, ms: " + ", ".join(f"{phase} {1e3 * s:.2f}" for phase, s in phases.most_common()))
    row = "{:<44} {:>5} {:>9} {:>9} {:>9} {:>7}"
    print(row.format("kernel", "calls", "ms", "floor ms", "gap ms", "bound"))
    kernels = kernel_times(profile)
    for kernel in kernels:
        times = (kernel.seconds, kernel.floor, kernel.seconds - kernel.floor)
        print(row.format(kernel.name[:44], kernel.calls, *(f"{1e3 * x:.3f}" for x in times), kernel.bound))
    whole, floor = sum(kernel.seconds for kernel in kernels), sum(kernel.floor for kernel in kernels)
    times = (f"{1e3 * x:.3f}" for x in (whole, floor, whole - floor))
    print(row.format("all", sum(kernel.calls for kernel in kernels), *times, ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "chat-f32,chat-bf16,124m-b1,124m-b4,124m-b16"
    parser.add_argument("--cases", default=default, help=f"of {', '.join(CASES)}, or chat-bf16-b32-t512 and the like")
    parser.add_argument(
        "--rivals", default=",".join(RIVALS), help="beside vulkan; those that are not there are left out"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--no-warm", action="store_true", help="leave out the second process, of the warm caches")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--side", choices=("vulkan", *RIVALS), help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.cases.split(",")
    for name in names:
        case_of(name)
    if options.side:
        print(json.dumps(run_side(options.side, case_of(names[0]), options.steps, options.profile)))
        return 0
    sides = ["vulkan", *(side for side in filter(None, options.rivals.split(",")) if have(side))]
    found = dict(table(names, sides, options.steps, not options.no_warm))
    for name, ours in found.items():
        print_floors(name, ours)
    if options.json:
        options.json.write_text(json.dumps(found))
    return 0 if len(found) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
