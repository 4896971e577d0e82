"""Times data-parallel training on Vulkan devices of this host beside one of them, and compares the losses.

    python benchmarks/data_parallel.py [--case 124m-plain-b16] [--devices 0,1] [--steps 50] [--dtype float32,bfloat16]
    python benchmarks/data_parallel.py --case chat-bf16 --devices 0,0        (two processes on one device)

Each device has a process of its own and a batch of the case's size, so that N devices do N times the work in a step.
ms is the median over the steps, in tens, after a warm-up. Of process 0: exchange is the time of a step between the end
of its gradient's computation and the end of the exchange, which overlaps with nothing; waiting is spent waiting for
other processes, beside computation or not; moved is what the exchange moves out of a device and into it. "scaling" is
the tokens a second of all over those of one device alone. --no-overlap: all of the exchange comes after the gradient.

Rivals are XLA with its own collectives (NCCL), one process for all devices, beside the same on one: xla-replicated,
xla-fsdp, and with the fused attention of train_step.py's rival of that name cudnn-replicated, cudnn-fsdp.

With --check K the losses of K steps are compared with those of one device that has the whole batch.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from train_step import WARM_UP, case_of, fuse_attention, matmul_precision, reason

HERE = Path(__file__).resolve().parent
BATCHES = 8
ROW = "{:<16} {:<9} {:<9} {:>7} {:>9} {:>12} {:>8} {:>12} {:>11} {:>10}"


def run_process(options: argparse.Namespace) -> dict[str, Any]:
    """One process of `options.count`; with one alone, the step that a run on one device has."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    import numpy as np
    from program import fresh_leaves, make_step, random_batch

    import vk_kernels
    from gpt_jax.training.cut_step import make_cut_step
    from gpt_jax.training.programs import abstract_state
    from vk_kernels.bridge.host_exchange import HostExchange
    from vk_kernels.runtime.host_links import HostLinks
    from vk_kernels.runtime.open_devices import open_device

    device = open_device()
    if not options.overlap:
        device.exchange_queue = device.send_queue = device.receive_queue = device.queue
    config = case_of(options.case).load()
    index, count, size = options.index, options.count, config.batch_size
    whole = config.copy_and_resolve_references()
    whole.batch_size = size * max(count, options.shares)

    def batch(seed: int) -> dict[str, np.ndarray]:
        rows = slice(index * size, (index + 1) * size) if count > 1 else slice(None)
        return {name: x[rows] for name, x in random_batch(whole, seed).items()}

    traffic = None
    if count > 1:

        def make_exchange(device: Any, specs: Any) -> HostExchange:
            nonlocal traffic
            exchange = HostExchange(device, HostLinks(options.name, index, count, 600), specs)
            traffic = exchange.traffic
            return exchange

        shapes = abstract_state(config)
        config.exchange_dtype = options.dtype
        step: Any = make_cut_step(
            config,
            shapes,
            make_exchange,
            vk_kernels.jit,
            first_text=index * size,
            bucket_bytes=int(options.bucket * 1e6) or None,
        )
    else:
        step, shapes, _ = make_step(whole)
        step = vk_kernels.jit(step, donate_argnums=0)
    leaves = vk_kernels.device_put(fresh_leaves(shapes))
    batches = [batch(seed) for seed in range(BATCHES)]
    losses = []
    for i in range(options.check):
        leaves, metrics = step(leaves, batches[i % BATCHES])
        losses.append(float(metrics["loss"]))
    found: dict[str, Any] = {"losses": losses}
    if options.steps:
        for _ in range(2):
            leaves, metrics = step(leaves, batches[0])
        float(metrics["loss"])
        began = time.perf_counter()
        leaves, metrics = step(leaves, batches[0])
        float(metrics["loss"])
        # The same number of steps on all processes: each waits for the others in every one.
        for _ in range(options.warm or 1 + int(WARM_UP / (time.perf_counter() - began))):
            leaves, metrics = step(leaves, batches[0])
        float(metrics["loss"])
        times, before = [], vars(traffic).copy() if traffic else None
        for _ in range(max(1, options.steps // 10)):
            begin = time.perf_counter()
            for i in range(10):
                leaves, metrics = step(leaves, batches[i % BATCHES])
            float(metrics["loss"])
            times.append((time.perf_counter() - begin) / 10)
        found |= {"ms": 1e3 * statistics.median(times), "tokens": batches[0]["inputs"].size}
        if traffic:
            since = {name: value - before[name] for name, value in vars(traffic).items()}
            found |= {name: value / since["exchanges"] for name, value in since.items()}
    state = [np.asarray(leaf) for leaf in leaves]
    return found | {
        "bits": hex(hash(b"".join(leaf.tobytes() for leaf in state)) & (2**64 - 1)),
        "device": device.info.name + (", memory imported" if traffic and step.exchange.imports else ""),
        "memory": device.memory.peak,
    }


def run_xla(options: argparse.Namespace) -> dict[str, Any]:
    """The same step through XLA, in this process, on its first `shares` devices."""
    import jax
    from program import fresh_leaves, random_batch

    from gpt_jax.distributed.mesh import OnMesh
    from gpt_jax.training.programs import abstract_state, make_train_step
    from gpt_jax.training.steps import on_leaves

    if len(jax.devices()) < options.shares:
        sys.exit(
            f"XLA has {len(jax.devices())} devices of platform {jax.default_backend()}, {options.shares} are needed"
        )
    config = case_of(options.case).load()
    config.batch_size *= options.shares
    compiler, mode = options.xla.split("-")
    if compiler == "cudnn":
        fuse_attention()
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    mesh = OnMesh(jax.devices()[: options.shares], mode)
    shapes = abstract_state(config)
    step = on_leaves(make_train_step(config, mesh), jax.tree.structure(shapes))
    step = jax.jit(step, donate_argnums=0, **mesh.step_options(shapes))
    state = jax.tree.unflatten(jax.tree.structure(shapes), fresh_leaves(shapes))
    leaves = tuple(jax.tree.leaves(mesh.put(state)))
    batches = [random_batch(config, seed) for seed in range(BATCHES)]
    until = None
    times = []
    while until is None or time.perf_counter() < until or len(times) < max(1, options.steps // 10):
        begin = time.perf_counter()
        for batch in batches:
            leaves, metrics = step(leaves, mesh.batch(batch))
        float(metrics["loss"])
        if until is None:
            until = time.perf_counter() + WARM_UP
        elif time.perf_counter() > until:
            times.append((time.perf_counter() - begin) / BATCHES)
    return {"ms": 1e3 * statistics.median(times), "tokens": batches[0]["inputs"].size}


def start(options: argparse.Namespace, devices: list[str], **more: Any) -> list[dict[str, Any]]:
    """Runs a process on each of some devices; returns what each found. Raises RuntimeError with what went wrong."""
    settings = {**vars(options), "name": uuid.uuid4().hex, "count": len(devices), "bucket": 0, **more}
    passed_on = ("case", "steps", "check", "dtype", "name", "count", "shares", "bucket")
    arguments = [f"--{name}={settings[name]}" for name in passed_on]
    arguments += [f"--xla={settings['xla']}"] if settings["xla"] else []
    arguments += [f"--warm={settings['warm']}", "--overlap" if options.overlap else "--no-overlap"]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, f"--index={index}", *arguments],
            env=os.environ | {"VK_KERNELS_DEVICE": device, "PYTHONPATH": str(HERE.parent), "PYTHONHASHSEED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, device in enumerate(devices)
    ]
    ends = time.monotonic() + options.limit
    try:
        said = [process.communicate(timeout=max(0.0, ends - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took over {options.limit:.0f} s") from None
    finally:
        for process in started:
            process.kill()  # nothing to one that has ended
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip() or f"ended with {process.returncode}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def compare_speed(options: argparse.Namespace, devices: list[str]) -> None:
    names = "case", "devices", "wire", "bucket", "ms", "tokens/s", "scaling", "exchange ms", "waiting ms", "moved MB"
    print(ROW.format(*names))
    [alone] = start(options, devices[:1], shares=1, check=0)
    rate = alone["tokens"] / alone["ms"] * 1e3
    row = f"{alone['ms']:.2f}", f"{rate:,.0f}", "1.00", "-", "-", "-"
    print(ROW.format(options.case, "1", "-", "-", *row), flush=True)
    warm = 1 + int(1e3 * WARM_UP / alone["ms"])
    for dtype, bucket in itertools.product(filter(None, options.dtype.split(",")), options.buckets.split(",")):
        found = start(options, devices, shares=1, check=0, dtype=dtype, warm=warm, bucket=bucket)
        first, every = found[0], sum(each["tokens"] for each in found)
        ms = max(each["ms"] for each in found)
        row = [options.case, ",".join(devices), dtype, "-" if bucket == "0" else bucket, f"{ms:.2f}"]
        row += [f"{every / ms * 1e3:,.0f}", f"{every / ms * 1e3 / rate:.2f}"]
        row += [f"{1e3 * first['exposed']:.2f}", f"{1e3 * first['waited']:.2f}", f"{first['nbytes'] / 1e6:,.1f}"]
        print(ROW.format(*row), flush=True)
        same = len({each["bits"] for each in found}) == 1
        print(f"  on {', '.join(each['device'] for each in found)}; states bit-equal: {same}", flush=True)


def compare_rivals(options: argparse.Namespace, count: int) -> bool:
    """Whether all of them ran."""
    ok = True
    rates: dict[str, float] = {}  # tokens a millisecond on one device, by compiler
    for rival in options.rivals.split(","):
        compiler, _, mode = rival.partition("-")
        for shares in (count,) if compiler in rates else (1, count):
            rival = f"{compiler}-{mode if shares > 1 else 'replicated'}"
            try:
                [found] = start(options, [""], shares=shares, check=0, xla=rival)
            except RuntimeError as error:
                print(f"{options.case:<16} {shares:<9} {rival} failed: {reason(str(error))}", flush=True)
                ok = False
                break
            each = found["tokens"] / found["ms"]
            row = f"{found['ms']:.2f}", f"{1e3 * each:,.0f}", f"{each / rates.setdefault(compiler, each):.2f}"
            print(ROW.format(options.case, shares, compiler, mode, *row, "-", "-", "-"), flush=True)
    return ok


def compare_losses(options: argparse.Namespace, devices: list[str]) -> bool:
    """Whether the processes end with the same bits; prints how far their losses are from one device's."""
    [alone] = start(options, devices[:1], shares=len(devices), steps=0)
    equal = True
    for dtype in filter(None, options.dtype.split(",")):
        found = start(options, devices, shares=len(devices), steps=0, dtype=dtype)
        pairs = list(zip(found[0]["losses"], alone["losses"], strict=True))
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        same = len({each["bits"] for each in found}) == 1
        equal &= same
        print(
            f"{options.case}, {dtype} on the wire, {len(pairs)} steps of {len(devices)} devices beside one with all: "
            f"losses {pairs[0][0]:.6f} -> {pairs[-1][0]:.6f}, apart {apart:.1e} at most; states bit-equal: {same}",
            flush=True,
        )
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="124m-plain-b16", help="as in benchmarks/train_step.py")
    parser.add_argument("--devices", default="0,1", help="as VK_KERNELS_DEVICE takes them, one a process")
    parser.add_argument("--steps", type=int, default=50, help="0: no times")
    parser.add_argument("--check", type=int, default=0, help="steps whose losses are compared")
    parser.add_argument("--dtype", default="float32,bfloat16", help="of gradients on their way")
    parser.add_argument("--buckets", default="0", help="MB of a bucket, several one after another; 0: the trainer's")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rivals", default="", help="of xla-replicated,xla-fsdp,cudnn-replicated,cudnn-fsdp")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a row may take")
    parser.add_argument("--bucket", type=float, help=argparse.SUPPRESS)
    for name, kind in (("xla", str), ("name", str), ("index", int), ("count", int), ("shares", int), ("warm", int)):
        parser.add_argument(f"--{name}", type=kind, default=0 if kind is int else "", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print(json.dumps(run_xla(options) if options.xla else run_process(options)))
        return 0
    devices = options.devices.split(",")
    try:
        ok = compare_losses(options, devices) if options.check else True
        if options.steps:
            compare_speed(options, devices)
        if options.rivals:
            ok &= compare_rivals(options, len(devices))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
