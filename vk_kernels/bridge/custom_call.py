"""The custom call: host arrays in, one plan on a Vulkan device, host arrays out. No JAX from here on.

A call is known by its encoded string (see `op_call`) and by the shapes of its arrays.
"""

import atexit
import contextlib
import ctypes
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vk_kernels.bridge import xla_ffi
from vk_kernels.bridge.xla_ffi import CallError, HostArray
from vk_kernels.compiler.op_call import decode_call, describe_call, make_plan
from vk_kernels.errors import FeatureError, VulkanError
from vk_kernels.runtime import dispatch_plan as plans
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.dispatch_plan import Plan
from vk_kernels.runtime.memory import Buffer
from vk_kernels.runtime.open_devices import open_device

CUSTOM_CALL = "vk_kernels"  # the custom call's name in a compiled program

# A device that shares its memory with the host works on XLA's buffers themselves from this size on; below it, two
# copies are quicker than an import (lavapipe, 2 cores: 80 us an import; a MiB there and back 150 us).
IMPORT_BYTES = 1 << 20
_SHARED_MEMORY = ("cpu", "integrated")  # device kinds

_counts: Counter[str] = Counter()
_counts_lock = threading.Lock()


def counts() -> dict[str, int]:
    """Counts of the calls that ran each kernel ('name.variant') since the process began."""
    with _counts_lock:
        return dict(_counts)


def _run(call: bytes, inputs: Sequence[HostArray], outputs: Sequence[HostArray]) -> None:
    """Runs one custom call; see xla_ffi.HostFunction."""
    op, _, site = decode_call(call)
    takes, gives = (tuple(host.array for host in hosts) for hosts in (inputs, outputs))
    what = describe_call(op, takes)
    with _calls:
        try:
            device = open_device(site.device)
            plan = make_plan(device, call, takes, gives)
            _execute(device, plan, inputs, outputs, what)
        except (VulkanError, ValueError) as error:
            message = str(error) if what in str(error) else f"{what}: {error}"
            raise CallError(_code(error), f"{type(error).__name__}: {message}") from error


def _code(error: Exception) -> int:
    if isinstance(error, MemoryError):
        return xla_ffi.RESOURCE_EXHAUSTED
    if isinstance(error, TimeoutError):
        return xla_ffi.DEADLINE_EXCEEDED
    return xla_ffi.INVALID_ARGUMENT if isinstance(error, (ValueError, FeatureError)) else xla_ffi.INTERNAL


def _execute(device: Device, plan: Plan, inputs: Sequence[HostArray], outputs: Sequence[HostArray], what: str) -> None:
    if not plan.dispatches:
        return
    with _imported(device, inputs) as own_inputs, _imported(device, outputs) as own_outputs:
        sources = [own or device.upload(host.view()) for own, host in zip(own_inputs, inputs, strict=True)]
        results = [own or device.buffer(host.array.nbytes) for own, host in zip(own_outputs, outputs, strict=True)]
        plans.execute(device, plan, sources, results, what)
        for own, result, host in zip(own_outputs, results, outputs, strict=True):
            if own is None:
                result.read_into(host.view())
    with _counts_lock:
        _counts.update(f"{d.kernel}.{d.variant}" if d.variant else d.kernel for d in plan.dispatches)


@contextlib.contextmanager
def _imported(device: Device, hosts: Sequence[HostArray]) -> Iterator[list[Buffer | None]]:
    """The hosts' memory itself as buffers of the device, or None for each that a copy is better or needed for."""
    buffers = []
    try:
        for host in hosts:
            buffers.append(_import(device, host))
        yield buffers
    finally:  # XLA's memory must be let go of before XLA takes it back
        imported = [buffer for buffer in buffers if buffer is not None]
        for buffer in imported:
            buffer.owner.free()
        if imported:
            device.collect()


def _import(device: Device, host: HostArray) -> Buffer | None:
    page, alignment = device.limits.host_import_alignment, device.limits.storage_buffer_alignment
    nbytes = host.array.nbytes
    if not page or device.info.kind not in _SHARED_MEMORY or nbytes < IMPORT_BYTES:
        return None
    start = host.address // page * page
    # Kernels may write the last word of an array in full, which must then be the array's own.
    if (host.address - start) % alignment or nbytes % 4:
        return None
    size = -(-(host.address + nbytes - start) // page) * page
    memory: Any = (ctypes.c_uint8 * size).from_address(start)
    pages = np.frombuffer(memory, np.uint8)
    try:
        return device.import_host(pages).slice(host.address - start, nbytes)
    except VulkanError:  # some drivers refuse some memory, as that of files
        return None


class _Calls:
    """Knows the calls that run, so that the process ends neither in the midst of one nor before the next.

    A thread of XLA that wants to call into a Python that has ended never comes back, and XLA waits for it for ever. A
    program whose results nobody holds can still be running then, and nothing tells: so the end waits until there has
    been no call for a while.
    """

    QUIET_SECONDS = 0.25

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self._ended = False
        self._last = -math.inf  # when a call last ended, or was refused

    def __enter__(self) -> None:
        with self._condition:
            if self._ended:
                self._last = time.monotonic()
                raise CallError(xla_ffi.CANCELLED, "the process is ending")
            self._running += 1

    def __exit__(self, *_) -> None:
        with self._condition:
            self._running -= 1
            self._last = time.monotonic()
            self._condition.notify_all()

    def end(self) -> None:
        """Refuses further calls, and returns when none has run for a while; one ends within its device's time limit."""
        with self._condition:
            self._ended = True
            while self._running or self._last + self.QUIET_SECONDS > time.monotonic():
                self._condition.wait(self.QUIET_SECONDS)


_calls = _Calls()
atexit.register(_calls.end)  # exit handlers run last in, first out: before the one that closes the devices
xla_ffi.register(CUSTOM_CALL, _run)
