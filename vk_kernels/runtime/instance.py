"""The Vulkan instance: how the loader is reached, and the validation layer when it is asked for."""

import os
import threading
from typing import Any

from vk_kernels.errors import NoDeviceError, SettingError, ValidationError, VulkanError
from vk_kernels.runtime import vulkan
from vk_kernels.runtime.vulkan import ffi, vk

LAYER = "VK_LAYER_KHRONOS_validation"
# Hazards between submissions too, not only within one: newer layers look for them unasked (Vulkan-ValidationLayers
# pull request 7129), and this is how older ones are asked.
_BETWEEN_SUBMISSIONS = "VALIDATION_CHECK_ENABLE_SYNCHRONIZATION_VALIDATION_QUEUE_SUBMIT"
_MESSAGE_CHARACTERS = 700


def validation_mode(asked: bool | str | None) -> str:
    """'' (off), 'sync' (the layer with synchronization validation) or 'gpu' (also checks accesses on the device).

    None takes VK_KERNELS_VALIDATION: unset, 0, 1 or gpu.
    """
    value = os.environ.get("VK_KERNELS_VALIDATION", "") if asked is None else asked
    modes = {"": "", "0": "", False: "", "1": "sync", "sync": "sync", True: "sync", "gpu": "gpu"}
    if value not in modes:
        raise SettingError(f"validation is 0, 1 or gpu (VK_KERNELS_VALIDATION), not {value!r}")
    return modes[value]


class Instance:
    """A VkInstance. With a validation mode, what the layer says waits in it for `check_validation`."""

    def __init__(self, validation: str = ""):
        """Raises NoDeviceError without a loader or a driver, VulkanError without a layer that is asked for."""
        vulkan.require_loader()
        self.validation = validation
        self._messages: list[str] = []
        self._lock = threading.Lock()
        self._messenger = ffi.NULL

        extensions, layers, behind = [], [], ffi.NULL
        flags = 0
        if "VK_KHR_portability_enumeration" in _extensions():  # without it, layered drivers (MoltenVK) stay hidden
            extensions.append("VK_KHR_portability_enumeration")
            flags = vk.VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
        if validation:
            _require_layer()
            os.environ.setdefault("VK_LAYER_ENABLES", _BETWEEN_SUBMISSIONS)
            layers, behind = [LAYER], _validation_features(validation)
            extensions += ["VK_EXT_debug_utils", "VK_EXT_validation_features"]
        application = vulkan.struct("VkApplicationInfo", pApplicationName="vk_kernels", apiVersion=_API_VERSION)
        info = vulkan.struct(
            "VkInstanceCreateInfo",
            flags=flags,
            pApplicationInfo=application,
            enabledExtensionCount=len(extensions),
            ppEnabledExtensionNames=vulkan.strings(extensions),
            enabledLayerCount=len(layers),
            ppEnabledLayerNames=vulkan.strings(layers),
            pNext=behind,
        )
        handle = ffi.new("VkInstance*")
        result = vk.lib.vkCreateInstance(info, ffi.NULL, handle)
        if result == vk.VK_ERROR_INCOMPATIBLE_DRIVER:
            raise NoDeviceError(NO_DRIVER)
        vulkan.check(result, "creating a Vulkan instance")
        self.handle = handle[0]
        self.fn: Any = vulkan.instance_functions(self.handle)
        if validation:
            try:
                self._listen()
            except BaseException:
                self.close()
                raise

    def _listen(self) -> None:
        severities = vk.VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT
        severities |= vk.VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT

        def receive(severity, types, data, user):
            text = " ".join(ffi.string(data.pMessage).decode(errors="replace").split())[:_MESSAGE_CHARACTERS]
            with self._lock:
                self._messages.append(text)
            return 0  # let the call go on

        self._callback = ffi.callback("PFN_vkDebugUtilsMessengerCallbackEXT", receive)  # must outlive the messenger
        info = vulkan.struct(
            "VkDebugUtilsMessengerCreateInfoEXT",
            messageSeverity=severities,
            messageType=vk.VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT,
            pfnUserCallback=self._callback,
        )
        messenger = ffi.new("VkDebugUtilsMessengerEXT*")
        result = self.fn.vkCreateDebugUtilsMessengerEXT(self.handle, info, ffi.NULL, messenger)
        vulkan.check(result, "listening to the validation layer")
        self._messenger = messenger[0]

    def check_validation(self, doing: str) -> None:
        """Raises ValidationError with the layer's errors and warnings since the last call.

        `doing` says what they belong to.
        """
        if not self._messages:
            return
        with self._lock:
            messages, self._messages = self._messages, []
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise ValidationError(f"{doing}: {messages[0]}{more}")

    def physical_devices(self) -> list[Any]:
        return vulkan.enumerate_all(
            self.fn.vkEnumeratePhysicalDevices, "VkPhysicalDevice", self.handle, doing="listing Vulkan devices"
        )

    def device_groups(self) -> list[list[Any]]:
        """The physical devices of each device group: those that can be one logical device, and share memory."""
        listed = vulkan.enumerate_all(
            self.fn.vkEnumeratePhysicalDeviceGroups,
            "VkPhysicalDeviceGroupProperties",
            self.handle,
            doing="listing device groups",
        )
        return [[group.physicalDevices[i] for i in range(group.physicalDeviceCount)] for group in listed]

    def close(self) -> None:
        if self._messenger != ffi.NULL:
            self.fn.vkDestroyDebugUtilsMessengerEXT(self.handle, self._messenger, ffi.NULL)
            self._messenger = ffi.NULL
        if self.handle != ffi.NULL:
            self.fn.vkDestroyInstance(self.handle, ffi.NULL)
            self.handle = ffi.NULL


_API_VERSION = 1 << 22 | 3 << 12  # 1.3: the newest whose rules we follow; devices of 1.2 work

NO_DRIVER = (
    "no Vulkan driver on this machine: install your GPU vendor's, or run scripts/install_vulkan.sh for a CPU device"
)


def _extensions(layer: Any = None) -> set[str]:
    listed = vulkan.enumerate_all(
        vk.lib.vkEnumerateInstanceExtensionProperties,
        "VkExtensionProperties",
        ffi.NULL if layer is None else ffi.new("char[]", layer.encode()),
        doing="listing instance extensions",
    )
    return {ffi.string(extension.extensionName).decode() for extension in listed}


def layer_installed() -> bool:
    """Whether the Khronos validation layer is there to be used."""
    vulkan.require_loader()
    listed = vulkan.enumerate_all(
        vk.lib.vkEnumerateInstanceLayerProperties, "VkLayerProperties", doing="listing instance layers"
    )
    return LAYER in {ffi.string(layer.layerName).decode() for layer in listed}


def _require_layer() -> None:
    if not layer_installed():
        raise VulkanError(
            f"validation was asked for, but {LAYER} is not installed (Debian: vulkan-validationlayers); "
            "install it or unset VK_KERNELS_VALIDATION"
        )


def _validation_features(mode: str) -> Any:
    enabled = [vk.VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT]
    if mode == "gpu":
        enabled.append(vk.VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_EXT)
        enabled.append(vk.VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_RESERVE_BINDING_SLOT_EXT)
    return vulkan.struct(
        "VkValidationFeaturesEXT",
        enabledValidationFeatureCount=len(enabled),
        pEnabledValidationFeatures=vulkan.array("VkValidationFeatureEnableEXT", enabled),
    )
