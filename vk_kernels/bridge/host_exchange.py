"""Sums of arrays over the devices of a host, one process each, through memory that all of them import.

An array is cut into as many slices as there are processes, and each process adds up one of them. On its way it is

    out      copied by the device into shared memory, but for the device's own slice;
    reduced  the device adds up its slice of all processes, in the order of their numbers, and copies it there too;
    gathered the device copies the other slices of the sum out of shared memory.

A device moves (n - 1) / n of the bytes out, reads as many to add up, writes 1 / n and gathers (n - 1) / n. Whoever adds
up does it in f32 and in one order, and all take the sum from where it lies: so it has the same bits on all devices,
of whatever vendor or speed. While one array is added up, the next is on its way out, and the last one comes back.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.compiler.pipeline import compile_graph, optimize
from vk_kernels.runtime.array import Array, array_type
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.command_buffer import CommandRecorder
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.executable import Executable
from vk_kernels.runtime.host_links import HostLinks
from vk_kernels.runtime.memory import ALIGNMENT, Buffer
from vk_kernels.runtime.shared_memory import PAGE, SharedMemory, SharedRange, can_import

SLOTS = 5  # arrays that have room in shared memory at a time, see `_send`
OUT, REDUCED, DONE = range(3)  # stages that a process announces, of an array or, the last one, of all


@dataclass
class Traffic:
    """Counts of all exchanges so far.

    waited: seconds for other processes. seconds: in all. nbytes: out of this device and into it.
    """

    exchanges: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    nbytes: int = 0


class _Bucket:
    """An array of given type on its way: its slices, and the commands that move it.

    size: elements. bounds: where the slices begin and end, in bytes. result: the sum.
    """

    def __init__(self, device: Device, spec: ArraySpec, count: int):
        self.spec = spec
        each = -(-spec.nbytes // count // ALIGNMENT) * ALIGNMENT
        self.bounds = [min(i * each, spec.nbytes) for i in range(count + 1)]
        self.result = device.buffer(spec.nbytes)
        self.source: Buffer | None = None  # that the commands were recorded for
        self.out: CommandRecorder
        self.reduce: CommandRecorder
        self.gather: CommandRecorder

    def nbytes(self, i: int) -> int:
        """The size of slice i."""
        return self.bounds[i + 1] - self.bounds[i]


class HostExchange:
    """Adds up arrays of given types over the processes of a host; every process calls it, in the same order.

    between: called with a slice of the sum in host memory, 1-D, to add to it, in place, what other hosts have.
    """

    def __init__(
        self,
        device: Device,
        links: HostLinks,
        specs: Sequence[ArraySpec],
        between: Callable[[np.ndarray], None] | None = None,
        imports: bool | None = None,
    ):
        """imports: whether the device works on the shared memory itself; None: if it can.

        Raises OutOfMemoryError where host or device has no room, LinkError for a process that does not come along.
        """
        self.device, self.links, self.between = device, links, between
        self.imports = can_import(device) if imports is None else imports
        self.traffic = Traffic()
        count, own = links.count, links.index
        self._buckets = [_Bucket(device, spec, count) for spec in specs]
        self._adders: dict[tuple[int, np.dtype], Executable] = {}
        self._busy = False  # whether the last exchange may still be gathering, here or elsewhere
        most = max((bucket.nbytes(0) for bucket in self._buckets), default=0)
        stride = max(1, -(-most // PAGE)) * PAGE
        slots = min(SLOTS, len(self._buckets))
        shared = self._share(max(1, slots) * count * (count + 1) * stride)

        def ranges(places: Sequence[int], slot: int) -> list[SharedRange]:
            first = slot * count * (count + 1)
            return [SharedRange(device, shared, (first + place) * stride, stride, self.imports) for place in places]

        # In a slot, first each owner's slices of all processes, then the sum's slices.
        everyone = range(count)
        self._sent = [ranges([owner * count + own for owner in everyone], slot) for slot in range(slots)]
        self._received = [ranges([own * count + other for other in everyone], slot) for slot in range(slots)]
        self._sums = [ranges([count * count + owner for owner in everyone], slot) for slot in range(slots)]

    def _share(self, nbytes: int) -> SharedMemory:
        """Memory that process 0 makes, the same on all."""
        if self.links.index:
            return SharedMemory(self.links.receive_handle(0), nbytes)
        shared = SharedMemory.create(nbytes)
        self.links.send_handle(shared.handle)
        return shared

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """The sums of arrays of the types that were announced; they stay as they are until the next call.

        Raises LinkError, naming the process that ended, hangs or adds up something else.
        """
        began = time.perf_counter()
        for k, array in enumerate(arrays):
            self._record(k, array)
        if self._busy:
            self._await(DONE)  # the shared memory is free again
        self._busy = True
        for k in range(len(self._buckets) + 1):
            if k < len(self._buckets):
                self._send(k)
            if k > 0:
                self._return(k - 1)
        self.device.wait(self._buckets[-1].gather.last_use)
        self.links.announce(DONE)
        self.traffic.exchanges += 1
        self.traffic.seconds += time.perf_counter() - began
        self.traffic.nbytes += self.nbytes
        return [Array(bucket.result, array.type) for bucket, array in zip(self._buckets, arrays, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes that an exchange moves out of this device and into it."""
        own, count = self.links.index, self.links.count
        return sum(2 * bucket.spec.nbytes + (count - 2) * bucket.nbytes(own) for bucket in self._buckets)

    def _send(self, k: int) -> None:
        """Brings an array into shared memory, and has the device add up its slice once all are there.

        The next array is on its way by then. Its slot is free: that others reduced array k - 2 says that they gathered
        all up to k - 4, which they had submitted before.
        """
        bucket, slot, own = self._buckets[k], k % SLOTS, self.links.index
        if k == 0:
            bucket.out.submit()
        self.device.wait(bucket.out.last_use)
        if k + 1 < len(self._buckets):
            self._buckets[k + 1].out.submit()
        for other in self.links.peers:
            self._sent[slot][other].publish(bucket.nbytes(other))
        self._meet(k, OUT)
        for other in self.links.peers:
            self._received[slot][other].fetch(bucket.nbytes(own))
        bucket.reduce.submit()

    def _return(self, k: int) -> None:
        """Brings an array's sum into the device, once all have added up their slices."""
        bucket, sums, own = self._buckets[k], self._sums[k % SLOTS], self.links.index
        self.device.wait(bucket.reduce.last_use)
        sums[own].publish(bucket.nbytes(own))
        if self.between and bucket.nbytes(own):
            self.between(sums[own].array[: bucket.nbytes(own)].view(bucket.spec.dtype))
        self._meet(k, REDUCED)
        for owner in self._gathered:
            sums[owner].fetch(bucket.nbytes(owner))
        bucket.gather.submit()

    @property
    def _gathered(self) -> list[int]:
        """The owners of the slices that are not in the device as they are to be."""
        return [*self.links.peers, *([self.links.index] if self.between else [])]

    def _meet(self, k: int, stage: int) -> None:
        token = k * (DONE + 1) + stage
        self.links.announce(token)
        self._await(token, f"in array {k} of {len(self._buckets)}")

    def _await(self, token: int, doing: str = "") -> None:
        began = time.perf_counter()
        self.links.await_all(token, f"adding up over {self.links.count} devices {doing}".strip())
        self.traffic.waited += time.perf_counter() - began

    def _record(self, k: int, array: Array) -> None:
        """Records the commands that move an array; they serve as long as it comes in the same memory."""
        bucket, source, slot, own = self._buckets[k], array.buffer, k % SLOTS, self.links.index
        if array.type.spec != bucket.spec:
            raise ValueError(f"array {k} is {array.type}, announced was {bucket.spec}")
        if bucket.source is source:
            return
        bucket.source = source
        bucket.out, bucket.reduce, bucket.gather = (self.device.new_recorder(replay=True) for _ in range(3))
        start, nbytes = bucket.bounds[own], bucket.nbytes(own)
        for other in self.links.peers:
            bucket.out.copy(source, self._sent[slot][other].buffer, bucket.nbytes(other), bucket.bounds[other])
        if nbytes:
            parts = [source.slice(start, nbytes) if i == own else x.buffer.slice(0, nbytes)
                     for i, x in enumerate(self._received[slot])]  # fmt: skip
            total = bucket.result.slice(start, nbytes)
            if len(parts) == 1:
                bucket.reduce.copy(*parts, total)
            else:
                self._adder(nbytes, bucket.spec.dtype).record(bucket.reduce, parts, [total])
            bucket.reduce.copy(total, self._sums[slot][own].buffer)
        for owner in self._gathered:
            bucket.gather.copy(
                self._sums[slot][owner].buffer, bucket.result, bucket.nbytes(owner), 0, bucket.bounds[owner]
            )
        for recorder in (bucket.out, bucket.reduce, bucket.gather):
            recorder.end()

    def _adder(self, nbytes: int, dtype: np.dtype) -> Executable:
        """The program that adds up a slice of all processes, in f32 and in their order."""
        key = nbytes, np.dtype(dtype)
        if key not in self._adders:
            part = jax.ShapeDtypeStruct((nbytes // key[1].itemsize,), dtype)
            closed = jax.make_jaxpr(_add_up)(*[part] * self.links.count)
            program = compile_graph(optimize(closed), self.device, [False] * self.links.count)
            kind = array_type(part.shape, key[1], False)
            self._adders[key] = Executable(self.device, program, [kind])
        return self._adders[key]


def _add_up(*parts: jax.Array) -> jax.Array:
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts[0].dtype)
