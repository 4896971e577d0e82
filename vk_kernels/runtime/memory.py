"""Device memory: a few large blocks, cut into buffers, and the way between them and numpy.

Each block is one VkDeviceMemory with one VkBuffer over all of it; a `Buffer` is a range of a block. A range that is
given back joins its block's free list when the device is done with it (`Queue.retire`).
"""

import bisect
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vk_kernels.errors import BufferSizeError, FeatureError, OutOfMemoryError, VulkanError
from vk_kernels.runtime import vulkan
from vk_kernels.runtime.logical_device import LogicalDevice
from vk_kernels.runtime.queue import Queue
from vk_kernels.runtime.vulkan import ffi, vk

BLOCK_BYTES = 64 << 20  # a larger buffer gets a block of its own
KEPT_BYTES = 256 << 20  # empty blocks up to this sum are kept for the next allocation
ALIGNMENT = 256  # of every buffer's start: no device asks for more
# Uncached mapped memory is read over the bus word by word; beyond this size a copy by the device is faster.
UNCACHED_READ_BYTES = 256


@dataclass(frozen=True)
class MemoryStats:
    """`used` bytes in `buffers` live buffers, at most `peak` so far, out of `reserved` bytes in `blocks` blocks.

    `budget`: bytes this process may use of the device's main heap, as the driver says (else the heap's size).
    """

    used: int
    peak: int
    reserved: int
    buffers: int
    blocks: int
    budget: int


@dataclass(eq=False)
class MemoryBlock:
    """One device allocation and the buffer over it. `bytes` maps it into host memory, or is None."""

    nbytes: int
    handle: Any  # VkBuffer
    memory: Any  # VkDeviceMemory
    kind: str
    bytes: np.ndarray | None
    fast_reads: bool  # the host reads `bytes` through its cache

    def __post_init__(self):
        self.free = [(0, self.nbytes)]  # (offset, size), by offset, no two touching

    @property
    def empty(self) -> bool:
        return self.free == [(0, self.nbytes)]

    def take(self, index: int, nbytes: int) -> int:
        """Cuts `nbytes` off free range `index`; returns the offset."""
        offset, size = self.free.pop(index)
        if size > nbytes:
            self.free.insert(index, (offset + nbytes, size - nbytes))
        return offset

    def give_back(self, offset: int, nbytes: int) -> None:
        """Frees a range, and joins it with the free ranges beside it."""
        index = bisect.bisect(self.free, (offset,))
        if index < len(self.free) and self.free[index][0] == offset + nbytes:
            nbytes += self.free.pop(index)[1]
        if index > 0 and sum(self.free[index - 1]) == offset:
            offset, before = self.free.pop(index - 1)
            nbytes += before
            index -= 1
        self.free.insert(index, (offset, nbytes))


class UsageTracker:
    """Last submission of a replayed recording, shared by its buffers, so that submitting need not update each.

    freed: bytes of a buffer that was freed since, or None.
    """

    __slots__ = ("freed", "last_use")

    def __init__(self):
        self.last_use, self.freed = 0, None


class Buffer:
    """`size` bytes of device memory at `offset` of the VkBuffer `handle`. It is freed with its last reference."""

    def __init__(
        self,
        memory: "Memory",
        block: MemoryBlock,
        offset: int,
        size: int,
        reserved: int = 0,
        parent: "Buffer | None" = None,
    ):
        self.memory = memory
        self.device: LogicalDevice = memory.device
        self.block = block
        self.handle = block.handle
        self.handle_address = vulkan.address(block.handle)
        self.offset = offset
        self.size = size
        self.range = max(4, -(-size // 4) * 4)  # what a descriptor spans: whole words, and never nothing
        self._last_use = 0
        self._trackers: dict[int, UsageTracker] = {}  # by id: threads may add and take away, each in one step
        self._reserved = reserved
        self._parent = parent
        self._freed = False
        self.donated = False  # whether a program has it for the memory of an output

    @property
    def last_use(self) -> int:
        """The newest submission that has this buffer, or a slice of it."""
        newest = self._last_use
        for tracker in list(self._trackers.values()):
            if tracker.last_use > newest:
                newest = tracker.last_use
        return newest

    @last_use.setter
    def last_use(self, value: int) -> None:
        self._last_use = value

    def track(self, tracker: UsageTracker) -> None:
        """Counts the submissions of `tracker` as uses of the buffer, until `untrack`."""
        self._trackers[id(tracker)] = tracker
        if self._freed:
            tracker.freed = self.size

    def untrack(self, tracker: UsageTracker) -> None:
        """Ends `track`; the submissions so far still count."""
        self._last_use = max(self._last_use, tracker.last_use)
        self._trackers.pop(id(tracker), None)

    @property
    def owner(self) -> "Buffer":
        """The buffer that a slice is of; a buffer itself."""
        return self if self._parent is None else self._parent

    @property
    def freed(self) -> bool:
        return self.owner._freed

    def slice(self, offset: int, size: int) -> "Buffer":
        """A view of `size` bytes from `offset`, a multiple of the device's storage buffer alignment (256 always is)."""
        alignment = self.device.limits.storage_buffer_alignment
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"a slice of {size} bytes at {offset} does not fit a buffer of {self.size} bytes")
        if (self.offset + offset) % alignment:
            raise ValueError(f"a slice at {offset}: {self.device.info.name} takes multiples of {alignment} bytes")
        return Buffer(self.memory, self.block, self.offset + offset, size, parent=self.owner)

    def write(self, array: Any, offset: int = 0) -> None:
        """Copies the bytes of a numpy array (in C order) into the buffer, `offset` bytes in.

        Comes after every submission so far that uses the buffer. On return `array` may be changed.
        """
        source = np.ascontiguousarray(array)
        nbytes = source.nbytes
        self._check(offset, nbytes)
        if self.block.bytes is None:
            self.memory.staging.upload(self, offset, source.reshape(-1).view(np.uint8))
            return
        self.memory.queue.wait(self.owner.last_use)
        start = self.offset + offset
        ffi.memmove(self.block.bytes[start : start + nbytes], source, nbytes)

    def mapped(self, dtype: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        """A view of its start in host memory, None where the host does not see it. Writers wait for `last_use`."""
        if self.block.bytes is None:
            return None
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._check(0, nbytes)
        return self.block.bytes[self.offset : self.offset + nbytes].view(dtype).reshape(shape)

    def read(self, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """A new array from the bytes at `offset`, once the submissions so far that use the buffer are done."""
        out = np.empty(shape, dtype)
        self.read_into(out, offset)
        return out

    def read_into(self, out: np.ndarray, offset: int = 0) -> None:
        """Fills the C-contiguous array `out` as `read` does."""
        if not out.flags.c_contiguous:
            raise ValueError("read_into needs a C-contiguous array")
        target = out.reshape(-1).view(np.uint8)
        self._check(offset, target.nbytes)
        if self.block.bytes is None or not (self.block.fast_reads or target.nbytes <= UNCACHED_READ_BYTES):
            self.memory.staging.download(self, offset, target)
            return
        self.memory.queue.wait(self.owner.last_use)
        start = self.offset + offset
        target[:] = self.block.bytes[start : start + target.nbytes]

    def free(self) -> None:
        """Gives the memory back as soon as the device is done with it. On a slice, or a second time, does nothing."""
        if self._parent is None and not self._freed:
            self._freed = True
            for tracker in list(self._trackers.values()):
                tracker.freed = self.size
            memory, block, offset, reserved = self.memory, self.block, self.offset, self._reserved
            memory.queue.retire(self.last_use, lambda: memory.release(block, offset, reserved))

    def _check(self, offset: int, nbytes: int) -> None:
        if self.freed:
            raise VulkanError(f"this buffer of {self.size} bytes was freed")
        if offset < 0 or offset + nbytes > self.size:
            raise ValueError(f"{nbytes} bytes at {offset} do not fit a buffer of {self.size} bytes")

    def __del__(self):
        if not self.device.closed:
            self.free()

    def __repr__(self) -> str:
        return f"Buffer({self.size} bytes{', freed' if self.freed else ''})"


class Copies(Protocol):
    """The way between numpy and memory that the host cannot map."""

    def upload(self, buffer: Buffer, offset: int, source: np.ndarray) -> None: ...

    def download(self, buffer: Buffer, offset: int, target: np.ndarray) -> None: ...


class Memory:
    """All blocks of a device. Thread-safe.

    Kind "device" is device-local, and mapped where all of the device's memory can be (`direct`); kind "host" is
    mapped host memory for staging.
    """

    # Whoever makes the memory sets these.
    staging: Copies  # of what the host cannot map
    make_room: Callable[[], None]  # gives up what is kept for speed alone, where there is no room

    def __init__(self, queue: Queue, direct: bool):
        self.queue, self.device = queue, queue.device
        device = self._device = queue.device
        self._lock = threading.Lock()
        self._blocks: list[MemoryBlock] = []
        self._used = self._peak = self._buffers = 0
        # Validation on the GPU takes accesses to be out of bounds beyond the VkBuffer, not beyond the bound range: so
        # that it sees them, each buffer gets a block of its very size then.
        self._exact = device.instance.validation == "gpu"
        self._types = ffi.new("VkPhysicalDeviceMemoryProperties*")
        device.instance.fn.vkGetPhysicalDeviceMemoryProperties(device.physical, self._types)
        self._kinds = self._choose_types(direct)

    def _choose_types(self, direct: bool) -> dict[str, tuple[int, bool, bool]]:
        """Kind -> (memory type index, mapped, read through the host's cache)."""
        types = self._types
        local, visible = vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT, vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT
        coherent, cached = vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT, vk.VK_MEMORY_PROPERTY_HOST_CACHED_BIT
        allowed = self._allowed_types()

        def first(*wishes: int, heap_bytes: int = 0) -> int | None:
            for wanted in wishes:
                for i in range(types.memoryTypeCount):
                    kind = types.memoryTypes[i]
                    heap = types.memoryHeaps[kind.heapIndex].size
                    if allowed >> i & 1 and kind.propertyFlags & wanted == wanted and heap >= heap_bytes:
                        return i
            return None

        host = first(visible | coherent | cached, visible | coherent)
        device = first(local)
        # A mapped window on part of the memory is not enough: it must span the main heap.
        mapped = first(local | visible | coherent | cached, local | visible | coherent, heap_bytes=self._main_heap()[1])
        if host is None or device is None:
            raise VulkanError(f"{self._device.info.name} has no memory for storage buffers of the kinds needed")
        if direct and mapped is not None:
            device = mapped
        flags = types.memoryTypes[device].propertyFlags
        return {
            "device": (device, device == mapped and direct, bool(flags & cached)),
            "host": (host, True, bool(types.memoryTypes[host].propertyFlags & cached)),
        }

    def _main_heap(self) -> tuple[int, int]:
        """(index, bytes) of the largest device-local heap."""
        heaps = [(i, self._types.memoryHeaps[i]) for i in range(self._types.memoryHeapCount)]
        local = [(i, heap.size) for i, heap in heaps if heap.flags & vk.VK_MEMORY_HEAP_DEVICE_LOCAL_BIT]
        return max(local, key=lambda heap: heap[1])

    def _allowed_types(self) -> int:
        handle = self._create_buffer(ALIGNMENT)
        allowed = self._requirements(handle).memoryTypeBits
        self._device.fn.vkDestroyBuffer(self._device.handle, handle, ffi.NULL)
        return allowed

    def _create_buffer(self, nbytes: int, imported: bool = False) -> Any:
        external = ffi.NULL
        if imported:
            host = vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT
            external = vulkan.struct("VkExternalMemoryBufferCreateInfo", handleTypes=host)
        usage = vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
        usage |= vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
        info = vulkan.struct("VkBufferCreateInfo", size=nbytes, usage=usage, pNext=external)
        handle = ffi.new("VkBuffer*")
        device = self._device
        families = ffi.new("uint32_t[]", device.families)
        if len(device.families) > 1:
            info.sharingMode = vk.VK_SHARING_MODE_CONCURRENT
            info.queueFamilyIndexCount, info.pQueueFamilyIndices = len(device.families), families
        vulkan.check(
            device.fn.vkCreateBuffer(device.handle, info, ffi.NULL, handle), f"creating a buffer of {nbytes} bytes"
        )
        return handle[0]

    def _requirements(self, handle: Any) -> Any:
        requirements = ffi.new("VkMemoryRequirements*")
        self._device.fn.vkGetBufferMemoryRequirements(self._device.handle, handle, requirements)
        return requirements

    def largest(self, sliced: bool = False) -> tuple[int, str]:
        """Bytes of the largest buffer that the device takes, and the limit that says so."""
        limits = self._device.limits
        found = [(limits.allocation_size, "maxMemoryAllocationSize"), (limits.buffer_size, "maxBufferSize")]
        if not sliced:
            found.append((limits.storage_buffer_range, "maxStorageBufferRange"))
        return min(found, key=lambda limit: limit[0])

    def check_size(self, nbytes: int, sliced: bool = False) -> None:
        """Raises BufferSizeError for a buffer over a limit of the device."""
        limit, name = self.largest(sliced)
        if not 0 <= nbytes <= limit:
            raise BufferSizeError(
                f"a buffer of {nbytes:,} bytes: {self._device.info.name} takes at most {limit:,} ({name})"
            )

    def allocate(self, nbytes: int, kind: str = "device", sliced: bool = False) -> Buffer:
        """A buffer of `nbytes`, with undefined content. `sliced`: only slices of it will be bound to kernels.

        Raises BufferSizeError over a limit of the device, OutOfMemoryError where it has no room.
        """
        self.check_size(nbytes, sliced)
        step = 4 if self._exact else ALIGNMENT
        reserved = max(1, -(-nbytes // step)) * step
        self.queue.collect()
        for make_room in (lambda: None, self.make_room):
            try:
                return self._allocated(nbytes, reserved, kind)
            except OutOfMemoryError:
                make_room()
                self.queue.finish()  # what was freed may still be in use
        return self._allocated(nbytes, reserved, kind)

    def _allocated(self, nbytes: int, reserved: int, kind: str) -> Buffer:
        with self._lock:
            block, offset = self._find(reserved, kind) or self._grow(reserved, kind)
            self._used += reserved
            self._peak = max(self._peak, self._used)
            self._buffers += 1
        return Buffer(self, block, offset, nbytes, reserved)

    def _find(self, nbytes: int, kind: str) -> tuple[MemoryBlock, int] | None:
        """Cuts `nbytes` from the smallest free range that holds them."""
        fits = [
            (size, i, j)
            for i, block in enumerate(self._blocks)
            if block.kind == kind
            for j, (_, size) in enumerate(block.free)
            if size >= nbytes
        ]
        if not fits:
            return None
        _, i, j = min(fits)
        return self._blocks[i], self._blocks[i].take(j, nbytes)

    def _grow(self, nbytes: int, kind: str) -> tuple[MemoryBlock, int]:
        limits = self._device.limits
        roomy = min(0 if self._exact else BLOCK_BYTES, limits.allocation_size, limits.buffer_size)
        for size in (max(roomy, nbytes), nbytes):
            try:
                block = self._new_block(size, kind)
            except OutOfMemoryError:
                self._drop_empty(keep=0)
                continue
            self._blocks.append(block)
            return block, block.take(0, nbytes)
        reserved = sum(block.nbytes for block in self._blocks)
        raise OutOfMemoryError(
            f"out of device memory on {self._device.info.name}: asked for {nbytes:,} bytes with {self._used:,} in use "
            f"({reserved:,} reserved) of a budget of {self.budget():,}"
        )

    def _new_block(self, nbytes: int, kind: str) -> MemoryBlock:
        device = self._device
        memory_type, mapped, cached = self._kinds[kind]
        handle = self._create_buffer(nbytes)
        info = vulkan.struct(
            "VkMemoryAllocateInfo", allocationSize=self._requirements(handle).size, memoryTypeIndex=memory_type
        )
        block = MemoryBlock(nbytes, handle, self._bind(handle, info), kind, None, cached)
        if mapped:
            pointer = ffi.new("void**")
            result = device.fn.vkMapMemory(device.handle, block.memory, 0, vulkan.WHOLE_SIZE, 0, pointer)
            if result < 0:
                self._destroy(block)
            vulkan.check(result, f"mapping {nbytes:,} bytes of device memory")
            block.bytes = np.frombuffer(ffi.buffer(pointer[0], nbytes), np.uint8)
        return block

    def _bind(self, handle: Any, info: Any) -> Any:
        """Allocates memory by `info` for a buffer, which is destroyed if that fails."""
        device = self._device
        memory = ffi.new("VkDeviceMemory*")
        result = device.fn.vkAllocateMemory(device.handle, info, ffi.NULL, memory)
        if result >= 0:
            result = device.fn.vkBindBufferMemory(device.handle, handle, memory[0], 0)
        if result < 0:
            device.fn.vkDestroyBuffer(device.handle, handle, ffi.NULL)
            device.fn.vkFreeMemory(device.handle, memory[0], ffi.NULL)  # NULL where none was allocated
        vulkan.check(result, f"allocating {info.allocationSize:,} bytes of device memory")
        return memory[0]

    def import_host(self, array: np.ndarray) -> Buffer:
        """The memory of `array` itself as a buffer: address and size must be multiples of `host_import_alignment`.

        Raises FeatureError without VK_EXT_external_memory_host, ValueError for an array that is not so aligned.
        """
        device = self._device
        if "VK_EXT_external_memory_host" not in device.features:
            raise FeatureError(f"{device.info.name} has no VK_EXT_external_memory_host to import host memory with")
        alignment = device.limits.host_import_alignment
        address = array.ctypes.data
        if not array.flags.c_contiguous or array.nbytes == 0 or address % alignment or array.nbytes % alignment:
            raise ValueError(
                f"cannot import {array.nbytes} bytes at {address:#x}: a C-contiguous array is wanted whose address and "
                f"size are multiples of {alignment}"
            )
        handle_type = vk.VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT
        pointer = ffi.cast("void*", address)
        properties = vulkan.struct("VkMemoryHostPointerPropertiesEXT")
        result = device.fn.vkGetMemoryHostPointerPropertiesEXT(device.handle, handle_type, pointer, properties)
        vulkan.check(result, "asking how host memory can be imported")
        handle = self._create_buffer(array.nbytes, imported=True)
        allowed = properties.memoryTypeBits & self._requirements(handle).memoryTypeBits
        coherent = vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
        types = [i for i in range(32) if allowed >> i & 1 and self._types.memoryTypes[i].propertyFlags & coherent]
        if not types:
            device.fn.vkDestroyBuffer(device.handle, handle, ffi.NULL)
            raise VulkanError(f"{device.info.name} has no memory type that this host memory can be imported as")
        imported = vulkan.struct("VkImportMemoryHostPointerInfoEXT", handleType=handle_type, pHostPointer=pointer)
        info = vulkan.struct(
            "VkMemoryAllocateInfo", allocationSize=array.nbytes, memoryTypeIndex=types[0], pNext=imported
        )
        memory = self._bind(handle, info)
        block = MemoryBlock(array.nbytes, handle, memory, "imported", array.reshape(-1).view(np.uint8), True)
        with self._lock:
            self._blocks.append(block)
            block.take(0, array.nbytes)
            self._used += array.nbytes
            self._peak = max(self._peak, self._used)
            self._buffers += 1
        return Buffer(self, block, 0, array.nbytes, array.nbytes)

    def release(self, block: MemoryBlock, offset: int, reserved: int) -> None:
        """Takes a range back; the device must be done with it."""
        with self._lock:
            block.give_back(offset, reserved)
            self._used -= reserved
            self._buffers -= 1
            self._drop_empty(keep=0 if self._exact else KEPT_BYTES)

    def _drop_empty(self, keep: int) -> None:
        """Destroys empty blocks, but for `keep` bytes of them; imported ones always."""
        for block in [block for block in self._blocks if block.empty]:
            if block.kind != "imported" and block.nbytes <= keep:
                keep -= block.nbytes
            else:
                self._blocks.remove(block)
                self._destroy(block)

    def _destroy(self, block: MemoryBlock) -> None:
        block.bytes = None
        self._device.fn.vkDestroyBuffer(self._device.handle, block.handle, ffi.NULL)
        self._device.fn.vkFreeMemory(self._device.handle, block.memory, ffi.NULL)

    def budget(self) -> int:
        """Bytes of the main heap that this process may use."""
        index, size = self._main_heap()
        if "VK_EXT_memory_budget" not in self._device.features:
            return size
        budget = vulkan.struct("VkPhysicalDeviceMemoryBudgetPropertiesEXT")
        properties = vulkan.struct("VkPhysicalDeviceMemoryProperties2", pNext=budget)
        self._device.instance.fn.vkGetPhysicalDeviceMemoryProperties2(self._device.physical, properties)
        return budget.heapBudget[index]

    @property
    def peak(self) -> int:
        """The most bytes in use so far; known of a lost device too."""
        return self._peak

    def stats(self) -> MemoryStats:
        self.queue.collect()
        with self._lock:
            reserved = sum(block.nbytes for block in self._blocks)
            return MemoryStats(self._used, self._peak, reserved, self._buffers, len(self._blocks), self.budget())

    def close(self) -> None:
        """Frees every block, used or not."""
        with self._lock:
            for block in self._blocks:
                self._destroy(block)
            self._blocks.clear()
