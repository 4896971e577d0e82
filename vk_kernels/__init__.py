"""JAX functions, and the operations of a transformer, on any Vulkan GPU."""

import importlib
from typing import TYPE_CHECKING, Any

from vk_kernels.errors import (
    BufferSizeError,
    DeviceLostError,
    DeviceTimeoutError,
    FeatureError,
    LinkError,
    NoDeviceError,
    OutOfMemoryError,
    SettingError,
    UnsupportedError,
    ValidationError,
    VulkanError,
)

if TYPE_CHECKING:
    from vk_kernels import ops
    from vk_kernels.bridge.array_methods import Array
    from vk_kernels.bridge.jit import device_get, device_put, jit
    from vk_kernels.bridge.use import use
    from vk_kernels.runtime.physical_device import list_devices as devices

__version__ = "0.1.0"

__all__ = [
    "Array",
    "BufferSizeError",
    "DeviceLostError",
    "DeviceTimeoutError",
    "FeatureError",
    "LinkError",
    "NoDeviceError",
    "OutOfMemoryError",
    "SettingError",
    "UnsupportedError",
    "ValidationError",
    "VulkanError",
    "device_get",
    "device_put",
    "devices",
    "jit",
    "ops",
    "use",
]

# Imported when they are asked for: the Vulkan runtime below them must not need jax.
_LAZY = {
    "Array": "vk_kernels.bridge.array_methods:Array",
    "device_get": "vk_kernels.bridge.jit:device_get",
    "device_put": "vk_kernels.bridge.jit:device_put",
    "devices": "vk_kernels.runtime.physical_device:list_devices",
    "jit": "vk_kernels.bridge.jit:jit",
    "ops": "vk_kernels.ops:",
    "use": "vk_kernels.bridge.use:use",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "jit":
        importlib.import_module("vk_kernels.ops")  # registers the kernels that it takes for what functions compute
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
