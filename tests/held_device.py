"""A device that is not done before it may be: what a test says of a busy one is no matter of speed then."""

import contextlib
from collections.abc import Callable, Iterator

from vk_kernels.runtime import vulkan
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.queue import Queue


@contextlib.contextmanager
def held(device: Device) -> Iterator[Callable[[], None]]:
    """Nothing that is submitted from here on runs before the function that this gives is called, or the end."""
    gate, is_open = Queue(device, device.queue.timeout, device.queue.place, device.queue), []
    device.queue.follow(gate, 1)

    def let_go() -> None:
        if not is_open:
            is_open.append(True)
            signal = vulkan.struct("VkSemaphoreSignalInfo", semaphore=gate._timeline, value=1)
            vulkan.check(device.fn.vkSignalSemaphore(device.handle, signal), "letting a device go")

    try:
        yield let_go
    finally:
        let_go()
