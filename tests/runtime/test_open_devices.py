"""One open device per physical device, by whatever name it is asked for."""

import pytest
from vulkan_devices import SELECTOR, needs_vulkan

from vk_kernels.runtime import open_devices
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.open_devices import open_device

pytestmark = needs_vulkan


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch):
    """As in a process that has none open, whose default device is the tests' one."""
    monkeypatch.setenv("VK_KERNELS_DEVICE", SELECTOR)
    monkeypatch.setattr(open_devices, "_devices", {})
    yield
    open_device().close()


@pytest.mark.parametrize("first", [SELECTOR, ""])
def test_all_names_of_a_device_give_the_one_that_is_open(first):
    opened = open_device(first)
    assert opened.exchange_queue is not opened.queue  # whoever asks for it first
    for name in ("", SELECTOR, opened.info.index, opened.info.name):
        assert open_device(name) is opened


def test_after_a_close_all_names_give_one_new_device():
    names = ["", SELECTOR]
    [first] = {open_device(name) for name in names}
    first.close()
    [second] = {open_device(name) for name in names}
    assert second is not first
    assert second.buffer(4).size == 4


def test_the_default_device_stays_what_it_was_until_it_is_closed(monkeypatch):
    opened = open_device()
    monkeypatch.setenv("VK_KERNELS_DEVICE", "absent")
    assert open_device() is opened


def test_a_device_that_is_opened_beside_the_table_is_another():
    with Device.open(SELECTOR) as other:
        assert open_device() is not other
