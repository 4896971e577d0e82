"""A logical device: the handle of an open device, its functions, and the Vulkan objects made on it."""

from pathlib import Path
from typing import Any

from vk_kernels.runtime import disk_cache, vulkan
from vk_kernels.runtime.features import enabling
from vk_kernels.runtime.instance import Instance
from vk_kernels.runtime.physical_device import DeviceInfo, QueuePlaces
from vk_kernels.runtime.vulkan import ffi


class LogicalDevice:
    """A VkDevice with every feature of ours that it has enabled. It owns its instance.

    `fn`: the device's functions. `cache_dir`: where the pipelines that its driver compiled are kept. `families`: of its
    queues, the first of them that of its work.
    """

    def __init__(self, instance: Instance, info: DeviceInfo, physical: Any, places: QueuePlaces):
        self.instance, self.info, self.physical = instance, info, physical
        self._counts = {
            place.family: max(other.index + 1 for other in places if other.family == place.family) for place in places
        }
        self.families = tuple(self._counts)
        self.features, self.limits = info.features, info.limits
        self.closed = False
        self.cache_dir = _cache_dir(info)
        # Validation on the GPU takes pushed descriptors for uninitialized ones (layer 1.3.239).
        self.push_descriptors = "VK_KHR_push_descriptor" in info.features and instance.validation != "gpu"
        self._made: dict[tuple[str, int], Any] = {}
        self.handle = self._create()
        self.fn: Any = vulkan.device_functions(self.handle)

    def _create(self) -> Any:
        gpu_validation = self.instance.validation == "gpu"
        head, _chain, extensions = enabling(self.instance.fn, self.physical, self.features, gpu_validation)
        priorities = ffi.new("float[]", [1.0] * max(self._counts.values()))
        queues = [
            vulkan.struct(
                "VkDeviceQueueCreateInfo", queueFamilyIndex=family, queueCount=count, pQueuePriorities=priorities
            )
            for family, count in self._counts.items()
        ]
        info = vulkan.struct(
            "VkDeviceCreateInfo",
            pNext=head,
            queueCreateInfoCount=len(queues),
            pQueueCreateInfos=vulkan.array("VkDeviceQueueCreateInfo", queues),
            enabledExtensionCount=len(extensions),
            ppEnabledExtensionNames=vulkan.strings(extensions),
        )
        handle = ffi.new("VkDevice*")
        result = self.instance.fn.vkCreateDevice(self.physical, info, ffi.NULL, handle)
        vulkan.check(result, f"opening {self.info.name}")
        return handle[0]

    def create(self, kind: str, info: Any) -> Any:
        """Creates a Vk`kind` that lives until `destroy`, or until the device is closed."""
        handle = ffi.new(f"Vk{kind}*")
        result = getattr(self.fn, f"vkCreate{kind}")(self.handle, info, ffi.NULL, handle)
        vulkan.check(result, f"creating a Vk{kind}")
        self._made[kind, vulkan.address(handle[0])] = handle[0]
        return handle[0]

    def destroy(self, kind: str, handle: Any) -> None:
        """Destroys what `create` made; a second time does nothing."""
        if self._made.pop((kind, vulkan.address(handle)), None) is not None:
            getattr(self.fn, f"vkDestroy{kind}")(self.handle, handle, ffi.NULL)

    def check_validation(self, doing: str) -> None:
        """Raises ValidationError for what the validation layer found since the last call."""
        self.instance.check_validation(doing)

    def destroy_all(self) -> None:
        """Destroys what is left of what `create` made, and the device; nothing may be running."""
        for kind, handle in list(self._made):
            self.destroy(kind, ffi.cast(f"Vk{kind}", handle))
        self.fn.vkDestroyDevice(self.handle, ffi.NULL)
        self.fn = vulkan.ClosedFunctions(self.info.name)


def _cache_dir(info: DeviceInfo) -> Path:
    """The folder of the pipelines that this device's driver compiled. Raises SettingError as `most_bytes`."""
    disk_cache.most_bytes()  # here: a mistake in it need not wait for the first kernel
    return disk_cache.root() / f"{info.vendor_id:04x}-{info.device_id:04x}-{info.cache_uuid}-{info.driver_version:x}"
