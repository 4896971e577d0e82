"""Which Vulkan device the tests run on, and the marks of those that need one.

It is VK_KERNELS_DEVICE where that is set, else the CPU device, which every machine can have.
"""

import functools
import os

import pytest

from vk_kernels.errors import NoDeviceError
from vk_kernels.runtime.instance import layer_installed
from vk_kernels.runtime.physical_device import choose, list_devices

SELECTOR = os.environ.get("VK_KERNELS_DEVICE") or "cpu"

# conftest.py gives the first to all that use the fixture `device`, and skips what cannot run here.
needs_vulkan = pytest.mark.vulkan
needs_layer = pytest.mark.validation_layer


@functools.cache
def skip_reason() -> str:
    """Why no Vulkan test can run here; empty where they can."""
    try:
        choose(list_devices(), SELECTOR)
    except NoDeviceError as error:
        return str(error)
    return ""


def layer_skip_reason() -> str:
    """Why no test of the validation layer can run here; empty where they can."""
    return skip_reason() or ("" if layer_installed() else "no Khronos validation layer is installed")
