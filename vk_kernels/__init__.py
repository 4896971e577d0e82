"""The hot operations of a transformer, for JAX, with kernels for any Vulkan GPU."""

import importlib
from typing import Any

__all__ = ["Array", "device_get", "device_put", "jit", "use"]


_MODULES = {
    "Array": "vk_kernels.runtime.array",
    "device_get": "vk_kernels.bridge.jit",
    "device_put": "vk_kernels.bridge.jit",
    "jit": "vk_kernels.bridge.jit",
    "use": "vk_kernels.bridge.use",
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for: the Vulkan runtime below them must not need jax."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
