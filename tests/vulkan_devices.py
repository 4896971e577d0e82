"""The Vulkan device that the tests run on, and the marks of those that need one.

It is VK_KERNELS_DEVICE where that is set, else the CPU device, which every machine can have.
"""

import dataclasses
import functools
import gc
import os

import pytest

from vk_kernels.errors import NoDeviceError
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.features import CooperativeMatrix, Features
from vk_kernels.runtime.instance import layer_installed
from vk_kernels.runtime.kernel import manifest
from vk_kernels.runtime.memory import MemoryStats
from vk_kernels.runtime.physical_device import DeviceInfo, choose, list_devices

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


def memory_at_rest(device: Device) -> MemoryStats:
    """The memory in use when all submissions are done, and garbage holds none, be it another test's."""
    gc.collect()
    device.finish()
    return device.memory_stats()


def with_cooperative_matrices(info: DeviceInfo) -> DeviceInfo:
    """A device with all that matmul_coop1 needs."""
    needed = {
        feature for record in manifest().values() if record["entry"] == "matmul_coop1" for feature in record["features"]
    }
    rows = (CooperativeMatrix(16, 16, 16, "bf16", "bf16", "f32", "f32", "subgroup", 0),)
    limits = dataclasses.replace(info.limits, subgroup_size_range=(32, 32), shared_memory=48 << 10)
    return dataclasses.replace(
        info, kind="discrete", features=Features(info.features.names | needed, rows, ()), limits=limits
    )
