"""The devices that this process has open: one per physical device, however it is named, until it is closed."""

import threading

from vk_kernels.runtime.device import Device
from vk_kernels.runtime.physical_device import choose, list_devices

_devices: dict[str, Device] = {}  # by selector; what several of them name is in it several times
_lock = threading.Lock()


def open_device(selector: int | str = "") -> Device:
    """The open device that `selector` names (see `choose`), opened where it is not.

    '' names the process's default device: it is chosen as None says there, and stays chosen until it is closed.
    Raises what `Device.open` does.
    """
    selector = str(selector)
    with _lock:
        found = _devices.get(selector)
        if found is None or found.closed:
            found = _devices[selector] = _open(selector)
        return found


def _open(selector: str) -> Device:
    others = [device for device in _devices.values() if not device.closed]
    if others:  # one of them may be the device that is meant
        index = choose(list_devices(), selector or None).index
        for device in others:
            if device.info.index == index:
                return device
    return Device.open(selector or None)
