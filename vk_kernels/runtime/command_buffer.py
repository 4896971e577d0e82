"""Command buffers: dispatches recorded with the barriers they need, submitted, and waited for.

Synchronization, in full: a recording ends with a barrier that makes all its writes visible to the host and to
whatever is submitted after it on the device's one queue. Within it, a barrier stands where a command reads or writes
a byte range that one before it, since the last barrier, wrote (or read, if it writes).
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from vk_kernels.errors import VulkanError
from vk_kernels.runtime import vulkan
from vk_kernels.runtime.hazards import PendingAccesses, Range
from vk_kernels.runtime.kernel import Kernel
from vk_kernels.runtime.memory import Buffer, UsageTracker
from vk_kernels.runtime.queue import Queue
from vk_kernels.runtime.vulkan import ffi, vk

Timing = tuple[str, float]  # (label of a dispatch, seconds on the device)

_POOL_SETS, _POOL_DESCRIPTORS = 256, 2048  # of each descriptor pool, where there are no push descriptors


@functools.cache
def _barriers(computes: bool) -> tuple[Any, Any, Any]:
    """VkMemoryBarriers between dispatches, between all commands, and at the end of a recording.

    computes: whether the queue does more than transfers: it must know the accesses.
    """
    read, write = (vk.VK_ACCESS_SHADER_READ_BIT, vk.VK_ACCESS_SHADER_WRITE_BIT) if computes else (0, 0)
    writes = write | vk.VK_ACCESS_TRANSFER_WRITE_BIT
    uses = writes | read | vk.VK_ACCESS_TRANSFER_READ_BIT
    host = vk.VK_ACCESS_HOST_READ_BIT | vk.VK_ACCESS_HOST_WRITE_BIT
    masks = (write, read | write), (writes, uses), (writes, uses | host)
    return tuple(vulkan.struct("VkMemoryBarrier", srcAccessMask=a, dstAccessMask=b) for a, b in masks)


class Submission:
    """A recording that was handed to the device. It keeps alive all that the recording uses."""

    def __init__(self, recorder: "CommandRecorder", value: int):
        self._recorder = recorder
        self.value = value  # the device's timeline reaches this when the work is done

    @property
    def done(self) -> bool:
        return self._recorder.queue.completed() >= self.value

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the work is done. `timeout` in seconds; None is the device's own.

        Raises DeviceTimeoutError, DeviceLostError or ValidationError, each naming the kernels of the recording.
        """
        self._recorder.queue.wait(self.value, timeout)

    def timings(self) -> list[Timing]:
        """Device time of every dispatch, in order, once the work is done. The recording must have timestamps."""
        self.wait()
        return self._recorder.read_timestamps()


class CommandRecorder:
    """Records commands into one command buffer, then submits it. Not for two threads at once.

    `replay` allows many submissions, also while earlier ones run. `hazards=False` leaves every barrier to the caller.
    `timestamps` is the number of dispatches to time, which then run one at a time.

    A buffer keeps count of what is submitted to its memory's own queue. Of the commands of another queue it knows
    nothing: whoever uses one waits before the buffer is used otherwise, or given up.
    """

    def __init__(self, queue: Queue, hazards: bool = True, timestamps: int = 0, replay: bool = False):
        device = self.device = queue.device
        self.queue = queue
        self.last_use = 0  # the newest submission
        self._barriers = _barriers(queue.place.computes)
        self._compute = vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT if queue.place.computes else 0
        self._hazards = hazards
        self._tracker = UsageTracker() if replay else None
        self._capacity = timestamps
        self._buffers: dict[int, Buffer] = {}  # by id: every buffer (never a slice) that the commands use
        self._descriptor_pools: list[Any] = []
        self._queries = ffi.NULL
        if timestamps and not device.limits.timestamp_bits:
            raise VulkanError(f"{device.info.name} has no timestamps")
        queue.collect()
        info = vulkan.struct("VkCommandPoolCreateInfo", queueFamilyIndex=queue.place.family)
        self._pool = device.create("CommandPool", info)
        allocate = vulkan.struct("VkCommandBufferAllocateInfo", commandPool=self._pool, commandBufferCount=1)
        command = ffi.new("VkCommandBuffer*")
        result = device.fn.vkAllocateCommandBuffers(device.handle, allocate, command)
        vulkan.check(result, "allocating a command buffer")
        self._command = command[0]
        if timestamps:
            info = vulkan.struct(
                "VkQueryPoolCreateInfo", queryType=vk.VK_QUERY_TYPE_TIMESTAMP, queryCount=2 * timestamps
            )
            self._queries = device.create("QueryPool", info)
        self._begin()

    def _begin(self) -> None:
        self.labels: list[str] = []
        self._pending = PendingAccesses()  # of ranges of VkBuffers
        self._transfers = False  # whether any command is a copy or a fill
        self._pipeline = None
        self._timed = 0
        self._ended = self._submitted = False
        once, often = vk.VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT, vk.VK_COMMAND_BUFFER_USAGE_SIMULTANEOUS_USE_BIT
        usage = often if self._tracker else once
        info = vulkan.struct("VkCommandBufferBeginInfo", flags=usage)
        vulkan.check(self.device.fn.vkBeginCommandBuffer(self._command, info), "beginning a command buffer")
        if self._capacity:
            self.device.fn.vkCmdResetQueryPool(self._command, self._queries, 0, 2 * self._capacity)

    def reset(self) -> None:
        """Forgets all commands, once the last submission is done."""
        device = self.device
        self.queue.wait(self.last_use)
        self._forget_buffers()
        vulkan.check(device.fn.vkResetCommandPool(device.handle, self._pool, 0), "resetting a command pool")
        for pool in self._descriptor_pools:
            device.fn.vkResetDescriptorPool(device.handle, pool, 0)
        self._begin()

    def dispatch(
        self,
        kernel: Kernel,
        buffers: Sequence[Buffer],
        push_constants: bytes = b"",
        groups: tuple[int, int, int] = (1, 1, 1),
        label: str | None = None,
    ) -> None:
        """Runs `kernel` with `groups` workgroups; `buffers` in the order of its bindings.

        `label` stands for the dispatch in errors and timings: say the shapes there. Nothing is recorded where a count
        of groups is 0. Raises ValueError for arguments that do not fit the kernel or the device.
        """
        self._check_open()
        self._check_arguments(kernel, buffers, push_constants, groups)
        label = label or f"{kernel.label} {tuple(groups)}"
        if 0 in groups:
            return
        fn, command = self.device.fn, self._command
        reads = [_range_of(buffer) for buffer in buffers]
        writes = [found for found, writes in zip(reads, kernel.writable, strict=True) if writes]
        if self._capacity:
            self.barrier()  # what is timed runs alone
        self._order(reads, writes)
        compute = vk.VK_PIPELINE_BIND_POINT_COMPUTE
        if kernel.pipeline != self._pipeline:
            fn.vkCmdBindPipeline(command, compute, kernel.pipeline)
            self._pipeline = kernel.pipeline
        if buffers:
            self._bind(kernel, buffers)
        if push_constants:
            data = ffi.from_buffer(push_constants)
            fn.vkCmdPushConstants(command, kernel.layout, vk.VK_SHADER_STAGE_COMPUTE_BIT, 0, len(push_constants), data)
        self._timestamp()
        fn.vkCmdDispatch(command, *groups)
        self._timestamp()
        self.labels.append(label)
        self._keep(buffers)
        self.device.check_validation(label)

    def _check_arguments(self, kernel: Kernel, buffers: Sequence[Buffer], push_constants: bytes, groups) -> None:
        limits, name = self.device.limits, self.device.info.name
        if len(buffers) != len(kernel.writable):
            raise ValueError(f"kernel {kernel.label} takes {len(kernel.writable)} buffers, not {len(buffers)}")
        if len(push_constants) != kernel.push_constant_bytes:
            raise ValueError(
                f"kernel {kernel.label} takes {kernel.push_constant_bytes} bytes of push constants, "
                f"not {len(push_constants)}"
            )
        if len(groups) != 3 or any(not 0 <= n <= most for n, most in zip(groups, limits.workgroup_count, strict=True)):
            raise ValueError(f"kernel {kernel.label}: {groups} workgroups, but {name} takes {limits.workgroup_count}")
        for i, buffer in enumerate(buffers):
            if buffer.device is not self.device:
                raise ValueError(f"kernel {kernel.label}: buffer {i} is of another device, {buffer.device.info.name}")
            if buffer.freed:
                raise VulkanError(f"kernel {kernel.label}: buffer {i} ({buffer.size} bytes) was freed")
            if buffer.range > limits.storage_buffer_range:
                raise ValueError(
                    f"kernel {kernel.label}: buffer {i} of {buffer.size:,} bytes, but {name} binds at most "
                    f"{limits.storage_buffer_range:,} (maxStorageBufferRange)"
                )

    def _bind(self, kernel: Kernel, buffers: Sequence[Buffer]) -> None:
        # Push descriptors: one call and no object to manage; sets from a pool where a device has none.
        fn, command = self.device.fn, self._command
        words = [word for buffer in buffers for word in (buffer.handle_address, buffer.offset, buffer.range)]
        data = ffi.new("uint64_t[]", words)
        if kernel.push_descriptors:
            fn.vkCmdPushDescriptorSetWithTemplateKHR(command, kernel.template, kernel.layout, 0, data)
            return
        handle = self._new_set(kernel)
        fn.vkUpdateDescriptorSetWithTemplate(self.device.handle, handle[0], kernel.template, data)
        compute = vk.VK_PIPELINE_BIND_POINT_COMPUTE
        fn.vkCmdBindDescriptorSets(command, compute, kernel.layout, 0, 1, handle, 0, ffi.NULL)

    def _new_set(self, kernel: Kernel) -> Any:
        for pool in reversed(self._descriptor_pools):
            result, handle = self._allocate_set(pool, kernel)
            if result >= 0:
                return handle
        size = vulkan.struct(
            "VkDescriptorPoolSize", type=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, descriptorCount=_POOL_DESCRIPTORS
        )
        info = vulkan.struct("VkDescriptorPoolCreateInfo", maxSets=_POOL_SETS, poolSizeCount=1, pPoolSizes=size)
        self._descriptor_pools.append(self.device.create("DescriptorPool", info))
        result, handle = self._allocate_set(self._descriptor_pools[-1], kernel)
        vulkan.check(result, f"allocating the descriptors of {kernel.label}")
        return handle

    def _allocate_set(self, pool: Any, kernel: Kernel) -> tuple[int, Any]:
        """(VkResult, VkDescriptorSet[1])."""
        layouts = vulkan.array("VkDescriptorSetLayout", [kernel.set_layout])
        info = vulkan.struct(
            "VkDescriptorSetAllocateInfo", descriptorPool=pool, descriptorSetCount=1, pSetLayouts=layouts
        )
        handle = ffi.new("VkDescriptorSet[1]")
        return self.device.fn.vkAllocateDescriptorSets(self.device.handle, info, handle), handle

    def copy(
        self,
        source: Buffer,
        target: Buffer,
        nbytes: int | None = None,
        source_offset: int = 0,
        target_offset: int = 0,
    ) -> None:
        """Copies `nbytes` (default: all of `source`)."""
        self._check_open()
        nbytes = source.size if nbytes is None else nbytes
        for buffer, offset in ((source, source_offset), (target, target_offset)):
            if offset < 0 or offset + nbytes > buffer.size:
                raise ValueError(f"copy of {nbytes} bytes at {offset} does not fit a buffer of {buffer.size} bytes")
        if nbytes == 0:
            return
        start, end = source.offset + source_offset, target.offset + target_offset
        reads = [(source.handle_address, start, start + nbytes)]
        writes = [(target.handle_address, end, end + nbytes)]
        self._order_transfer(reads, writes)
        region = ffi.new("VkBufferCopy*", {"srcOffset": start, "dstOffset": end, "size": nbytes})
        self.device.fn.vkCmdCopyBuffer(self._command, source.handle, target.handle, 1, region)
        self._keep((source, target))
        self.device.check_validation("copy")

    def fill(self, target: Buffer, word: int = 0) -> None:
        """Sets every 32-bit word of `target`, up to its size rounded up to words."""
        self._check_open()
        self._order_transfer([], [_range_of(target)])
        self.device.fn.vkCmdFillBuffer(self._command, target.handle, target.offset, target.range, word)
        self._keep((target,))
        self.device.check_validation("fill")

    def barrier(self) -> None:
        """Everything before it is done, and its writes visible, before anything after it starts."""
        stages, barrier = self._compute, self._barriers[0]
        if self._transfers:
            stages, barrier = stages | vk.VK_PIPELINE_STAGE_TRANSFER_BIT, self._barriers[1]
        self.device.fn.vkCmdPipelineBarrier(self._command, stages, stages, 0, 1, barrier, 0, ffi.NULL, 0, ffi.NULL)
        self._pending.clear()

    def _order(self, reads: list[Range], writes: list[Range]) -> None:
        """Puts a barrier before a command that reads and writes these ranges, if there is a hazard."""
        if not self._hazards:
            return
        if self._pending.conflict(reads, writes):
            self.barrier()
        self._pending.add(reads, writes)

    def _order_transfer(self, reads: list[Range], writes: list[Range]) -> None:
        if not self._transfers:  # no barrier so far was one for transfers, so the first of them waits for everything
            self._transfers = True
            if self._hazards:
                self.barrier()
        self._order(reads, writes)

    def _keep(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            self._buffers[id(buffer.owner)] = buffer.owner

    def _timestamp(self) -> None:
        if not self._capacity:
            return
        if self._timed == 2 * self._capacity:
            raise ValueError(f"this recording has timestamps for {self._capacity} dispatches, and this is one more")
        stage = vk.VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT
        self.device.fn.vkCmdWriteTimestamp(self._command, stage, self._queries, self._timed)
        self._timed += 1

    def read_timestamps(self) -> list[Timing]:
        if not self._capacity:
            raise VulkanError("this recording has no timestamps: make it with device.new_recorder(timestamps=N)")
        device, count = self.device, self._timed
        if count == 0:
            return []
        ticks = ffi.new("uint64_t[]", count)
        flags = vk.VK_QUERY_RESULT_64_BIT
        result = device.fn.vkGetQueryPoolResults(
            device.handle, self._queries, 0, count, ffi.sizeof(ticks), ticks, 8, flags
        )
        vulkan.check(result, "reading timestamps")
        mask = 2**device.limits.timestamp_bits - 1  # counters of fewer than 64 bits wrap around
        seconds = device.limits.timestamp_period * 1e-9
        return [(label, (ticks[2 * i + 1] - ticks[2 * i] & mask) * seconds) for i, label in enumerate(self.labels)]

    def end(self) -> None:
        """Closes the recording; `submit` does it if it was not done."""
        if self._ended:
            return
        fn, command = self.device.fn, self._command
        compute, transfer = self._compute, vk.VK_PIPELINE_STAGE_TRANSFER_BIT
        after = compute | transfer | vk.VK_PIPELINE_STAGE_HOST_BIT
        barrier = self._barriers[2]
        fn.vkCmdPipelineBarrier(command, compute | transfer, after, 0, 1, barrier, 0, ffi.NULL, 0, ffi.NULL)
        vulkan.check(fn.vkEndCommandBuffer(command), "ending a command buffer")
        self._ended = True
        self._description = self.describe()
        if self._tracker:
            for buffer in self._counting:
                buffer.track(self._tracker)

    @property
    def _counting(self) -> list[Buffer]:
        """The buffers that keep count of its submissions."""
        return [buffer for buffer in self._buffers.values() if buffer.memory.queue is self.queue]

    def submit(self, after: tuple[Queue, int] | None = None) -> Submission:
        """Hands the commands to the device and returns at once. A second time needs `replay`.

        after: as of `Queue.submit`.
        """
        self.end()
        if self._tracker:
            used, freed = (self._tracker,), self._tracker.freed
        elif self._submitted:
            raise VulkanError(f"{self._description}: submitted already; record with replay=True to do so again")
        else:
            used = self._counting
            freed = next((buffer.size for buffer in used if buffer.freed), None)
        if freed is not None:
            raise VulkanError(f"{self._description}: a buffer of {freed} bytes was freed before the submission")
        self.queue.submit(self._command, (self, *used), self._description, after)
        self._submitted = True
        if not self._tracker:
            self._buffers.clear()  # from here on `last_use` keeps their memory from being given away
        return Submission(self, self.last_use)

    def _forget_buffers(self) -> None:
        if self._tracker:
            for buffer in self._counting:
                buffer.untrack(self._tracker)
        self._buffers.clear()

    def describe(self) -> str:
        """The kernels of the recording, for messages."""
        if not self.labels:
            return "copies"
        shown = ", ".join(self.labels[:4])
        return shown if len(self.labels) <= 4 else f"{shown} and {len(self.labels) - 4} more"

    def _check_open(self) -> None:
        if self._ended:
            raise VulkanError("this recording has ended: reset it first")

    def close(self) -> None:
        """Destroys the command buffer, once its last submission is done. A second call does nothing."""
        pools = [("CommandPool", self._pool), ("QueryPool", self._queries)]
        pools += [("DescriptorPool", pool) for pool in self._descriptor_pools]
        # Forgotten at once: a driver may give a new object the handle of one that is destroyed.
        device, self._pool, self._queries, self._descriptor_pools = self.device, ffi.NULL, ffi.NULL, []
        self._forget_buffers()
        self._ended = True
        for kind, handle in pools:
            if handle == ffi.NULL:
                continue
            self.queue.retire(self.last_use, lambda kind=kind, handle=handle: device.destroy(kind, handle))

    def __del__(self):
        if hasattr(self, "_pool") and not self.device.closed:
            self.close()


class Chain:
    """Recordings that stand for one. They run in order: each ends with a barrier for what is submitted after it."""

    def __init__(self, recorders: Sequence[CommandRecorder]):
        self._recorders = recorders

    @property
    def last_use(self) -> int:
        return self._recorders[-1].last_use

    def submit(self) -> Submission:
        """Hands them to the device, one submission each; returns the last one.

        All of them, also where something is raised in between, as signal handlers may: half of a program would leave an
        array half written. Only where the device refuses one, nothing after it may run.
        """
        raised: BaseException | None = None
        for recorder in self._recorders:
            before = recorder.last_use
            try:
                submission = recorder.submit() if raised else self._submit(recorder)
            except BaseException as error:
                raised = raised or error
                if recorder.last_use == before:  # not handed over
                    if isinstance(error, VulkanError):
                        break
                    recorder.submit()
        if raised:
            raise raised
        return submission

    def _submit(self, recorder: CommandRecorder) -> Submission:
        return recorder.submit()


class TimedChain(Chain):
    """Waits for each of its recordings before the next, and calls `learn` with the seconds that each took."""

    def __init__(self, recorders: Sequence[CommandRecorder], learn: Callable[[list[float]], None]):
        super().__init__(recorders)
        self._learn = learn
        self._seconds: list[float] = []

    def submit(self) -> Submission:
        self._seconds = []
        submission = super().submit()
        self._learn(self._seconds)
        return submission

    def _submit(self, recorder: CommandRecorder) -> Submission:
        start = time.perf_counter()
        submission = recorder.submit()
        submission.wait()
        self._seconds.append(time.perf_counter() - start)
        return submission


def _range_of(buffer: Buffer) -> Range:
    return buffer.handle_address, buffer.offset, buffer.offset + buffer.range
