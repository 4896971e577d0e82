"""The devices that this process has open: one per physical device, however it is named, until it is closed."""

import threading

from vk_kernels.runtime.device import Device, default_device
from vk_kernels.runtime.physical_device import choose, list_devices

_devices: dict[str, Device] = {}  # by selector
_lock = threading.Lock()


def open_device(selector: int | str = "") -> Device:
    """The open device that `selector` names (see `physical_device.choose`), opened where it is not.

    '' is the process's default device. Raises NoDeviceError.
    """
    selector = str(selector)
    with _lock:
        found = _devices.get(selector)
        if found is None or found.closed:
            found = _devices[selector] = _open(selector)
        return found


def _open(selector: str) -> Device:
    if not selector:
        return default_device()
    index = choose(list_devices(), selector).index
    for device in _devices.values():
        if device.info.index == index and not device.closed:
            return device
    return Device.open(index)
