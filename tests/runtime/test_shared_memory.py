"""Memory that processes and their devices share: two devices of one process stand for two processes here."""

import contextlib
import os
import resource

import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan

from vk_kernels.errors import OutOfMemoryError
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.shared_memory import PAGE, SharedMemory, SharedRange, can_import

WORDS = PAGE // 4


@pytest.fixture(scope="module")
def other():
    """A second open device, which is the same physical one here."""
    with Device.open(SELECTOR) as opened:
        yield opened


def descriptors_of(memory: os.stat_result) -> int:
    """How many of this process's open files are that memory."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself, and what another thread has closed
            found += os.path.samestat(os.stat(f"/proc/self/fd/{name}"), memory)
    return found


def test_both_map_the_same_bytes_and_nothing_is_left():
    first = SharedMemory.create(PAGE + 1)
    memory = os.fstat(first.handle)
    assert descriptors_of(memory) > 0
    assert first.nbytes == 2 * PAGE
    second = SharedMemory(os.dup(first.handle), first.nbytes)
    first.array[-1] = 7
    kept = second.array
    del first, second
    assert kept[-1] == 7
    del kept
    assert descriptors_of(memory) == 0


def test_what_is_not_such_memory_is_refused():
    page = SharedMemory.create(PAGE)
    handle = os.dup(page.handle)
    with pytest.raises(ValueError, match=r"shared memory of 8,192 bytes.*the file has 4,096"):
        SharedMemory(handle, 2 * PAGE)


def test_a_host_without_room_says_so_before_any_access():
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OutOfMemoryError, match=r"no room for 2,097,152 bytes of memory that the processes"):
            SharedMemory.create(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@needs_vulkan
@pytest.mark.parametrize("imports", [True, False], ids=["imported", "copied"])
def test_one_device_reads_what_another_one_wrote(device, other, imports):
    assert can_import(device) or not imports
    shared = SharedMemory.create(4 * PAGE)
    writer, reader = (SharedRange(each, shared, PAGE, 2 * PAGE, imports) for each in (device, other))
    words = np.arange(2 * WORDS, dtype=np.uint32)
    with device.pooled_recorder() as recorder:
        recorder.copy(device.upload(words), writer.buffer)
        recorder.submit().wait()
    writer.publish(words.nbytes)
    reader.fetch(words.nbytes)
    result = other.buffer(words.nbytes)
    with other.pooled_recorder() as recorder:
        recorder.copy(reader.buffer, result)
        recorder.submit()
    np.testing.assert_array_equal(result.read(np.uint32, words.shape), words)
    np.testing.assert_array_equal(shared.array.view(np.uint32)[WORDS : 3 * WORDS], words)
    assert not shared.array[:PAGE].any()
    assert not shared.array[3 * PAGE :].any()


@needs_vulkan
def test_a_range_is_whole_pages_of_the_memory(device):
    shared = SharedMemory.create(2 * PAGE)
    for offset, nbytes in ((1, PAGE), (0, 12), (PAGE, 2 * PAGE)):
        with pytest.raises(ValueError, match=r"not whole pages of 8,192 bytes"):
            SharedRange(device, shared, offset, nbytes, imports=True)


@needs_vulkan
def test_a_device_without_the_extension_does_not_import():
    with Device.open(SELECTOR, without=["VK_EXT_external_memory_host"]) as without:
        assert not can_import(without)
