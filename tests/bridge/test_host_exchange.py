"""Sums over the devices of a host. Threads, each with a device of its own, stand for processes here."""

import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan
from waiting import PATIENCE

from vk_kernels.bridge.host_exchange import SLOTS, HostExchange
from vk_kernels.errors import LinkError
from vk_kernels.runtime.array import Array, array_type
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.host_links import HostLinks
from vk_kernels.runtime.queue import Queue

pytestmark = needs_vulkan

BF16 = np.dtype(ml_dtypes.bfloat16)
# More arrays than slots, of sizes that no number of devices divides, and one that leaves some of them no slice.
TYPES = [(2, np.float32), (1001, BF16), *((701, np.float32) for _ in range(SLOTS)), (4099, np.float32)]
SPECS = [ArraySpec((size,), np.dtype(dtype)) for size, dtype in TYPES]


@pytest.fixture(scope="module")
def devices():
    """Three: the first exchanges on the queue that it computes on, the last has one that takes copies alone.

    That is the same queue in fact. The validation layer knows no timelines, and takes copies and sums for unordered.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Device.open(SELECTOR, validation=i < 2 and None)) for i in range(3)]
        first, _, last = opened
        first.exchange_queue = first.send_queue = first.receive_queue = first.queue
        last.receive_queue = Queue(last, last.queue.timeout, last.queue.place._replace(computes=False), last.queue)
        yield opened


def exchanges(devices, specs=SPECS, **options) -> list[HostExchange]:
    name = uuid.uuid4().hex

    def make(index: int) -> HostExchange:
        links = HostLinks(name, index, len(devices), timeout=PATIENCE)
        return HostExchange(devices[index], links, specs, **options)

    with ThreadPoolExecutor(len(devices)) as threads:
        return list(threads.map(make, range(len(devices))))


def numbers(process: int, step: int) -> list[np.ndarray]:
    """Arrays of sizes so different that the order in which they are added up shows."""
    generator = np.random.default_rng((process, step))
    scales = 10.0 ** generator.integers(-3, 4, 4099)
    return [(generator.standard_normal(size) * scales[:size]).astype(dtype) for size, dtype in TYPES]


def in_order(parts: list[np.ndarray]) -> np.ndarray:
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total.astype(parts[0].dtype)


def put(device: Device, array: np.ndarray) -> Array:
    return Array(device.upload(array), array_type(array.shape, array.dtype, False))


@pytest.mark.parametrize(("count", "imports"), [(1, True), (2, True), (3, True), (2, False)])
def test_all_have_the_bits_of_the_sum_in_order(devices, count, imports):
    made = exchanges(devices[:count], imports=imports)
    wanted = [[in_order(list(parts)) for parts in zip(*(numbers(p, s) for p in range(count)), strict=True)]
              for s in range(3)]  # fmt: skip

    def run(index: int) -> list[list[bytes]]:
        device, found = devices[index], []
        for step in range(3):
            arrays = [put(device, array) for array in numbers(index, step)]
            sums = made[index](arrays)
            made[index].finish()
            found.append([array.numpy().tobytes() for array in sums])
        return found

    with ThreadPoolExecutor(count) as threads:
        for found in threads.map(run, range(count)):
            assert found == [[array.tobytes() for array in arrays] for arrays in wanted]
    assert made[0].traffic.exchanges == 3
    assert made[0].traffic.nbytes == 3 * made[0].nbytes


def test_recordings_serve_for_arrays_in_the_same_memory(devices):
    [one] = exchanges(devices[:1], specs=SPECS[:1])
    array = put(devices[0], numbers(0, 0)[0])
    one([array])
    one.finish()
    recorders = one._buckets[0].send, one._buckets[0].reduce
    array.buffer.write(np.array([5, 6], np.float32))
    [total] = one([array])
    one.finish()
    assert (one._buckets[0].send, one._buckets[0].reduce) == recorders
    np.testing.assert_array_equal(total.numpy(), [5, 6])


def test_what_other_hosts_have_is_added_to_the_slice_of_each(devices):
    slices = []

    def between(part: np.ndarray, longest: int) -> None:
        assert part.size <= longest < TYPES[-1][0]
        slices.append(part.size)
        part += 100

    made = exchanges(devices[:2], specs=SPECS[-1:], between=between)

    def run(index: int) -> np.ndarray:
        array = put(devices[index], numbers(index, 0)[-1])
        [total] = made[index]([array])
        made[index].finish()
        return total.numpy()

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, range(2))
    assert first.tobytes() == second.tobytes()
    np.testing.assert_array_equal(first, in_order([numbers(0, 0)[-1], numbers(1, 0)[-1]]) + np.float32(100))
    assert sum(slices) == TYPES[-1][0]


def test_who_ends_in_the_midst_is_named(devices):
    made = exchanges(devices[:2], specs=SPECS[:3])
    made[1].links.announce(0)
    made[1].links.close()
    with pytest.raises(LinkError, match=r"process 1 of this host ended, adding up over 2 devices in array 1 of 3"):
        made[0]([put(devices[0], array) for array in numbers(0, 0)[:3]])
    devices[0].finish()


def test_an_array_of_another_type_is_refused(devices):
    [one] = exchanges(devices[:1], specs=SPECS[:1])
    with pytest.raises(ValueError, match=r"array 0 is float32.3., announced was float32.2."):
        one([put(devices[0], np.zeros(3, np.float32))])
