"""The raw Vulkan API: cffi structs and function pointers, from the PyPI package `vulkan`.

That package's own wrappers are passed by: they let nested structs be collected while the driver still reads them,
and cost about 20 us a call where a raw function pointer costs under 3.
"""

import weakref
from typing import Any

from vk_kernels.errors import DeviceLostError, NoDeviceError, OutOfMemoryError, VulkanError

vk: Any  # the package makes its names as it is imported
try:
    from vulkan import _vulkan as vk
except OSError:  # it looks for libvulkan first
    vk = None
ffi: Any = vk.ffi if vk else None

WHOLE_SIZE = 2**64 - 1  # the package's VK_WHOLE_SIZE is -1, which does not fit the field

# A struct owns what its fields point to: cffi itself keeps no such reference.
_owned = weakref.WeakKeyDictionary()


def require_loader() -> None:
    """Raises NoDeviceError if this machine has no Vulkan loader."""
    if vk is None:
        raise NoDeviceError(
            "no Vulkan loader (libvulkan.so.1) on this machine: install your GPU vendor's driver, or run "
            "scripts/install_vulkan.sh for a CPU device"
        )


def struct(type_name: str, **fields):
    """A new `type_name` with `sType` and `fields` set; it keeps alive every cdata and string given to it."""
    new = ffi.new(type_name + "*")
    constructor = getattr(vk, type_name, None)
    if constructor is not None and "sType" in constructor.__code__.co_varnames:
        new.sType = constructor.__defaults__[0]
    owned = []
    for name, value in fields.items():
        if isinstance(value, str):
            value = ffi.new("char[]", value.encode())
        setattr(new, name, value)
        owned.append(value)
    _owned[new] = owned
    return new


def array(type_name: str, values):
    """A new C array of `values`; structs among them are copied by value, and kept alive."""
    values = list(values)
    new = ffi.new(type_name + "[]", [v[0] if _is_struct_pointer(v) else v for v in values])
    _owned[new] = values
    return new


def strings(values):
    """A new `char*[]`."""
    return array("char*", [ffi.new("char[]", value.encode()) for value in values])


def _is_struct_pointer(value) -> bool:
    if not isinstance(value, ffi.CData):
        return False
    kind = ffi.typeof(value)
    return kind.kind == "pointer" and kind.item.kind == "struct" and not kind.item.cname.endswith("_T")


class RawStruct:
    """A struct that the package does not know: the header, then 32-bit members, which are attributes here."""

    HEADER_WORDS = 4  # sType, padding, pNext

    def __init__(self, structure_type: int, members: tuple[str, ...]):
        words = ffi.new("uint32_t[]", raw_words(members))
        words[0] = structure_type
        self.__dict__.update(_words=words, _members=members, pointer=ffi.cast("VkBaseOutStructure*", words))

    def __getattr__(self, name):
        if name == "pNext":
            return self.pointer.pNext
        if name not in self._members:
            raise AttributeError(name)
        return self._words[self.HEADER_WORDS + self._members.index(name)]

    def __setattr__(self, name, value):
        if name == "pNext":
            self.pointer.pNext = ffi.cast("VkBaseOutStructure*", value)
        else:
            self._words[self.HEADER_WORDS + self._members.index(name)] = int(value)


def raw_words(members: tuple[str, ...]) -> int:
    """32-bit words that a struct of a header and `members` takes, padded as C does."""
    return RawStruct.HEADER_WORDS + len(members) + len(members) % 2


class Functions:
    """Function pointers, fetched by name on first use: `functions.vkCmdDispatch(...)`."""

    def __init__(self, get_address):
        self._get_address = get_address

    def address(self, name: str):
        found = self._get_address(name.encode())
        if found == ffi.NULL:
            raise VulkanError(f"this Vulkan driver has no {name}")
        return found

    def __getattr__(self, name):
        function = ffi.cast("PFN_" + name, self.address(name))
        setattr(self, name, function)
        return function


class ClosedFunctions:
    """Stands in for the functions of a closed device."""

    def __init__(self, device_name: str):
        self._device_name = device_name

    def __getattr__(self, name):
        raise VulkanError(f"the Vulkan device {self._device_name!r} is closed")


def instance_functions(instance) -> Functions:
    return Functions(lambda name: vk.lib.vkGetInstanceProcAddr(instance, name))


def device_functions(device) -> Functions:
    return Functions(lambda name: vk.lib.vkGetDeviceProcAddr(device, name))


def address(handle) -> int:
    """A handle or pointer as an integer."""
    return int(ffi.cast("uintptr_t", handle))


def version(number: int) -> str:
    return f"{number >> 22 & 0x7F}.{number >> 12 & 0x3FF}.{number & 0xFFF}"


def check(result: int, doing: str) -> None:
    """Raises for a negative VkResult; `doing` says what was going on ("creating the pipeline of 'fill'")."""
    if result >= 0:
        return
    errors = {n: getattr(vk, n) for n in dir(vk) if n.startswith("VK_ERROR_")}
    name = next((n for n, number in errors.items() if number in (result, -result)), str(result))  # some lack the minus
    if result in (vk.VK_ERROR_OUT_OF_HOST_MEMORY, vk.VK_ERROR_OUT_OF_DEVICE_MEMORY):
        raise OutOfMemoryError(f"{doing}: {name}")
    if result == vk.VK_ERROR_DEVICE_LOST:
        raise DeviceLostError(f"the device was lost while {doing}; open it again to go on")
    raise VulkanError(f"{doing}: {name}")


def enumerate_all(function, item_type: str, *arguments, doing: str) -> list:
    """Vulkan's two-call listing: ask for the count, then for that many `item_type`."""
    count = ffi.new("uint32_t*")
    check(function(*arguments, count, ffi.NULL), doing)
    items = ffi.new(item_type + "[]", max(count[0], 1))
    constructor = getattr(vk, item_type, None)
    if constructor is not None and "sType" in constructor.__code__.co_varnames:
        for i in range(count[0]):
            items[i].sType = constructor.__defaults__[0]
    check(function(*arguments, count, items), doing)
    listed = [items[i] for i in range(count[0])]
    if ffi.typeof(item_type).kind == "struct":
        for item in listed:
            _owned[item] = items  # a struct in an array is a view: it must keep the array alive
    return listed
