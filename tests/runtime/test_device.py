"""Devices: which are listed, how one is chosen, and what is said where there is none."""

import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan
from waiting import PATIENCE

from vk_kernels.errors import DeviceLostError, NoDeviceError, SettingError, VulkanError
from vk_kernels.runtime import device as device_module
from vk_kernels.runtime import physical_device, vulkan
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.features import CooperativeMatrix, DeviceLimits, Features, _cooperative_matrices2
from vk_kernels.runtime.instance import validation_mode
from vk_kernels.runtime.physical_device import DeviceInfo, QueuePlace, choose, list_devices, list_places, queue_places

LIMITS = DeviceLimits(*[0] * 16)


def info(index: int, name: str, kind: str, unusable: str = "") -> DeviceInfo:
    return DeviceInfo(
        index, name, kind, "1.3.0", "driver", 1, 1, 1, "00", 1 << 30, Features(frozenset()), LIMITS, unusable
    )


GPU, OLD, CPU = info(0, "Big GPU 9000", "discrete"), info(1, "Old GPU", "integrated", "too old"), info(2, "llvm", "cpu")


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [(None, GPU), ("gpu", GPU), ("cpu", CPU), (2, CPU), ("2", CPU), ("big gpu", GPU), ("9000", GPU)],
)
def test_the_selector_is_an_index_a_kind_or_part_of_a_name(selector, wanted, monkeypatch):
    monkeypatch.delenv("VK_KERNELS_DEVICE", raising=False)
    assert choose([GPU, OLD, CPU], selector) is wanted


COPIES = QueuePlace(1, 0, False)
GRAPHICS, COMPUTE, TRANSFER, SPARSE, VIDEO = 1, 2, 4, 8, 32


@pytest.mark.parametrize(
    ("families", "places"),
    [
        ([(GRAPHICS | COMPUTE | TRANSFER, 1)], [QueuePlace(0)] * 4),
        ([(GRAPHICS | COMPUTE, 1), (TRANSFER | SPARSE, 1)], [QueuePlace(0), QueuePlace(0), COPIES, COPIES]),
        (
            [(GRAPHICS | COMPUTE, 16), (TRANSFER, 2), (COMPUTE, 8), (TRANSFER | VIDEO, 1)],
            [QueuePlace(0), QueuePlace(2), COPIES, QueuePlace(1, 1, False)],
        ),
        ([(TRANSFER | VIDEO, 1), (COMPUTE, 2)], [QueuePlace(1)] * 4),
    ],
)
def test_an_exchange_has_queues_of_other_families_where_there_are_some(families, places, monkeypatch):
    found = [physical_device._QueueFamily(flags, count, 64) for flags, count in families]
    monkeypatch.setattr(physical_device, "_queue_families", lambda fn, physical: found)
    work = next(i for i, (flags, _) in enumerate(families) if flags & COMPUTE)
    assert list(queue_places(None, None, work)) == places


def test_the_environment_selects_and_an_argument_wins_over_it(monkeypatch):
    monkeypatch.setenv("VK_KERNELS_DEVICE", "LLVM")
    assert choose([GPU, CPU]) is CPU
    assert choose([GPU, CPU], 0) is GPU


def test_a_cpu_device_is_never_chosen_unasked(monkeypatch):
    monkeypatch.delenv("VK_KERNELS_DEVICE", raising=False)
    with pytest.raises(NoDeviceError, match=r"only a CPU device.*VK_KERNELS_DEVICE=cpu.*llvm"):
        choose([CPU])


def test_a_selector_that_matches_nothing_lists_what_there_is():
    with pytest.raises(NoDeviceError, match=r"'radeon'; take one of these: 0: Big GPU 9000 .*; 2: llvm"):
        choose([GPU, CPU], "radeon")
    with pytest.raises(NoDeviceError, match=r"7"):
        choose([GPU, CPU], 7)


def test_a_device_that_cannot_be_used_is_passed_over_and_named_when_asked_for():
    with pytest.raises(NoDeviceError, match=r"Old GPU.*too old"):
        choose([GPU, OLD], "old")
    assert choose([OLD, GPU], "gpu") is GPU


def test_no_loader_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vulkan, "vk", None)
    with pytest.raises(NoDeviceError, match=r"no Vulkan loader.*install_vulkan.sh"):
        list_devices()


@needs_vulkan
def test_no_driver_says_what_to_install(tmp_path):
    code = "from vk_kernels.runtime.device import Device\n"
    code += "try: Device.open()\nexcept Exception as e: print(type(e).__name__, e)"
    nothing = str(tmp_path / "none.json")
    environment = {**os.environ, "VK_ICD_FILENAMES": nothing, "VK_DRIVER_FILES": nothing}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.startswith("NoDeviceError no Vulkan driver on this machine"), done.stdout + done.stderr


@needs_vulkan
def test_features_and_limits_are_asked_for():
    found = choose(list_devices(), SELECTOR)
    assert found.limits.shared_memory >= 16 << 10
    assert found.limits.workgroup_invocations >= 128
    assert found.limits.push_constants >= 128
    smallest, largest = found.limits.subgroup_size_range
    assert smallest <= found.limits.subgroup_size <= largest
    assert "timelineSemaphore" in found.features
    assert found.memory > 0
    with pytest.raises(KeyError, match=r"noSuchFeature"):
        _ = "noSuchFeature" in found.features


@needs_vulkan
def test_every_device_is_in_one_device_group_at_least_its_own():
    places = list_places()
    assert len(places) == len(list_devices())
    assert all(i in place.group for i, place in enumerate(places))
    assert all(places[other].group == place.group for place in places for other in place.group)
    assert all(re.fullmatch(r"|[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", place.pci) for place in places)


@needs_vulkan
def test_an_extension_can_be_left_out():
    assert "VK_KHR_push_descriptor" not in list_devices(without=["VK_KHR_push_descriptor"])[0].features


def test_missing_features_are_named():
    features = Features(frozenset({"shaderFloat16"}))
    assert features.missing(["Shader", "Float16", "BFloat16TypeKHR"]) == ["shaderBFloat16Type"]


@needs_vulkan
def test_structs_that_the_package_lacks_are_laid_out_as_c_does():
    core = vulkan.struct("VkPhysicalDeviceMaintenance4Features", maintenance4=True)
    raw = vulkan.RawStruct(1000141000, ("first", "second", "third"))
    raw.pNext = core
    raw.second = True
    assert (raw.first, raw.second, raw.third) == (0, 1, 0)
    words = vulkan.ffi.cast("uint32_t*", raw.pointer)
    assert [words[i] for i in (0, 4, 5, 6)] == [1000141000, 0, 1, 0]
    behind = vulkan.ffi.cast("VkPhysicalDeviceMaintenance4Features*", raw.pointer.pNext)
    assert behind.maintenance4 == 1


@needs_vulkan
def test_flexible_cooperative_matrices_are_read():
    rows = [
        (16, 16, 16, 1000141000, 1000141000, 1, 1, 0, 2, 256),
        (32, 32, 16, 0, 0, 0, 0, 1, 2, 256),  # saturating: left out
        (16, 8, 16, 0, 0, 1, 1, 0, 3, 0),
    ]

    @vulkan.ffi.callback("VkResult(VkPhysicalDevice, uint32_t*, void*)")
    def driver(physical, count, properties):
        count[0] = len(rows)
        if properties != vulkan.ffi.NULL:
            words = vulkan.ffi.cast("uint32_t*", properties)  # 14 words each: sType, padding, pNext, 10 members
            for i, row in enumerate(rows):
                assert words[14 * i] == 1000593001
                for j, value in enumerate(row):
                    words[14 * i + 4 + j] = value
        return 0

    functions = vulkan.Functions(lambda name: vulkan.ffi.cast("void*", driver))
    assert _cooperative_matrices2(functions, vulkan.ffi.NULL) == (
        CooperativeMatrix(16, 16, 16, "bf16", "bf16", "f32", "f32", "workgroup", 256),
        CooperativeMatrix(16, 8, 16, "f16", "f16", "f32", "f32", "subgroup", 0),
    )


@needs_vulkan
def test_a_closed_device_says_so_and_closes_twice():
    device = Device.open(SELECTOR)
    buffer = device.buffer(16)
    device.close()
    device.close()
    for use in (
        lambda: device.buffer(16),
        lambda: buffer.read("u4", (1,)),
        lambda: device.kernel("fill"),
        device.new_recorder,
    ):
        with pytest.raises(VulkanError, match=r"is closed"):
            use()


@needs_vulkan
def test_a_lost_device_is_destroyed_when_its_driver_has_let_go_of_the_work(monkeypatch):
    device, waited = Device.open(SELECTOR), []
    device.upload(np.zeros(4, np.float32))
    wait_idle = device.fn.vkDeviceWaitIdle
    monkeypatch.setattr(device.fn, "vkDeviceWaitIdle", lambda handle: waited.append(wait_idle(handle)))

    def lose(*_):
        raise DeviceLostError("the device was lost")

    monkeypatch.setattr(device.queue, "_await", lose)
    device.close()
    assert waited == [0]
    assert not device._made


@needs_vulkan
def test_a_process_that_never_closes_its_device_has_it_at_rest_and_ends_cleanly():
    code = (
        f"from vk_kernels.runtime.device import Device\nd = Device.open({SELECTOR!r})\n"
        "b = d.buffer(4000); d.kernel('fill').pipeline; r = d.new_recorder()\n"
        "import time; spent = time.process_time(); time.sleep(0.5); print(time.process_time() - spent)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) < 0.1  # seconds of the processor: at rest a device takes none


@needs_vulkan
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.skipif(SELECTOR != "cpu", reason="a GPU's driver need not live through a fork")
def test_a_forked_process_lets_go_of_its_parents_device():
    code = textwrap.dedent(
        f"""
        import os, sys
        from vk_kernels.runtime.device import Device

        device = Device.open({SELECTOR!r})
        buffer = device.buffer(4)
        child = os.fork()
        if child == 0:
            try:
                device.buffer(4)
            except Exception as error:
                print(error, flush=True)
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), buffer.read("u4", (1,)).shape)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert re.fullmatch(r"the Vulkan device '.*' is closed\n7 \(1,\)\n", done.stdout), done.stdout + done.stderr


@needs_vulkan
def test_no_object_is_left_of_a_device_that_could_not_be_opened(monkeypatch):
    devices = []

    def refuse(queue, direct):
        devices.append(queue.device)
        raise VulkanError("no memory of the kinds needed")

    monkeypatch.setattr(device_module, "Memory", refuse)
    with pytest.raises(VulkanError, match=r"no memory of the kinds needed"):
        Device.open(SELECTOR)
    (device,) = devices
    assert not device._made
    assert device.instance.handle == vulkan.ffi.NULL
    with pytest.raises(VulkanError, match=r"is closed"):
        device.completed()


@pytest.mark.parametrize(("asked", "mode"), [("", ""), ("0", ""), ("1", "sync"), ("gpu", "gpu"), (True, "sync")])
def test_validation_modes(asked, mode):
    assert validation_mode(asked) == mode


def test_an_unknown_validation_mode_is_refused(monkeypatch):
    monkeypatch.setenv("VK_KERNELS_VALIDATION", "yes")
    with pytest.raises(SettingError, match=r"VK_KERNELS_VALIDATION.*'yes'"):
        validation_mode(None)


@needs_vulkan
def test_validation_without_the_layer_is_an_error(monkeypatch):
    monkeypatch.setattr("vk_kernels.runtime.instance.layer_installed", lambda: False)
    with pytest.raises(VulkanError, match=r"VK_LAYER_KHRONOS_validation is not installed"):
        device_module.Device.open(SELECTOR, validation=True)


def test_the_runtime_does_not_know_jax():
    code = "import sys, vk_kernels.runtime.device, vk_kernels.tools.build_shaders\nprint('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "False\n", done.stderr
