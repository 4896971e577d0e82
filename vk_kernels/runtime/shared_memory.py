"""Memory that several processes of one host see, and their devices too, where they can import host memory.

It is a file without a name: nothing is left of it when the last process that has it is gone, however that ended.
"""

import mmap
import os

import numpy as np

from vk_kernels.errors import FeatureError, OutOfMemoryError, VulkanError
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.host_links import HostLinks
from vk_kernels.runtime.memory import Buffer

PAGE = mmap.PAGESIZE


class SharedMemory:
    """Whole pages of shared memory. `array`: its bytes; `handle`: the file descriptor, to be sent to other processes.

    It is mapped as long as an array or a buffer over it lives.
    """

    def __init__(self, handle: int, nbytes: int):
        """Maps what `create` made in another process, and takes `handle` over, to close it."""
        self.handle, self.nbytes = handle, nbytes
        found = os.fstat(handle).st_size
        if found != nbytes or nbytes % PAGE:
            raise ValueError(f"shared memory of {nbytes:,} bytes, whole pages of {PAGE}: the file has {found:,}")
        self.array = np.frombuffer(mmap.mmap(handle, nbytes), np.uint8)

    @classmethod
    def create(cls, nbytes: int) -> "SharedMemory":
        """New shared memory, all zeros, of `nbytes` rounded up to whole pages.

        Raises OutOfMemoryError where the host has no room, FeatureError where the system is not Linux.
        """
        if not hasattr(os, "memfd_create"):
            raise FeatureError("memory that several processes share is made with memfd_create, which only Linux has")
        nbytes = max(1, -(-nbytes // PAGE)) * PAGE
        handle = os.memfd_create("vk_kernels")
        try:
            os.ftruncate(handle, nbytes)
            os.posix_fallocate(handle, 0, nbytes)  # else a lack of memory ends the process at its first access
        except OSError as error:
            os.close(handle)
            raise OutOfMemoryError(
                f"no room for {nbytes:,} bytes of memory that the processes of this host share: {error.strerror}"
            ) from None
        return cls(handle, nbytes)

    @classmethod
    def receive(cls, links: HostLinks, nbytes: int) -> "SharedMemory":
        """Memory of `nbytes`, rounded up, that process 0 created and sent the handle of."""
        return cls(links.receive_handle(0), max(1, -(-nbytes // PAGE)) * PAGE)

    def __del__(self):
        os.close(self.handle)


class SharedRange:
    """A range of shared memory, in whole pages: `array` as the processes see it, `buffer` as the device does.

    The device works on the very memory where it can import it. Elsewhere `buffer` is mapped memory of its own, and the
    host copies: `publish` after the device has written, `fetch` before it reads. Where it is imported both do nothing.
    """

    def __init__(self, device: Device, shared: SharedMemory, offset: int, nbytes: int, imports: bool):
        """imports: whether the device imports it, see `can_import`. Raises VulkanError where its driver refuses."""
        if offset % PAGE or nbytes % PAGE or not 0 <= offset <= offset + nbytes <= shared.nbytes:
            raise ValueError(f"{nbytes:,} bytes at {offset:,}: not whole pages of {shared.nbytes:,} bytes")
        self.array = shared.array[offset : offset + nbytes]
        self._is_copy = not imports
        self.buffer: Buffer = device.import_host(self.array) if imports else device.memory.allocate(nbytes, "host")

    def publish(self, nbytes: int) -> None:
        """Makes the first bytes, which the device wrote and was waited for, visible to the other processes."""
        if self._is_copy:
            self.buffer.read_into(self.array[:nbytes])

    def fetch(self, nbytes: int) -> None:
        """Makes the first bytes, which other processes published, visible to what is submitted from here on."""
        if self._is_copy:
            self.buffer.write(self.array[:nbytes])


def can_import(device: Device) -> bool:
    """Whether a device can import shared memory, found out by a page of it."""
    alignment = device.limits.host_import_alignment
    if "VK_EXT_external_memory_host" not in device.features or PAGE % alignment:
        return False
    try:
        device.import_host(SharedMemory.create(PAGE).array).free()
    except VulkanError:  # some drivers refuse the memory of files
        return False
    device.collect()
    return True
