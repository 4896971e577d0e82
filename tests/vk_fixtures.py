"""What the Vulkan tests share: a device to run on, or the reason why there is none.

Import what a test module needs by name: `from vk_fixtures import vulkan_device  # noqa: F401`.
The tests run on VK_KERNELS_DEVICE where that is set, else on the CPU device, which every machine can have.
"""

import functools
import os
from collections.abc import Iterator

import pytest

from vk_kernels.errors import NoDeviceError
from vk_kernels.runtime.device import Device, choose, list_devices
from vk_kernels.runtime.instance import layer_installed

SELECTOR = os.environ.get("VK_KERNELS_DEVICE") or "cpu"


@functools.cache
def skip_reason() -> str:
    """Why no Vulkan test can run here; empty where they can."""
    try:
        choose(list_devices(), SELECTOR)
    except NoDeviceError as error:
        return str(error)
    return ""


needs_vulkan = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())
needs_layer = pytest.mark.skipif(
    bool(skip_reason()) or not layer_installed(), reason=skip_reason() or "no Khronos validation layer is installed"
)


@pytest.fixture(scope="module", name="device")
def vulkan_device() -> Iterator[Device]:
    """An open device for a test module; every one of its tests must leave it usable."""
    if skip_reason():
        pytest.skip(skip_reason())
    with Device.open(SELECTOR) as opened:
        yield opened
