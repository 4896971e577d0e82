"""Sums of arrays over the devices of a host, one process each, through memory that all of them import.

On its way an array is

    sent      copied by the device into shared memory;
    received  copied out of there, what the others sent of what this device adds up;
    reduced   added up by the device, in the order of the processes' numbers.

Of two processes each adds up whole arrays (one-shot). Of more, or where there are more hosts, an array is cut into as
many slices as there are processes, and each adds up one of them (two-shot). Then the sum is

    gathered  put into shared memory, slice by slice, and copied out of there by all the others.

A device moves the same bytes either way if there are two: all of an array out, and as many in; of n, (n - 1) / n out,
as many in to add up, 1 / n out and (n - 1) / n in. Whoever adds up does it in f32 and in one order: so the sum has the
same bits on all devices, of whatever vendor or speed. While one array is added up, the next is on its way out.

A device computes on its `queue`, sends on `send_queue` and receives on `receive_queue`, which move memory beside all
computation and both ways at once where it has engines of its own for that, and adds up on `exchange_queue`: each array
as soon as it is computed.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
SENT, REDUCED, DONE = range(3)  # stages that a process announces, of an array or, the last one, of all


@dataclass
class Traffic:
    """Counts of all exchanges so far, in seconds and bytes.

    seconds: from calls to the end of `finish`, the computation of the arrays in it. exposed: the part of it after all
    of them were computed. waited: for other processes. nbytes: out of this device and into it.
    """

    exchanges: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    waited: float = 0.0
    nbytes: int = 0


class _Bucket:
    """A flat array on its way, and the commands that move it.

    slices: (start, bytes) of what each process adds up. received: what others sent, by process, where that does not
    stay in shared memory. result: the sum.
    """

    def __init__(self, device: Device, spec: ArraySpec, count: int, is_whole: bool):
        self.spec = spec
        each = -(-spec.nbytes // count // ALIGNMENT) * ALIGNMENT
        starts = [min(i * each, spec.nbytes) for i in range(count + 1)]
        parts = [(start, end - start) for start, end in itertools.pairwise(starts)]
        self.slices = [(0, spec.nbytes)] * count if is_whole else parts
        self.result = device.buffer(spec.nbytes)
        self.received: dict[int, Buffer] = {}
        self.source: Buffer | None = None  # that the commands were recorded for
        self.ready = 0  # the submission that computes it
        self.is_sent = False  # whether `send` was submitted, and not waited for
        self.send: CommandRecorder
        self.receive: CommandRecorder
        self.reduce: CommandRecorder
        self.gather: CommandRecorder


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
        between: Callable[[np.ndarray, int], None] | None = None,
        imports: bool | None = None,
    ):
        """specs: of a call's arrays, flat ones, in the order in which they are ready. imports: whether the device works
        on the shared memory itself; None: if it can.

        Raises OutOfMemoryError where host or device has no room, LinkError for a process that does not come along.
        """
        self.device, self.links, self.between = device, links, between
        self.imports = can_import(device) if imports is None else imports
        self.traffic = Traffic()
        count = links.count
        self._one_shot = count <= 2 and between is None
        # Kernels read what was received from where it lies if the same queue moves memory: nothing is gained by a copy.
        self._copies_in = device.receive_queue is not device.exchange_queue
        self._types = [array_type(spec.shape, spec.dtype, False) for spec in specs]
        self._buckets = [_Bucket(device, spec, count, self._one_shot) for spec in specs]
        self._adders: dict[Any, Executable] = {}
        self._began = self._computed = 0.0
        most = max((nbytes for bucket in self._buckets for _, nbytes in bucket.slices), default=0)
        stride = max(1, -(-most // PAGE)) * PAGE
        slots = min(SLOTS, len(self._buckets))
        in_slot = count if self._one_shot else count * (count + 1)
        shared = self._share(max(1, slots) * in_slot * stride)

        def ranges(slot: int, places: dict[int, int]) -> dict[int, SharedRange]:
            first = slot * in_slot
            return {
                key: SharedRange(device, shared, (first + place) * stride, stride, self.imports)
                for key, place in places.items()
            }

        # In a slot, what each process sends; or first what each sends to each, then the sum's slices.
        own, peers = links.index, links.peers
        sent = dict.fromkeys(peers, own) if self._one_shot else {peer: peer * count + own for peer in peers}
        received = {peer: peer if self._one_shot else own * count + peer for peer in peers}
        sums = {} if self._one_shot else {owner: count * count + owner for owner in range(count)}
        self._sent = [ranges(slot, sent) for slot in range(slots)]
        self._received = [ranges(slot, received) for slot in range(slots)]
        self._sums = [ranges(slot, sums) for slot in range(slots)]

    def _share(self, nbytes: int) -> SharedMemory:
        """Memory that process 0 makes, the same on all."""
        if self.links.index:
            return SharedMemory.receive(self.links, nbytes)
        shared = SharedMemory.create(nbytes)
        self.links.send_handle(shared.handle)
        return shared

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """The sums of arrays of the types that were announced; they stay as they are until the next call.

        They may be on their way still: what is submitted to the device's `queue` from here on waits for them. `finish`
        must come before the arrays are given up, and before the next call.

        Raises LinkError, naming the process that ended, hangs or adds up something else.
        """
        self._began = time.perf_counter()
        for i, (array, bucket) in enumerate(zip(arrays, self._buckets, strict=True)):
            if array.type.spec != bucket.spec:
                raise ValueError(f"array {i} is {array.type}, announced was {bucket.spec}")
            self._record(i, array.buffer)
        self._computed, last_ready = 0.0, max(bucket.ready for bucket in self._buckets)
        if self.traffic.exchanges:
            self._await(DONE)  # the shared memory is free again
        for k in range(len(self._buckets) + 1):
            if k < len(self._buckets):
                self._send(k, last_ready)
            if k > 0 and not self._one_shot:
                self._gather(k - 1)
        last = self._last
        if last.queue is not self.device.queue:
            self.device.queue.follow(last.queue, last.last_use)
        return [Array(bucket.result, kind) for bucket, kind in zip(self._buckets, self._types, strict=True)]

    def finish(self) -> None:
        """Returns when the last call's sums are there, and says so to the other processes."""
        self._last.queue.wait(self._last.last_use)
        self.links.announce(DONE)
        now = time.perf_counter()
        self.traffic.exchanges += 1
        self.traffic.seconds += now - self._began
        self.traffic.exposed += now - self._computed
        self.traffic.nbytes += self.nbytes

    @property
    def _last(self) -> CommandRecorder:
        """The commands that a call ends with."""
        return self._buckets[-1].reduce if self._one_shot else self._buckets[-1].gather

    @property
    def nbytes(self) -> int:
        """Bytes that an exchange moves out of this device and into it."""
        own, count = self.links.index, self.links.count
        return sum(2 * bucket.spec.nbytes + (count - 2) * bucket.slices[own][1] for bucket in self._buckets)

    def _send(self, k: int, last_ready: int) -> None:
        """Brings an array into shared memory, and has the device add up its part once all are there.

        The next array follows without a word of the host. Its slot is free: that others sent array k - 1 says that they
        added up all until k - 3; that they reduced k - 2, that they gathered all until k - 4, submitted before.
        """
        bucket, own = self._buckets[k], self.links.index
        sent, received = self._sent[k % SLOTS], self._received[k % SLOTS]
        self._submit_send(bucket)
        if k + 1 < len(self._buckets) and (self._copies_in or self._buckets[k + 1].ready <= self.device.completed()):
            self._submit_send(self._buckets[k + 1])
        self.device.wait(bucket.ready)
        if bucket.ready == last_ready and not self._computed:
            self._computed = time.perf_counter()
        bucket.send.queue.wait(bucket.send.last_use)
        bucket.is_sent = False
        if self._one_shot and k >= 2:
            before = self._buckets[k - 2].reduce
            before.queue.wait(before.last_use)
        for peer in self.links.peers:
            sent[peer].publish(bucket.slices[peer][1])
        self._meet(k, SENT)
        for peer in self.links.peers:
            received[peer].fetch(bucket.slices[own][1])
        if self._copies_in:
            bucket.receive.submit()
            bucket.reduce.submit((bucket.receive.queue, bucket.receive.last_use))
        else:
            bucket.reduce.submit()

    def _submit_send(self, bucket: _Bucket) -> None:
        if not bucket.is_sent:
            queue = self.device.queue
            bucket.send.submit(None if bucket.send.queue is queue else (queue, bucket.ready))
            bucket.is_sent = True

    def _gather(self, k: int) -> None:
        """Brings an array's sum into the device, once all have added up their slices."""
        bucket, sums, own = self._buckets[k], self._sums[k % SLOTS], self.links.index
        bucket.reduce.queue.wait(bucket.reduce.last_use)
        sums[own].publish(bucket.slices[own][1])
        if self.between:
            part = sums[own].array[: bucket.slices[own][1]].view(bucket.spec.dtype)
            self.between(part, bucket.slices[0][1] // bucket.spec.dtype.itemsize)
        self._meet(k, REDUCED)
        for owner in self._gathered:
            sums[owner].fetch(bucket.slices[owner][1])
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

    def _record(self, k: int, source: Buffer) -> None:
        """Records the commands that move an array; they serve as long as it comes in the same memory."""
        bucket, slot, own, device = self._buckets[k], k % SLOTS, self.links.index, self.device
        bucket.ready = source.last_use
        if bucket.source is source:
            return
        bucket.source = source
        queues = device.send_queue, device.receive_queue, device.exchange_queue, device.receive_queue
        recorders = [CommandRecorder(queue, replay=True) for queue in queues]
        bucket.send, bucket.receive, bucket.reduce, bucket.gather = recorders
        for peer, sent in self._sent[slot].items():
            start, nbytes = bucket.slices[peer]
            bucket.send.copy(source, sent.buffer, nbytes, start)
        start, nbytes = bucket.slices[own]
        if nbytes:
            parts = {own: source.slice(start, nbytes)}
            for peer, received in self._received[slot].items():
                parts[peer] = received.buffer.slice(0, nbytes)
                if self._copies_in:
                    copy = bucket.received[peer] = bucket.received.get(peer) or device.buffer(nbytes)
                    bucket.receive.copy(parts[peer], copy)
                    parts[peer] = copy
            total = bucket.result.slice(start, nbytes)
            self._adder(nbytes, bucket.spec.dtype).record(bucket.reduce, [parts[i] for i in sorted(parts)], [total])
            if not self._one_shot:
                bucket.reduce.copy(total, self._sums[slot][own].buffer)
        if not self._one_shot:
            for owner in self._gathered:
                start, nbytes = bucket.slices[owner]
                bucket.gather.copy(self._sums[slot][owner].buffer, bucket.result, nbytes, 0, start)
        for recorder in recorders:
            recorder.end()

    def _adder(self, nbytes: int, dtype: np.dtype) -> Executable:
        """The program that adds up a part of all processes, in f32 and in their order."""
        part = jax.ShapeDtypeStruct((nbytes // dtype.itemsize,), dtype)
        if part not in self._adders:
            closed = jax.make_jaxpr(_add_up)(*[part] * self.links.count)
            program = compile_graph(optimize(closed), self.device, [False] * self.links.count)
            self._adders[part] = Executable(self.device, program, [type_of_aval(aval) for aval in closed.out_avals])
        return self._adders[part]


def _add_up(*parts: jax.Array) -> jax.Array:
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts[0].dtype)
