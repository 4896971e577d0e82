"""Errors: every message is one line that names the thing, what was found and the way out."""


class VulkanError(RuntimeError):
    """Any failure of the Vulkan runtime."""


class SettingError(VulkanError, ValueError):
    """An environment variable or an option has a value that means nothing."""


class NoDeviceError(VulkanError):
    """No loader, no driver, or no device that answers to the selector."""


class FeatureError(VulkanError):
    """A kernel needs a feature that the device lacks."""


class BufferSizeError(VulkanError, ValueError):
    """A buffer is larger than the device allows."""


class OutOfMemoryError(VulkanError, MemoryError):
    """The device has no room for a buffer."""


class DeviceTimeoutError(VulkanError, TimeoutError):
    """A submission did not finish within its time limit."""


class DeviceLostError(VulkanError):
    """The driver gave the device up while a submission was running; nothing more can run on it."""


class ValidationError(VulkanError):
    """The Khronos validation layer found a wrong use of the API, a data race or an access out of bounds."""


class LinkError(VulkanError):
    """Another process of this host ended, does not answer, or does something else than this one."""


class UnsupportedError(ValueError):
    """A function does what no kernel can: the message names the primitive, its shapes and the line."""
