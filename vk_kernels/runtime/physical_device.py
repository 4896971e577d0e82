"""Physical devices: which there are, best first, what each can do, and which one a selector names."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vk_kernels.errors import NoDeviceError
from vk_kernels.runtime import vulkan
from vk_kernels.runtime.features import (
    DeviceLimits,
    Features,
    device_extensions,
    device_properties,
    query_features,
    query_limits,
)
from vk_kernels.runtime.instance import NO_DRIVER, Instance
from vk_kernels.runtime.vulkan import ffi, vk

# VkPhysicalDeviceType -> our name; the order is the order of choice. A CPU device is taken only when asked for.
_KINDS = {2: "discrete", 1: "integrated", 3: "virtual", 0: "other", 4: "cpu"}

_COMPUTE, _TRANSFER = vk.VK_QUEUE_COMPUTE_BIT, vk.VK_QUEUE_TRANSFER_BIT
_WORK = (  # kinds of work that a queue family says it takes
    vk.VK_QUEUE_GRAPHICS_BIT
    | _COMPUTE
    | vk.VK_QUEUE_VIDEO_DECODE_BIT_KHR
    | vk.VK_QUEUE_VIDEO_ENCODE_BIT_KHR
    | vk.VK_QUEUE_OPTICAL_FLOW_BIT_NV
    | _TRANSFER
)


@dataclass(frozen=True)
class DeviceInfo:
    """A device that the loader lists. `index` selects it; `memory` is its largest local heap in bytes.

    `unusable` says why the runtime cannot use it, and is empty where it can.
    """

    index: int
    name: str
    kind: str
    api_version: str
    driver: str
    driver_version: int
    vendor_id: int
    device_id: int
    cache_uuid: str
    memory: int
    features: Features = field(repr=False)
    limits: DeviceLimits = field(repr=False)
    unusable: str = ""

    def __str__(self) -> str:
        return f"{self.index}: {self.name} ({self.kind}, Vulkan {self.api_version}, {self.driver})"


class QueuePlace(NamedTuple):
    """A queue by its family and its index there. computes: whether it takes more than transfers."""

    family: int
    index: int = 0
    computes: bool = True


class QueuePlaces(NamedTuple):
    """The queues of a device: for its work, and for exchanges beside it: for what is added up, sent and received.

    They may be the same.
    """

    work: QueuePlace
    exchange: QueuePlace
    send: QueuePlace
    receive: QueuePlace


class DevicePlace(NamedTuple):
    """The place of a device. pci: its address, empty where the driver does not say. group: the indices of the device
    group that it is in, which can read each other's memory."""

    pci: str
    group: tuple[int, ...]


def list_devices(without: Iterable[str] = ()) -> list[DeviceInfo]:
    """Every Vulkan device of this machine, best first. Extensions in `without` count as absent.

    Raises NoDeviceError without a loader or a driver.
    """
    instance = Instance()
    try:
        return [info for info, _, _ in survey(instance, frozenset(without))]
    finally:
        instance.close()


def list_places() -> list[DevicePlace]:
    """The place of every device, in the order of `list_devices`, which a start need not ask for.

    Raises NoDeviceError as that does.
    """
    instance = Instance()
    try:
        handles = [physical for physical, _ in _ranked(instance)]
        groups = [tuple(i for i, one in enumerate(handles) if one in group) for group in instance.device_groups()]
        return [
            DevicePlace(_pci_address(instance.fn, physical), next((group for group in groups if i in group), ()))
            for i, physical in enumerate(handles)
        ]
    finally:
        instance.close()


def survey(instance: Instance, without: frozenset[str]) -> list[tuple[DeviceInfo, Any, int]]:
    """(info, physical device, queue family) of every device, best first."""
    return [
        _describe(instance.fn, i, physical, properties, without)
        for i, (physical, properties) in enumerate(_ranked(instance))
    ]


def _ranked(instance: Instance) -> list[tuple[Any, Any]]:
    """(physical device, properties) of every device, best first."""
    ranks = list(_KINDS)
    found = [(physical, device_properties(instance.fn, physical)) for physical in instance.physical_devices()]
    if not found:
        raise NoDeviceError(NO_DRIVER)
    return sorted(found, key=lambda item: ranks.index(item[1].deviceType))


def _describe(fn, index: int, physical: Any, properties: Any, without: frozenset[str]) -> tuple[DeviceInfo, Any, int]:
    family, timestamp_bits = _compute_queue(fn, physical)
    old = _is_old(properties)
    features = Features(frozenset()) if old else query_features(fn, physical, without)
    driver = vulkan.struct("VkPhysicalDeviceDriverProperties")
    if not old:
        fn.vkGetPhysicalDeviceProperties2(physical, vulkan.struct("VkPhysicalDeviceProperties2", pNext=driver))
    unusable = ""
    if old:
        unusable = f"it has Vulkan {vulkan.version(properties.apiVersion)}, and 1.2 is needed"
    elif family < 0:
        unusable = "it has no queue for compute work"
    elif "timelineSemaphore" not in features:
        unusable = "it has no timeline semaphores"
    memory = ffi.new("VkPhysicalDeviceMemoryProperties*")
    fn.vkGetPhysicalDeviceMemoryProperties(physical, memory)
    heaps = [memory.memoryHeaps[i] for i in range(memory.memoryHeapCount)]
    info = DeviceInfo(
        index=index,
        name=ffi.string(properties.deviceName).decode(),
        kind=_KINDS[properties.deviceType],
        api_version=vulkan.version(properties.apiVersion),
        driver=f"{ffi.string(driver.driverName).decode()} {ffi.string(driver.driverInfo).decode()}".strip(),
        driver_version=properties.driverVersion,
        vendor_id=properties.vendorID,
        device_id=properties.deviceID,
        cache_uuid=bytes(properties.pipelineCacheUUID).hex(),
        memory=max((heap.size for heap in heaps if heap.flags & vk.VK_MEMORY_HEAP_DEVICE_LOCAL_BIT), default=0),
        features=features,
        limits=query_limits(fn, physical, features, timestamp_bits),
        unusable=unusable,
    )
    return info, physical, family


def _is_old(properties: Any) -> bool:
    """Whether a device has less than Vulkan 1.2: it is not asked by what came later."""
    return properties.apiVersion < 1 << 22 | 2 << 12


def _pci_address(fn, physical: Any) -> str:
    """The address as `lspci -D` writes it; empty where the driver does not say."""
    old = _is_old(device_properties(fn, physical))
    if old or "VK_EXT_pci_bus_info" not in device_extensions(fn, physical):
        return ""
    bus = vulkan.struct("VkPhysicalDevicePCIBusInfoPropertiesEXT")
    fn.vkGetPhysicalDeviceProperties2(physical, vulkan.struct("VkPhysicalDeviceProperties2", pNext=bus))
    return f"{bus.pciDomain:04x}:{bus.pciBus:02x}:{bus.pciDevice:02x}.{bus.pciFunction}"


def _compute_queue(fn, physical: Any) -> tuple[int, int]:
    """(index, timestamp bits) of the first queue family for compute; -1 where there is none."""
    families = enumerate(_queue_families(fn, physical))
    return next(((i, each.timestamp_bits) for i, each in families if each.flags & _COMPUTE), (-1, 0))


def queue_places(fn, physical: Any, family: int) -> QueuePlaces:
    """The queues that a device is used by. family: that of its work."""
    found = _queue_families(fn, physical)
    computes = next((i for i, each in enumerate(found) if each.flags & _COMPUTE and i != family), family)
    # What does nothing but transfers has engines of its own for them. Video's families transfer, too.
    copies = next((i for i, each in enumerate(found) if each.flags & _WORK == _TRANSFER), None)
    work, exchange = QueuePlace(family), QueuePlace(computes)
    if copies is None:
        return QueuePlaces(work, exchange, exchange, exchange)
    last = min(1, found[copies].count - 1)
    return QueuePlaces(work, exchange, QueuePlace(copies, 0, False), QueuePlace(copies, last, False))


class _QueueFamily(NamedTuple):
    flags: int
    count: int
    timestamp_bits: int


def _queue_families(fn, physical: Any) -> list[_QueueFamily]:
    """The queue families of a device, in its order."""
    count = ffi.new("uint32_t*")
    fn.vkGetPhysicalDeviceQueueFamilyProperties(physical, count, ffi.NULL)
    families = ffi.new("VkQueueFamilyProperties[]", count[0])
    fn.vkGetPhysicalDeviceQueueFamilyProperties(physical, count, families)
    found = (families[i] for i in range(count[0]))  # they live no longer than `families`
    return [_QueueFamily(each.queueFlags, each.queueCount, each.timestampValidBits) for each in found]


def choose(devices: Sequence[DeviceInfo], selector: int | str | None = None) -> DeviceInfo:
    """The device that `selector` names: an index, 'gpu', 'cpu', or part of a name (any case).

    None takes the environment's VK_KERNELS_DEVICE, or else the best real GPU; a CPU device must be asked for.
    Raises NoDeviceError, listing the devices, where none answers.
    """
    if selector is None:
        selector = os.environ.get("VK_KERNELS_DEVICE") or None
    listed = "; ".join(map(str, devices))
    if isinstance(selector, int) or (selector or "").isdecimal():
        matching = [device for device in devices if device.index == int(selector)]
        matching = matching or [device for device in devices if str(selector) in device.name]  # "4090"
    elif selector is None or selector.lower() == "gpu":
        matching = [device for device in devices if device.kind != "cpu"]
    elif selector.lower() == "cpu":
        matching = [device for device in devices if device.kind == "cpu"]
    else:
        matching = [device for device in devices if selector.lower() in device.name.lower()]
    if not matching and selector is None:
        raise NoDeviceError(
            f"no GPU with a Vulkan driver, only a CPU device, which must be asked for: VK_KERNELS_DEVICE=cpu ({listed})"
        )
    if not matching:
        raise NoDeviceError(f"no Vulkan device is called {selector!r}; take one of these: {listed}")
    usable = [device for device in matching if not device.unusable]
    if not usable:
        raise NoDeviceError(f"cannot use {matching[0]}: {matching[0].unusable}")
    return usable[0]
