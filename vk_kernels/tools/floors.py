"""Each dispatch of a compiled step beside its bounds: its bytes, its products, and the device's measured ceilings."""

import statistics
import struct
import time
from typing import Any

import numpy as np

from vk_kernels.bridge.jit import device_put, jit
from vk_kernels.bridge.profile import layer_of, phase_of
from vk_kernels.ops.attention.planner import forward_flops
from vk_kernels.ops.matmul.api import matmul
from vk_kernels.ops.planning import copy_dispatch
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.command_buffer import CommandRecorder
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.dispatch_plan import Plan, record
from vk_kernels.runtime.program import Command

_WARM = 2.0  # seconds: after a rest a GPU's clocks are low for that long
_ATTENTION_PRODUCTS = {"attention_forward": 2, "attention_dq": 3, "attention_dkv": 4}


def profile_with_floors(
    jitted: Any,
    arguments: tuple[Any, ...],
    device: Device,
    dtype: str,
    attention_shape: tuple[int, int, int, int],
    repeats: int = 1,
) -> dict[str, Any]:
    """Times each dispatch of a call, whose arguments stay, also donated ones; measures the device's ceilings.

    Args:
      jitted: of `vk_kernels.jit`.
      dtype: of the products.
      attention_shape: (B, T, H, D) of the operands of its attention.
      repeats: profiles, of whose times the medians count.

    Returns:
      As JSON has it: device, bytes_per_second, flops_per_second, and dispatches in order, each with label, scope,
      phase, layer, seconds, bytes that it reads and writes, and flops, of its products alone: all else is bound by
      bytes.
    """
    profiles = [jitted.profile(*arguments) for _ in range(repeats)]
    commands = [command for command in jitted.lower(*arguments).program.commands if 0 not in command.groups]
    dispatches = [
        {
            "label": command.label,
            "scope": command.scope,
            "phase": phase_of(command.scope),
            "layer": layer_of(command.scope),
            "seconds": statistics.median(profile.rows[i][2] for profile in profiles),
            "bytes": sum(place.nbytes for place in set(command.operands)),
            "flops": product_flops(command, attention_shape),
        }
        for i, command in enumerate(commands)
    ]
    bandwidth, rate = ceiling_rates(device, dtype)
    ceilings = {"bytes_per_second": bandwidth, "flops_per_second": rate}
    return {"device": device.info.name, **ceilings, "dispatches": dispatches}


def product_flops(command: Command, attention_shape: tuple[int, int, int, int]) -> float:
    """FLOPs that a dispatch executes in products, attention's scores where it makes them again too; 0 for all else.

    The useful ones of a whole call are its `cost`.
    """
    name = command.label
    if name.startswith("matmul") and not name.startswith(("matmul_finish", "matmul_column")):
        m, n, k, batches = struct.unpack_from("<4I", command.push_constants)
        return 2.0 * m * n * k * batches
    count = next((n for kernel, n in _ATTENTION_PRODUCTS.items() if name.startswith(kernel)), 0)
    return count / 2 * forward_flops(attention_shape)


def ceiling_rates(device: Device, dtype: str, repeats: int = 20) -> tuple[float, float]:
    """Bytes a second of a large copy, FLOPs a second of a large product by the variant that the device prefers."""
    warm = 0.0 if device.info.kind == "cpu" else _WARM
    return copy_rate(device, repeats, warm), product_rate(device, dtype, repeats, warm)


def copy_rate(device: Device, repeats: int, warm: float = 0.1) -> float:
    """Bytes a second of a large copy, read and written ones."""
    array = ArraySpec((1 << (22 if device.info.kind == "cpu" else 26),), np.dtype(np.float32))  # more than caches hold
    buffers = [device.upload(random_array(array, 1)), device.buffer(array.nbytes)]
    recorder = device.new_recorder(timestamps=1, replay=True)
    record(recorder, Plan((copy_dispatch(array, 0, 1),)), buffers)
    recorder.end()
    seconds = replay_seconds(recorder, repeats, warm)
    recorder.close()
    return 2 * array.nbytes / seconds


def product_rate(device: Device, dtype: str, repeats: int, warm: float = 0.1) -> float:
    """FLOPs a second of a large product."""
    product, operands = large_product(device, dtype)
    times, start = [], time.perf_counter()
    while len(times) < repeats or time.perf_counter() < start + warm:
        times.append(product.profile(*operands).seconds)
    return 2 * operands[0].shape[0] ** 3 / statistics.median(times[-repeats:])


def large_product(device: Device, dtype: str) -> tuple[Any, list[Any]]:
    """A product by the kernels of products, and its square matrices."""
    n = 256 if device.info.kind == "cpu" else 4096
    index = str(device.info.index)
    operands = [device_put(random_array(ArraySpec((n, n), np.dtype(dtype)), 1), index) for _ in range(2)]
    return jit(matmul, device=index), operands


def random_array(array: ArraySpec, largest: int) -> np.ndarray:
    """Normal numbers, or integers in [0, largest): never zeros, on which a device can be faster than on data."""
    rng = np.random.default_rng(0)
    if array.dtype.kind in "iu":
        return rng.integers(0, largest, array.shape).astype(array.dtype)
    values = rng.standard_normal(min(array.size, 1 << 20), np.float32)  # over and over: to draw many takes seconds
    return np.resize(values, array.shape).astype(array.dtype)


def replay_seconds(recorder: CommandRecorder, repeats: int, warm: float = 0.1) -> float:
    """Median device time of `repeats`, after `warm` seconds of them: after a rest a device's clocks are low."""
    times, start = [], time.perf_counter()
    while len(times) < repeats + 3 or time.perf_counter() < start + warm:
        times.append(sum(seconds for _, seconds in recorder.submit().timings()))
    return statistics.median(times[-repeats:])
