"""The devices that this process has open: one per physical device, however it is named, until it is closed."""

import threading

from vk_kernels.runtime.device import Device, default_device
from vk_kernels.runtime.physical_device import choose, list_devices

_devices: dict[str, Device] = {}  # by selector
_lock = threading.Lock()


def open_device(selector: int | str = "", exchange: bool = False) -> Device:
    """The open device that `selector` names (see `physical_device.choose`), opened where it is not.

    '' is the process's default device. exchange: whether one that is not open yet is to have an `exchange_queue`.
    Raises NoDeviceError.
    """
    selector = str(selector)
    with _lock:
        found = _devices.get(selector)
        if found is None or found.closed:
            found = _devices[selector] = _open(selector, exchange)
        return found


def _open(selector: str, exchange: bool) -> Device:
    if not selector:
        return default_device(exchange)
    index = choose(list_devices(), selector).index
    for device in _devices.values():
        if device.info.index == index and not device.closed:
            return device
    return Device.open(index, exchange=exchange)
