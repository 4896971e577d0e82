"""A queue: command buffers are submitted in order, and a timeline semaphore counts those that are done,
or a device that hangs or is lost is told.

A submission is known by its value on the timeline, 1 for the first; whoever is used by one keeps the newest value.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from vk_kernels.errors import DeviceTimeoutError
from vk_kernels.runtime import vulkan
from vk_kernels.runtime.logical_device import LogicalDevice
from vk_kernels.runtime.physical_device import QueuePlace
from vk_kernels.runtime.vulkan import ffi, vk

_last_use = attrgetter("last_use")


class Queue:
    """A queue of a logical device. Thread-safe. `timeout`: seconds that a wait takes at most."""

    def __init__(self, device: LogicalDevice, timeout: float, place: QueuePlace, beside: "Queue | None" = None):
        """beside: another one, made before; at the same place, it is the same queue with a timeline of its own."""
        self.device, self.timeout, self.place = device, timeout, place
        self._lock = beside._lock if beside and beside.place == place else threading.Lock()
        self._retired: deque[tuple[int, Callable[[], None]]] = deque()
        self._submitted = self._completed = 0
        self._newest: deque[tuple[int, str]] = deque(maxlen=64)  # (submission, its kernels), for messages
        queue = ffi.new("VkQueue*")
        device.fn.vkGetDeviceQueue(device.handle, place.family, place.index, queue)
        self._queue = queue[0]
        timeline = vulkan.struct("VkSemaphoreTypeCreateInfo", semaphoreType=vk.VK_SEMAPHORE_TYPE_TIMELINE)
        self._timeline = device.create("Semaphore", vulkan.struct("VkSemaphoreCreateInfo", pNext=timeline))
        self._counter = ffi.new("uint64_t*")
        self._prepare_submission()

    @property
    def submitted(self) -> int:
        """The newest submission; 0: there was none."""
        return self._submitted

    def _prepare_submission(self) -> None:
        """One VkSubmitInfo for every submission; `_lock` guards it."""
        self._signal_value = ffi.new("uint64_t[1]")
        self._command = ffi.new("VkCommandBuffer[1]")
        values = vulkan.struct(
            "VkTimelineSemaphoreSubmitInfo", signalSemaphoreValueCount=1, pSignalSemaphoreValues=self._signal_value
        )
        self._submit_info = vulkan.struct(
            "VkSubmitInfo",
            pNext=values,
            commandBufferCount=1,
            pCommandBuffers=self._command,
            signalSemaphoreCount=1,
            pSignalSemaphores=vulkan.array("VkSemaphore", [self._timeline]),
        )

    def _after(self, other: "Queue", value: int, commands: int) -> Any:
        """A VkSubmitInfo as that of `_prepare_submission`, of so many commands, that waits for another queue."""
        values = vulkan.struct(
            "VkTimelineSemaphoreSubmitInfo",
            waitSemaphoreValueCount=1,
            pWaitSemaphoreValues=ffi.new("uint64_t[]", [value]),
            signalSemaphoreValueCount=1,
            pSignalSemaphoreValues=self._signal_value,
        )
        return vulkan.struct(
            "VkSubmitInfo",
            pNext=values,
            waitSemaphoreCount=1,
            pWaitSemaphores=vulkan.array("VkSemaphore", [other._timeline]),
            pWaitDstStageMask=ffi.new("VkPipelineStageFlags[]", [vk.VK_PIPELINE_STAGE_ALL_COMMANDS_BIT]),
            commandBufferCount=commands,
            pCommandBuffers=self._command,
            signalSemaphoreCount=1,
            pSignalSemaphores=vulkan.array("VkSemaphore", [self._timeline]),
        )

    def follow(self, other: "Queue", value: int) -> None:
        """Has all that is submitted from here on wait for submission `value` of another queue, and see its writes."""
        self.submit(ffi.NULL, (), "waiting for another queue", (other, value))

    def submit(self, command: Any, users: Sequence[Any], label: str, after: "tuple[Queue, int] | None" = None) -> int:
        """Hands a command buffer to the queue; returns the value that the timeline reaches when it is done, which is
        the `last_use` of all `users` from here on; where the driver refuses it, theirs is what it was.

        after: another queue and its submission that this one waits for, on the device.
        """
        with self._lock:
            submit, before = self.device.fn.vkQueueSubmit, list(map(_last_use, users))
            value = self._submitted + 1
            self._command[0] = command
            self._signal_value[0] = value
            # Before it is so: a signal's handler may raise as the driver comes back.
            self._submitted = value
            self._newest.append((value, label))
            for user in users:
                user.last_use = value
            info = self._after(*after, commands=int(command != ffi.NULL)) if after else self._submit_info
            result = submit(self._queue, 1, info, ffi.NULL)
            if result < 0:
                self._submitted = value - 1
                for user, last_use in zip(users, before, strict=True):
                    user.last_use = last_use
                vulkan.check(result, f"submitting {label}")
        self.device.check_validation(label)
        return value

    def completed(self) -> int:
        """The newest submission that is done, and with it all before it."""
        value = self._counter  # of all threads: whichever value one reads there, that submission is done
        result = self.device.fn.vkGetSemaphoreCounterValue(self.device.handle, self._timeline, value)
        if result < 0:
            vulkan.check(result, f"running {self._running(self._submitted)} on {self.device.info.name}")
        self._completed = max(self._completed, value[0])
        return self._completed

    def is_done(self, value: int) -> bool:
        """Whether a submission is done; the driver is asked only if that is not known."""
        return value <= self._completed or value <= self.completed()

    def wait(self, value: int, timeout: float | None = None) -> None:
        """Returns when submission `value` is done.

        Raises DeviceTimeoutError, DeviceLostError or ValidationError, each naming the kernels that were running.
        """
        if value > self._completed:
            running = self._running(value)
            self._await(value, self.timeout if timeout is None else timeout)
            self.device.check_validation(running)

    def _await(self, value: int, seconds: float) -> None:
        info = vulkan.struct(
            "VkSemaphoreWaitInfo",
            semaphoreCount=1,
            pSemaphores=vulkan.array("VkSemaphore", [self._timeline]),
            pValues=ffi.new("uint64_t[]", [value]),
        )
        result = self.device.fn.vkWaitSemaphores(self.device.handle, info, int(seconds * 1e9))
        if result == vk.VK_TIMEOUT:
            raise DeviceTimeoutError(f"not done after {seconds:g} s on {self.device.info.name}: {self._running(value)}")
        vulkan.check(result, f"running {self._running(value)} on {self.device.info.name}")
        self._completed = max(self._completed, value)

    def _running(self, value: int) -> str:
        """The kernels of the submissions up to `value` that are not known to be done."""
        newest = self._newest.copy()  # takes no lock: whoever asks may hold it
        labels = [label for number, label in newest if self._completed < number <= value]
        return "; ".join(labels[-4:]) or "nothing"

    def retire(self, value: int, action: Callable[[], None]) -> None:
        """Has `action` called some time after submission `value` is done. Safe in a finalizer: it takes no lock."""
        self._retired.append((value, action))

    def finish(self) -> None:
        """Waits for all submissions, and calls what was retired."""
        self.wait(self._submitted)
        self.collect()

    def collect(self) -> None:
        """Calls the retired actions whose submissions are done."""
        completed = self.completed()
        for _ in range(len(self._retired)):
            try:
                value, action = self._retired.popleft()
            except IndexError:  # another thread took it
                return
            if value <= completed:
                action()
            else:
                self._retired.append((value, action))

    def wait_idle(self) -> None:
        """Waits for all submissions, in the time limit, whatever the validation layer says."""
        self._await(self._submitted, self.timeout)

    def forget_retired(self) -> None:
        """Drops what was retired: the device is destroyed as a whole."""
        self._retired.clear()

    def disown(self) -> None:
        """Makes a forked process's copy harmless: a thread that did not come along may hold its lock."""
        self._lock = threading.Lock()
