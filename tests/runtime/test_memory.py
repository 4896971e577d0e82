"""Device memory: allocation, the ways in and out, limits, and nothing left behind."""

import itertools
import os
import random

import numpy as np
import pytest
from vulkan_devices import SELECTOR, memory_at_rest, needs_vulkan

from vk_kernels.errors import BufferSizeError, FeatureError, OutOfMemoryError, VulkanError
from vk_kernels.runtime import memory, staging
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.memory import MemoryBlock
from vk_kernels.runtime.vulkan import vk


@pytest.fixture(scope="module", params=[True, False], ids=["mapped", "staged"])
def opened(request):
    """A device whose memory the host maps, and one where everything goes through staging."""
    with Device.open(SELECTOR, direct=request.param) as device:
        device.upload(np.zeros(1)).read(np.float64, (1,))  # what staging needs is there from here on
        yield device


def test_a_block_keeps_its_free_ranges_apart_and_whole():
    block = MemoryBlock(1 << 16, None, None, "device", None, False)
    generator, taken = random.Random(0), []
    for _ in range(2000):
        if taken and generator.random() < 0.5:
            block.give_back(*taken.pop(generator.randrange(len(taken))))
        else:
            size = 256 * generator.randint(1, 16)
            index = next((i for i, (_, free) in enumerate(block.free) if free >= size), None)
            if index is not None:
                taken.append((block.take(index, size), size))
        ranges = sorted(taken + block.free)
        assert sum(size for _, size in ranges) == 1 << 16
        assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(block.free))
    for item in taken:
        block.give_back(*item)
    assert block.empty


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint16, np.float64, np.bool_])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 13), (257, 1025)])
def test_what_is_written_is_read(opened, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    buffer = opened.upload(array)
    assert buffer.size == array.nbytes
    np.testing.assert_array_equal(buffer.read(dtype, shape), array)


def test_more_than_the_staging_slots_hold(opened):
    array = np.random.default_rng(1).integers(0, 256, 2 * staging.STAGING_BYTES + 12345, np.uint8)
    buffer = opened.upload(array)
    np.testing.assert_array_equal(buffer.read(np.uint8, array.shape), array)


def test_an_array_that_is_not_contiguous_is_written_in_order(opened):
    array = np.arange(60, dtype=np.int32).reshape(6, 10)[::2, ::-3].T
    np.testing.assert_array_equal(opened.upload(array).read(np.int32, array.shape), array)
    with pytest.raises(ValueError, match=r"C-contiguous"):
        opened.upload(array).read_into(np.empty((10, 10), np.int32)[:, :2])


def test_offsets_and_slices_see_the_same_bytes(opened):
    buffer = opened.upload(np.arange(256, dtype=np.int32))
    part = buffer.slice(256, 128)
    np.testing.assert_array_equal(part.read(np.int32, (32,)), np.arange(64, 96))
    part.write(np.full(4, -1, np.int32), offset=16)
    np.testing.assert_array_equal(buffer.read(np.int32, (4,), offset=256 + 16), [-1] * 4)


def test_a_slice_keeps_its_buffer_alive(opened):
    before = memory_at_rest(opened).buffers
    part = opened.upload(np.arange(256, dtype=np.int32)).slice(256, 4)
    assert opened.memory_stats().buffers == before + 1
    assert part.read(np.int32, (1,)) == 64
    del part
    assert memory_at_rest(opened).buffers == before


def test_what_does_not_fit_is_refused(opened):
    buffer = opened.buffer(100)
    with pytest.raises(ValueError, match=r"104 bytes at 0 do not fit a buffer of 100 bytes"):
        buffer.write(np.zeros(26, np.float32))
    with pytest.raises(ValueError, match=r"4 bytes at 98"):
        buffer.read(np.float32, (1,), offset=98)
    with pytest.raises(ValueError, match=r"slice of 101 bytes at 0"):
        buffer.slice(0, 101)
    with pytest.raises(ValueError, match=r"takes multiples of"):
        buffer.slice(1, 4)


def test_a_freed_buffer_says_so(opened):
    buffer = opened.buffer(100)
    part = buffer.slice(0, 4)
    buffer.free()
    buffer.free()
    for use in (lambda: buffer.read("u1", (1,)), lambda: part.write(np.zeros(1, np.int8))):
        with pytest.raises(VulkanError, match=r"was freed"):
            use()


def test_a_buffer_over_the_limits_names_size_and_limit(opened):
    limits = opened.limits
    largest = min(limits.allocation_size, limits.buffer_size)
    bound = min(largest, limits.storage_buffer_range)
    with pytest.raises(BufferSizeError, match=rf"{bound + 4:,} bytes.*at most {bound:,} .max(Storage|Memory|Buffer)"):
        opened.buffer(bound + 4)
    with pytest.raises(BufferSizeError, match=rf"{largest + 4:,} bytes.*max(MemoryAllocation|Buffer)Size"):
        opened.buffer(largest + 4, sliced=True)


def test_out_of_memory_names_asked_used_and_budget(opened, monkeypatch):
    monkeypatch.setattr(opened.fn, "vkAllocateMemory", lambda *_: vk.VK_ERROR_OUT_OF_DEVICE_MEMORY, raising=False)
    with pytest.raises(OutOfMemoryError, match=r"asked for 100,000,000 bytes with [\d,]+ in use .* budget of [\d,]+"):
        opened.buffer(99_999_999)


def test_memory_that_is_freed_but_in_use_is_waited_for(opened, monkeypatch):
    """No room, until what still runs is done: then the block that it works on is free."""
    size = memory.BLOCK_BYTES + 4096
    opened.wait(opened.queue.submitted)
    buffer = opened.buffer(size)
    with opened.pooled_recorder() as recorder:
        recorder.fill(buffer, 1)
        recorder.submit()
    buffer.free()
    found = []

    def grow(self, nbytes, kind):
        found.append(opened.completed() == opened.queue.submitted)
        raise OutOfMemoryError("none")

    monkeypatch.setattr(memory.Memory, "_grow", grow)
    monkeypatch.setattr(memory.Memory, "_find", lambda self, *_: None)
    with pytest.raises(OutOfMemoryError):
        opened.buffer(size)
    assert (len(found), found[1:]) == (3, [True, True])  # once more without the recordings that are kept


def test_small_buffers_share_a_block_and_stats_count_them(opened):
    if opened.instance.validation == "gpu":
        pytest.skip("validation on the GPU gives each buffer a block of its own")
    before = memory_at_rest(opened)
    buffers = [opened.buffer(1000) for _ in range(100)]
    during = opened.memory_stats()
    assert during.buffers == before.buffers + 100
    assert during.used == before.used + 100 * 1024
    assert during.blocks <= before.blocks + 1
    assert len({(b.handle_address, b.offset) for b in buffers}) == 100
    del buffers
    after = memory_at_rest(opened)
    assert (after.used, after.buffers) == (before.used, before.buffers)
    assert after.peak >= during.used


def test_a_thousand_cycles_leave_nothing_behind(opened):
    array = np.arange(5000, dtype=np.float32)
    large = memory.BLOCK_BYTES + 4096  # a block of its own

    def cycle(i: int) -> None:
        buffer = opened.upload(array)
        other = opened.buffer(large if i % 100 == 0 else 777 * (i % 50))
        with opened.pooled_recorder() as recorder:
            recorder.copy(buffer, opened.buffer(array.nbytes))
            recorder.submit()
        other.free()

    for i in range(100):
        cycle(i)
    before, files = memory_at_rest(opened), len(os.listdir("/proc/self/fd"))
    for i in range(1000):
        cycle(i)
    after = memory_at_rest(opened)
    assert (after.used, after.buffers) == (before.used, before.buffers)
    assert after.reserved <= before.reserved + memory.BLOCK_BYTES
    assert len(os.listdir("/proc/self/fd")) < files + 10  # one in a hundred cycles; other threads may have some open


def page_aligned(nbytes: int, alignment: int) -> np.ndarray:
    whole = np.empty(nbytes + alignment, np.uint8)
    start = -whole.ctypes.data % alignment
    return whole[start : start + nbytes]


@needs_vulkan
def test_host_memory_is_imported_not_copied(device):
    if "VK_EXT_external_memory_host" not in device.features:
        pytest.skip("the device has no VK_EXT_external_memory_host")
    alignment = device.limits.host_import_alignment
    array = page_aligned(4 * alignment, alignment)
    array[:] = 7
    imported = device.import_host(array)
    copy = device.buffer(array.nbytes)
    with device.pooled_recorder() as recorder:
        recorder.copy(imported, copy)
        recorder.submit().wait()
    np.testing.assert_array_equal(copy.read(np.uint8, array.shape), array)
    copy.write(np.full(array.nbytes, 9, np.uint8))
    with device.pooled_recorder() as recorder:
        recorder.copy(copy, imported)
        recorder.submit().wait()
    assert (array == 9).all()
    blocks = memory_at_rest(device).blocks
    imported.free()
    assert device.memory_stats().blocks == blocks - 1

    with pytest.raises(ValueError, match=rf"multiples of {alignment}"):
        device.import_host(array[1:])


@needs_vulkan
def test_importing_needs_the_extension():
    with (
        Device.open(SELECTOR, without=["VK_EXT_external_memory_host"]) as device,
        pytest.raises(FeatureError, match=r"VK_EXT_external_memory_host"),
    ):
        device.import_host(np.zeros(4096, np.uint8))
