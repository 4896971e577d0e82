"""Times the exchange of gradients alone: GB/s through memory that devices import and through gloo, beside memcpy.

    python benchmarks/exchange.py [--devices 0,1] [--megabytes 498] [--dtype float32] [--no-gloo]

Each device has a process of its own. Rows, in GB/s (10^9) of one process while all do the same:

    memcpy            numpy copies host memory to host memory, on one core
    out; in           a device copies its memory into shared memory; shared memory into its own; imported, and as mapped
                      memory that the host copies
    exchange, moved   all that an exchange moves out of a device and into it, over its time; array: the array's bytes
    gloo, array       an all-reduce by JAX's collectives of processors, of host memory: the array's bytes over its time

All but the last two once with the first process alone, and once with all at the same time.

--paper BUS,MEMORY,NETWORK runs nothing: it gives the milliseconds of an exchange that these bandwidths in GB/s, of a
device's bus each way, of a host's memory and of its network each way, allow, for GPT-2 of 124M and 1.5B parameters.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPEATS = 5


def seconds(act: Callable[[], Any]) -> float:
    """The least time of a few runs, after one to warm up."""
    act()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        act()
        times.append(time.perf_counter() - begin)
    return min(times)


def run_process(options: argparse.Namespace) -> dict[str, float]:
    """Measures, in one of the processes."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    import ml_dtypes
    import numpy as np

    from vk_kernels.bridge.host_exchange import HostExchange
    from vk_kernels.runtime.array import Array, array_type
    from vk_kernels.runtime.array_spec import ArraySpec
    from vk_kernels.runtime.host_links import HostLinks
    from vk_kernels.runtime.open_devices import open_device
    from vk_kernels.runtime.shared_memory import PAGE, SharedMemory, SharedRange, can_import

    device, index, count = open_device(), options.index, options.count
    links = HostLinks(options.name, index, count, 600)
    nbytes = int(options.megabytes * 1e6) // PAGE * PAGE
    part = min(nbytes, 64 << 20)
    found: dict[str, float] = {"imports": can_import(device)}
    token = 0

    def together(name: str, act: Callable[[], Any], moved: int) -> None:
        """Measures alone, then on all processes at once."""
        nonlocal token
        for others in (False, True):
            token += 1
            links.announce(token)
            links.await_all(token)
            if others or index == 0:
                found[f"{name}, {'all at once' if others else 'one alone'}"] = moved / seconds(act) / 1e9

    source, target = np.ones(part, np.uint8), np.ones(part, np.uint8)
    together("memcpy", lambda: np.copyto(target, source), part)
    own = device.buffer(part)
    for imports in (True, False):
        if imports and not found["imports"]:
            continue
        shared = SharedRange(device, SharedMemory.create(part), 0, part, imports)
        recorders = device.new_recorder(replay=True), device.new_recorder(replay=True)
        recorders[0].copy(own, shared.buffer)
        recorders[1].copy(shared.buffer, own)

        def out(recorder: Any = recorders[0], shared: Any = shared) -> None:
            recorder.submit().wait()
            shared.publish(part)

        def back(recorder: Any = recorders[1], shared: Any = shared) -> None:
            shared.fetch(part)
            recorder.submit().wait()

        kind = "imported" if imports else "mapped and copied"
        together(f"out, {kind}", out, part)
        together(f"in, {kind}", back, part)
    dtype = np.dtype(getattr(ml_dtypes, options.dtype, options.dtype))
    sizes = [min(32 << 20, nbytes - start) // dtype.itemsize for start in range(0, nbytes, 32 << 20)]
    specs = [ArraySpec((size,), dtype) for size in sizes]
    arrays = [Array(device.upload(np.ones(size, dtype)), array_type((size,), dtype, False)) for size in sizes]
    exchange = HostExchange(device, links, specs)

    def whole() -> None:
        exchange(arrays)
        exchange.finish()

    taken = seconds(whole)
    found |= {
        "exchange, ms": 1e3 * taken,
        "exchange, moved": exchange.nbytes / taken / 1e9,
        "exchange, array": nbytes / taken / 1e9,
        "waiting, ms": 1e3 * exchange.traffic.waited / exchange.traffic.exchanges,
    }
    if options.gloo:
        found["gloo, array"] = nbytes / gloo_seconds(options, nbytes, dtype) / 1e9
    return found


def gloo_seconds(options: argparse.Namespace, nbytes: int, dtype: Any) -> float:
    """Seconds of an all-reduce of an array over all processes, through JAX's collectives of processors."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices("cpu")), ("process",))
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    own = jax.device_put(np.ones((1, nbytes // dtype.itemsize), dtype), jax.local_devices(backend="cpu")[0])
    whole = jax.make_array_from_single_device_arrays((options.count, *own.shape[1:]), sharding, [own])
    add = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "process"),
            mesh=mesh,
            in_specs=PartitionSpec("process"),
            out_specs=PartitionSpec(None),
        )
    )
    return seconds(lambda: add(whole).block_until_ready())


def paper_seconds(nbytes: float, devices: int, hosts: int, bandwidths: list[float]) -> list[float]:
    """The least time of each of bus, memory and network; see docs/scaling.md."""
    bus, memory, network = (1e9 * each for each in bandwidths)
    into = 2 * nbytes * (devices - 1) / devices
    return [max(nbytes, into) / bus, devices * (nbytes + into) / memory, 2 * nbytes * (hosts - 1) / hosts / network]


def print_paper(bandwidths: list[float]) -> None:
    row = "{:<6} {:<9} {:>8} {:>6} {:>8} {:>8} {:>8}"
    print(row.format("model", "wire", "devices", "hosts", "bus", "memory", "network"))
    for model, parameters in (("124M", 124_439_808), ("1.5B", 1_557_611_200)):
        for wire, size in (("float32", 4), ("bfloat16", 2)):
            for devices, hosts in ((2, 1), (8, 1), (8, 64)):
                found = paper_seconds(size * parameters, devices, hosts, bandwidths)
                print(row.format(model, wire, devices, hosts, *(f"{1e3 * each:.0f}" for each in found)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="0,1", help="as VK_KERNELS_DEVICE takes them, one a process")
    parser.add_argument("--megabytes", type=float, default=498, help="of the array; GPT-2 of 124M has 498 in float32")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--gloo", action=argparse.BooleanOptionalAction, default=True)
    for name, kind in (("name", str), ("index", int), ("count", int), ("port", int)):
        parser.add_argument(f"--{name}", type=kind, default=0 if kind is int else "", help=argparse.SUPPRESS)
    parser.add_argument("--paper", metavar="BUS,MEMORY,NETWORK", help="print what an exchange costs by these, in GB/s")
    options = parser.parse_args()
    if options.paper:
        print_paper([float(each) for each in options.paper.split(",")])
        return 0
    if options.count:
        if options.gloo:
            import jax

            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(
                f"127.0.0.1:{options.port}", options.count, options.index, cluster_detection_method="deactivate"
            )
        print(json.dumps(run_process(options)), flush=True)
        return 0
    devices = options.devices.split(",")
    arguments = [f"--{name}={getattr(options, name)}" for name in ("megabytes", "dtype")]
    arguments += [f"--count={len(devices)}", f"--name={uuid.uuid4().hex}", f"--port={29000 + os.getpid() % 999}"]
    arguments.append("--gloo" if options.gloo else "--no-gloo")
    started = [
        subprocess.Popen(
            [sys.executable, __file__, f"--index={index}", *arguments],
            env=os.environ | {"VK_KERNELS_DEVICE": device, "PYTHONPATH": str(HERE.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, device in enumerate(devices)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        return 1
    found = [json.loads(out.splitlines()[-1]) for out in said]
    print(f"{options.megabytes:g} MB of {options.dtype}, {len(devices)} processes on devices {options.devices}, GB/s")
    imports = [each.pop("imports") for each in found]
    print("shared memory is imported" if all(imports) else "shared memory is not imported by all")
    for name in found[0]:
        print(f"{name:<36} " + "  ".join(f"{each[name]:8.2f}" for each in found if name in each))
    return 0


if __name__ == "__main__":
    sys.exit(main())
