"""Sums of arrays over the devices of a host, one process each, through memory that all of them import.

An array is cut into as many slices as there are processes, and each process adds up one of them. On its way it is

    out      copied by the device into shared memory, but for the device's own slice;
    reduced  the device adds up its slice of all processes, in the order of their numbers, and copies it there too;
    gathered the device copies the other slices of the sum out of shared memory.

A device moves (n - 1) / n of the bytes out, reads as many to add up, writes 1 / n and gathers (n - 1) / n. Whoever adds
up does it in f32 and in one order, and all take the sum from where it lies: so it has the same bits on all devices,
of whatever vendor or speed. While one array is added up, the next is on its way out, and the last one comes back.

A device does all this on its `exchange_queue`, each array as soon as it is computed, while its other queue computes
what comes behind it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.bridge.leaves import type_of_aval
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
    """Counts of all exchanges so far, in seconds and bytes.

    seconds: from calls to returns, the computation of the arrays in it. exposed: the part of it after all of them were
    computed. waited: for other processes. nbytes: out of this device and into it.
    """

    exchanges: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    waited: float = 0.0
    nbytes: int = 0


class Packing(NamedTuple):
    """One flat array that is made of some of those of a call: `pack` of those with the numbers `inputs`."""

    inputs: tuple[int, ...]
    pack: Callable[..., jax.Array]


class _Bucket:
    """A flat array on its way: its slices, and the commands that move it.

    bounds: where the slices begin and end, in bytes. flat: the device's own part of the sum. result: the sum.
    """

    def __init__(self, device: Device, spec: ArraySpec, count: int):
        self.spec = spec
        each = -(-spec.nbytes // count // ALIGNMENT) * ALIGNMENT
        self.bounds = [min(i * each, spec.nbytes) for i in range(count + 1)]
        self.flat, self.result = device.buffer(spec.nbytes), device.buffer(spec.nbytes)
        self.sources: list[Buffer] = []  # that the commands were recorded for
        self.ready = 0  # the submission that computes the last of them
        self.sent = False  # whether `out` was submitted, and not waited for
        self.out: CommandRecorder
        self.reduce: CommandRecorder
        self.gather: CommandRecorder

    def nbytes(self, i: int) -> int:
        """The size of slice i."""
        return self.bounds[i + 1] - self.bounds[i]


class HostExchange:
    """Adds up flat arrays over the processes of a host; every process calls it, in the same order.

    between: called with a slice of a sum in host memory, to add to it, in place, what other hosts have, and with the
    elements of the longest slice of any process.
    """

    def __init__(
        self,
        device: Device,
        links: HostLinks,
        specs: Sequence[ArraySpec],
        packings: Sequence[Packing],
        between: Callable[[np.ndarray, int], None] | None = None,
        imports: bool | None = None,
    ):
        """specs: of a call's arrays. packings: of what is added up, in the order in which it is ready. imports: whether
        the device works on the shared memory itself; None: if it can.

        Raises OutOfMemoryError where host or device has no room, LinkError for a process that does not come along.
        """
        self.device, self.links, self.between = device, links, between
        self._queue = device.exchange_queue
        self.imports = can_import(device) if imports is None else imports
        self.traffic = Traffic()
        self._packings = packings
        count, own = links.count, links.index
        self._specs = specs
        shapes = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs]
        flat = [jax.eval_shape(pack, *map(shapes.__getitem__, inputs)) for inputs, pack in packings]
        self._types = [array_type(each.shape, np.dtype(each.dtype), False) for each in flat]
        self._buckets = [_Bucket(device, kind.spec, count) for kind in self._types]
        self._packers = [self._compile(pack, *map(shapes.__getitem__, inputs)) for inputs, pack in packings]
        self._adders: dict[Any, Executable] = {}
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
            return SharedMemory.receive(self.links, nbytes)
        shared = SharedMemory.create(nbytes)
        self.links.send_handle(shared.handle)
        return shared

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """The sums, flat, of arrays of the types that were announced; they stay as they are until the next call.

        Raises LinkError, naming the process that ended, hangs or adds up something else.
        """
        began = time.perf_counter()
        for i, (array, spec) in enumerate(zip(arrays, self._specs, strict=True)):
            if array.type.spec != spec:
                raise ValueError(f"array {i} is {array.type}, announced was {spec}")
        for k, (inputs, _) in enumerate(self._packings):
            self._record(k, [arrays[i].buffer for i in inputs])
        self._computed, self._last_ready = 0.0, max(bucket.ready for bucket in self._buckets)
        if self._busy:
            self._await(DONE)  # the shared memory is free again
        self._busy = True
        for k in range(len(self._buckets) + 1):
            if k < len(self._buckets):
                self._send(k)
            if k > 0:
                self._return(k - 1)
        end = self._buckets[-1].gather.last_use
        self._queue.wait(end)
        if self._queue is not self.device.queue:
            self.device.queue.follow(self._queue, end)
        self.links.announce(DONE)
        self.traffic.exchanges += 1
        self.traffic.seconds += time.perf_counter() - began
        self.traffic.exposed += time.perf_counter() - self._computed
        self.traffic.nbytes += self.nbytes
        return [Array(bucket.result, kind) for bucket, kind in zip(self._buckets, self._types, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes that an exchange moves out of this device and into it."""
        own, count = self.links.index, self.links.count
        return sum(2 * bucket.spec.nbytes + (count - 2) * bucket.nbytes(own) for bucket in self._buckets)

    def _send(self, k: int) -> None:
        """Brings an array into shared memory, and has the device add up its slice once all are there.

        The next array is on its way by then, if it is computed. Its slot is free: that others reduced array k - 2 says
        that they gathered all up to k - 4, which they had submitted before.
        """
        bucket, slot, own = self._buckets[k], k % SLOTS, self.links.index
        self.device.wait(bucket.ready)
        if bucket.ready == self._last_ready and not self._computed:
            self._computed = time.perf_counter()
        if not bucket.sent:
            self._submit_out(bucket)
        self._queue.wait(bucket.out.last_use)
        bucket.sent = False
        if k + 1 < len(self._buckets) and self._buckets[k + 1].ready <= self.device.completed():
            self._submit_out(self._buckets[k + 1])
        for other in self.links.peers:
            self._sent[slot][other].publish(bucket.nbytes(other))
        self._meet(k, OUT)
        for other in self.links.peers:
            self._received[slot][other].fetch(bucket.nbytes(own))
        bucket.reduce.submit()

    def _submit_out(self, bucket: _Bucket) -> None:
        bucket.out.submit(None if self._queue is self.device.queue else (self.device.queue, bucket.ready))
        bucket.sent = True

    def _return(self, k: int) -> None:
        """Brings an array's sum into the device, once all have added up their slices."""
        bucket, sums, own = self._buckets[k], self._sums[k % SLOTS], self.links.index
        self._queue.wait(bucket.reduce.last_use)
        sums[own].publish(bucket.nbytes(own))
        if self.between:
            part = sums[own].array[: bucket.nbytes(own)].view(bucket.spec.dtype)
            self.between(part, bucket.nbytes(0) // bucket.spec.dtype.itemsize)
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

    def _record(self, k: int, sources: list[Buffer]) -> None:
        """Records the commands that move an array; they serve as long as its parts come in the same memory."""
        bucket, slot, own, peers = self._buckets[k], k % SLOTS, self.links.index, self.links.peers
        bucket.ready = max(source.last_use for source in sources)
        if bucket.sources == sources:
            return
        bucket.sources = sources
        bucket.out, bucket.reduce, bucket.gather = (CommandRecorder(self._queue, replay=True) for _ in range(3))
        self._packers[k].record(bucket.out, sources, [bucket.flat])
        for other in peers:
            bucket.out.copy(bucket.flat, self._sent[slot][other].buffer, bucket.nbytes(other), bucket.bounds[other])
        start, nbytes = bucket.bounds[own], bucket.nbytes(own)
        if nbytes:
            parts = [received.buffer.slice(0, nbytes) for received in self._received[slot]]
            parts[own], total = bucket.flat.slice(start, nbytes), bucket.result.slice(start, nbytes)
            self._adder(nbytes, bucket.spec.dtype).record(bucket.reduce, parts, [total])
            bucket.reduce.copy(total, self._sums[slot][own].buffer)
        for owner in self._gathered:
            total, nbytes = self._sums[slot][owner].buffer, bucket.nbytes(owner)
            bucket.gather.copy(total, bucket.result, nbytes, 0, bucket.bounds[owner])
        for recorder in (bucket.out, bucket.reduce, bucket.gather):
            recorder.end()

    def _adder(self, nbytes: int, dtype: np.dtype) -> Executable:
        """The program that adds up a slice of all processes, in f32 and in their order."""
        part = jax.ShapeDtypeStruct((nbytes // dtype.itemsize,), dtype)
        if part not in self._adders:
            self._adders[part] = self._compile(_add_up, *[part] * self.links.count)
        return self._adders[part]

    def _compile(self, fn: Callable[..., jax.Array], *specs: jax.ShapeDtypeStruct) -> Executable:
        closed = jax.make_jaxpr(fn)(*specs)
        program = compile_graph(optimize(closed), self.device, [False] * len(specs))
        return Executable(self.device, program, [type_of_aval(aval) for aval in closed.out_avals])


def _add_up(*parts: jax.Array) -> jax.Array:
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts[0].dtype)
