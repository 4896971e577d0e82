"""The devices that this process has open: one per physical device, however it is named, until it is closed."""

import threading

from vk_kernels.runtime.device import Device
from vk_kernels.runtime.instance import validation_mode
from vk_kernels.runtime.physical_device import choose, list_devices

_devices: dict[str, Device] = {}  # by selector; what several of them name is in it several times
_lock = threading.Lock()


def open_device(selector: int | str = "") -> Device:
    """The open device that `selector` names (see `choose`), opened where it is not.

    '' names the process's default device: it is chosen as None says there, and stays chosen until it is closed.
    Raises NoDeviceError, or SettingError for a variable of ours that means nothing, whatever devices there are.
    """
    selector = str(selector)
    with _lock:
        found = _devices.get(selector)
        if found is None or found.closed:
            found = _devices[selector] = _open(selector)
        return found


def _open(selector: str) -> Device:
    validation_mode(None)  # raises before a device is looked for
    index = choose(list_devices(), selector or None).index
    already = (device for device in _devices.values() if device.info.index == index and not device.closed)
    return next(already, None) or Device.open(index)
