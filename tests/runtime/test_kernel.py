"""Kernels and recordings: what they compute, in which order, and how each failure is told."""

import dataclasses
import hashlib
import itertools
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from held_device import held
from vulkan_devices import SELECTOR, needs_layer, needs_vulkan
from waiting import PATIENCE

from vk_kernels.errors import (
    DeviceLostError,
    DeviceTimeoutError,
    FeatureError,
    OutOfMemoryError,
    ValidationError,
    VulkanError,
)
from vk_kernels.runtime import command_buffer, disk_cache, vulkan
from vk_kernels.runtime import kernel as kernel_module
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.features import Features
from vk_kernels.runtime.vulkan import vk

SIZES = [1, 3, 255, 256, 257, 1000, 65_537]

pytestmark = needs_vulkan


def groups(count: int, size: int = 256) -> tuple[int, int, int]:
    return -(-count // size), 1, 1


def fill(recorder, buffer, count: int, word: int) -> None:
    recorder.dispatch(recorder.device.kernel("fill"), [buffer], struct.pack("II", count, word), groups(count))


def copy(recorder, source, target, count: int) -> None:
    kernel = recorder.device.kernel("copy", "f32")
    recorder.dispatch(kernel, [source, target], struct.pack("I", count), groups(count))


@pytest.mark.parametrize("count", SIZES)
def test_fill_and_copy_at_odd_sizes(device, count):
    source, target = device.buffer(4 * count + 4), device.buffer(4 * count + 4)
    for buffer in (source, target):
        buffer.write(np.full(count + 1, 5, np.uint32))
    device.run(device.kernel("fill"), [source], struct.pack("II", count, 0x3F800000), groups(count))
    np.testing.assert_array_equal(source.read(np.float32, (count,)), np.ones(count))
    device.run(device.kernel("copy", "f32"), [source, target], struct.pack("I", count), groups(count))
    np.testing.assert_array_equal(target.read(np.uint32, (count + 1,)), [0x3F800000] * count + [5])


def test_a_variant_of_two_byte_elements(device):
    array = np.random.default_rng(0).standard_normal(333).astype(np.float16)
    source, target = device.upload(array), device.buffer(array.nbytes)
    device.run(device.kernel("copy", "f16"), [source, target], struct.pack("I", 333), groups(333))
    np.testing.assert_array_equal(target.read(np.float16, (333,)), array)


def test_specialization_constants_set_the_workgroup(device):
    small = device.kernel("fill", spec={"WORKGROUP": 32})
    assert (small.workgroup, device.kernel("fill").workgroup) == ((32, 1, 1), (256, 1, 1))
    buffer = device.upload(np.zeros(100, np.uint32))
    device.run(small, [buffer], struct.pack("II", 100, 1), (2, 1, 1))  # 2 * 32 threads
    assert buffer.read(np.uint32, (100,)).sum() == 64


def test_a_kernel_is_made_once(device):
    assert device.kernel("fill") is device.kernel("fill")
    assert device.kernel("fill") is not device.kernel("fill", spec={"WORKGROUP": 64})
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: device.kernel("fill", spec={"WORKGROUP": 16}), range(16)))
    assert len(set(map(id, made))) == 1


def test_a_kernel_from_spirv_alone(device):
    code, _ = kernel_module.load("fill")
    buffer = device.buffer(40)
    device.run(device.kernel_from_spirv(code, "mine"), [buffer], struct.pack("II", 10, 3))
    assert buffer.read(np.uint32, (10,)).tolist() == [3] * 10


@pytest.mark.parametrize("without", [(), ("VK_KHR_push_descriptor",)], ids=["push", "pool"])
def test_a_long_recording_in_order_and_replayed(without):
    """600 dependent dispatches: more than one descriptor pool holds, a barrier before each."""
    with Device.open(SELECTOR, without=without) as device:
        buffers = [device.upload(np.full(300, i, np.float32)) for i in range(601)]
        recorder = device.new_recorder(replay=True)
        for source, target in itertools.pairwise(buffers):
            copy(recorder, source, target, 300)
        for round_ in range(3):
            buffers[0].write(np.full(300, 10 + round_, np.float32))
            recorder.submit()
            assert (buffers[-1].read(np.float32, (300,)) == 10 + round_).all()


@pytest.mark.parametrize("without", [(), ("VK_KHR_push_descriptor",)], ids=["push", "pool"])
def test_a_recorder_is_used_again_after_a_reset(without):
    with Device.open(SELECTOR, without=without) as device:
        buffer, recorder = device.buffer(4000), device.new_recorder()
        for word in range(3):
            fill(recorder, buffer, 1000, word)
            recorder.submit().wait()
            assert (buffer.read(np.uint32, (1000,)) == word).all()
            with pytest.raises(VulkanError, match=r"has ended"):
                fill(recorder, buffer, 1000, word)
            recorder.reset()


def test_barriers_stand_only_at_hazards(device, monkeypatch):
    barriers, real = [], device.fn.vkCmdPipelineBarrier
    monkeypatch.setattr(device.fn, "vkCmdPipelineBarrier", lambda *a: (barriers.append(1), real(*a)))
    a, b, c, d = (device.buffer(4000) for _ in range(4))

    def count(record) -> int:
        recorder = device.new_recorder()
        before = len(barriers)
        record(recorder)
        return len(barriers) - before

    assert count(lambda r: (fill(r, a, 1000, 1), fill(r, b, 1000, 1), copy(r, c, d, 1000))) == 0
    assert count(lambda r: (copy(r, a, b, 1000), copy(r, a, c, 1000))) == 0  # two readers
    assert count(lambda r: (fill(r, a, 1000, 1), copy(r, a, b, 1000))) == 1  # read after write
    assert count(lambda r: (copy(r, a, b, 1000), fill(r, a, 1000, 1))) == 1  # write after read
    assert count(lambda r: (fill(r, a, 1000, 1), fill(r, a, 1000, 2))) == 1  # write after write
    assert count(lambda r: (fill(r, a, 1000, 1), r.copy(a, b))) == 1
    assert count(lambda r: (fill(r, a, 1000, 1), fill(r, a, 1000, 2), r.copy(b, c), r.copy(a, d))) == 2
    arena = device.buffer(8192)
    low, high = arena.slice(0, 4096), arena.slice(4096, 4096)
    assert count(lambda r: (fill(r, low, 1000, 1), fill(r, high, 1000, 1))) == 0
    assert count(lambda r: (fill(r, low, 1000, 1), fill(r, arena, 1000, 1))) == 1


def test_a_recording_without_replay_is_submitted_once(device):
    recorder, buffer = device.new_recorder(), device.buffer(16)
    fill(recorder, buffer, 4, 1)
    recorder.submit().wait()
    with pytest.raises(VulkanError, match=r"fill .1, 1, 1.: submitted already"):
        recorder.submit()


def test_a_buffer_freed_before_the_submission_is_named(device):
    recorder, buffer = device.new_recorder(), device.buffer(16)
    fill(recorder, buffer, 4, 1)
    buffer.free()
    with pytest.raises(VulkanError, match=r"fill .1, 1, 1.: a buffer of 16 bytes was freed"):
        recorder.submit()


def test_copies_and_fills(device):
    a, b = device.upload(np.arange(100, dtype=np.uint32)), device.buffer(400)
    recorder = device.new_recorder()
    recorder.fill(b, 0xFFFFFFFF)
    recorder.copy(a, b, 40, source_offset=80, target_offset=8)
    recorder.submit()
    expected = [0xFFFFFFFF] * 2 + list(range(20, 30)) + [0xFFFFFFFF] * 88
    assert b.read(np.uint32, (100,)).tolist() == expected
    with pytest.raises(ValueError, match=r"copy of 400 bytes at 4"):
        device.new_recorder().copy(a, b, 400, source_offset=4)


def test_no_workgroups_is_no_work(device):
    buffer = device.upload(np.zeros(1, np.uint32))
    device.run(device.kernel("fill"), [buffer], struct.pack("II", 0, 1), (0, 1, 1))
    assert buffer.read(np.uint32, (1,)) == 0


def test_two_threads_at_once(device):
    failures = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(100):
                count = int(generator.integers(1, 5000))
                array = generator.standard_normal(count).astype(np.float32)
                source, target = device.upload(array), device.buffer(array.nbytes)
                device.run(device.kernel("copy", "f32"), [source, target], struct.pack("I", count), groups(count))
                np.testing.assert_array_equal(target.read(np.float32, (count,)), array)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_buffer_dropped_before_its_work_is_done_is_not_reused(device):
    """The memory of `source` goes back only after the copy out of it."""
    target, recorder = device.buffer(40_000), device.new_recorder()
    source = device.upload(np.full(10_000, 1, np.uint32))
    recorder.copy(source, target)
    place = source.handle_address, source.offset
    with held(device):
        recorder.submit()
        del source, recorder
        other = device.buffer(40_000)
        assert (other.handle_address, other.offset) != place
    other.write(np.full(10_000, 2, np.uint32))
    assert (target.read(np.uint32, (10_000,)) == 1).all()
    assert (other.read(np.uint32, (10_000,)) == 2).all()


def test_a_recorder_is_destroyed_once(device, monkeypatch):
    """A driver may give a new object the handle of an old one, which must not be destroyed again."""
    destroyed, destroy = [], device.destroy
    monkeypatch.setattr(device, "destroy", lambda kind, handle: destroyed.append(handle) or destroy(kind, handle))
    recorder = device.new_recorder()
    pool = recorder._pool
    destroyed.clear()  # what others had left, whose handle the pool may have
    recorder.close()
    recorder.close()
    del recorder
    device.finish()
    assert destroyed.count(pool) == 1


def test_timestamps(device):
    if not device.limits.timestamp_bits:
        pytest.skip("the device has no timestamps")
    recorder = device.new_recorder(timestamps=2)
    large = device.buffer(16 << 20)
    fill(recorder, large, 4 << 20, 1)
    recorder.dispatch(device.kernel("fill"), [large], struct.pack("II", 1, 1), (1, 1, 1), label="one word")
    (first, slow), (second, quick) = recorder.submit().timings()
    assert first == "fill (16384, 1, 1)"
    assert second == "one word"
    assert 0 < quick < 60
    assert 0 < slow < 60
    with pytest.raises(VulkanError, match=r"has no timestamps"):
        device.new_recorder().submit().timings()


def test_a_dispatch_took_from_its_first_tick_to_its_second_though_the_counter_wraps_around(device, monkeypatch):
    if not device.limits.timestamp_bits:
        pytest.skip("the device has no timestamps")
    limits = dataclasses.replace(device.limits, timestamp_bits=36, timestamp_period=4.0)  # ns
    monkeypatch.setattr(device, "limits", limits)
    recorder, buffer = device.new_recorder(timestamps=2), device.buffer(16)
    for _ in range(2):
        fill(recorder, buffer, 4, 1)

    def counted(*arguments):
        arguments[5][0:4] = [1000, 1250, 2**36 - 100, 200]
        return 0

    monkeypatch.setattr(device.fn, "vkGetQueryPoolResults", counted, raising=False)
    assert [seconds for _, seconds in recorder.submit().timings()] == pytest.approx(
        [1000e-9, 1200e-9]
    )  # of 4 ns a tick


def test_arguments_that_do_not_fit_are_named(device):
    kernel, buffer, push = device.kernel("fill"), device.buffer(16), struct.pack("II", 4, 0)
    most = device.limits.workgroup_count[0]
    for arguments, message in (
        (([], push, (1, 1, 1)), "fill takes 1 buffers, not 0"),
        (([buffer], b"1234", (1, 1, 1)), "fill takes 8 bytes of push constants, not 4"),
        (([buffer], push, (most + 1, 1, 1)), f"fill: .* workgroups, but .* takes .{most}"),
        (([buffer], push, (1, 1)), "fill: .1, 1. workgroups"),
    ):
        with pytest.raises(ValueError, match=message):
            device.new_recorder().dispatch(kernel, *arguments)
    buffer.free()
    with pytest.raises(VulkanError, match=r"fill: buffer 0 .16 bytes. was freed"):
        device.new_recorder().dispatch(kernel, [buffer], push, (1, 1, 1))
    with Device.open(SELECTOR) as other, pytest.raises(ValueError, match=r"fill: buffer 0 is of another device"):
        device.new_recorder().dispatch(kernel, [other.buffer(16)], push, (1, 1, 1))


def test_a_range_over_the_device_limit_is_refused(device):
    limit = device.limits.storage_buffer_range
    if limit > 1 << 28:
        pytest.skip("the limit is too high to try")
    arena = device.buffer(limit + 1024, sliced=True)
    with pytest.raises(ValueError, match=rf"buffer 0 of {limit + 1024:,} bytes.*{limit:,} .maxStorageBufferRange"):
        device.new_recorder().dispatch(device.kernel("fill"), [arena], struct.pack("II", 4, 0))


def test_names_and_constants_that_are_not_there(device):
    with pytest.raises(ValueError, match=r"'copy.f99'; its variants are \['f16', 'f32'\]"):
        device.kernel("copy", "f99")
    with pytest.raises(ValueError, match=r"no kernel is called 'nothing'; there are .*'fill'"):
        device.kernel("nothing")
    with pytest.raises(ValueError, match=r"fill has no specialization constant TILE; it has \['WORKGROUP'\]"):
        device.kernel("fill", spec={"TILE": 1})


def test_a_kernel_beyond_the_device_names_what_is_missing(device, monkeypatch):
    name = device.info.name.split("(")[0].strip()
    with pytest.raises(FeatureError, match=rf"fill: a workgroup of 1048576x1x1 threads, but {name}"):
        device.kernel("fill", spec={"WORKGROUP": 1 << 20})
    with pytest.raises(FeatureError, match=rf"fill: subgroups of 3, but {name}"):
        device.kernel("fill", subgroup_size=3)
    features = Features(device.features.names - {"shaderFloat16"})
    monkeypatch.setattr(device, "features", features)
    with pytest.raises(FeatureError, match=rf"copy.f16: {name}.* lacks shaderFloat16"):
        device.kernel("copy", "f16", spec={"WORKGROUP": 128})


def test_no_kernel_binds_more_buffers_than_the_device_takes(monkeypatch):
    with Device.open(SELECTOR) as device:
        monkeypatch.setattr(device, "limits", dataclasses.replace(device.limits, storage_buffers=8))
        assert device.kernel("matmul", "f32_32x32x16")  # 7
        with pytest.raises(FeatureError, match=r"kernel layer_norm_backward.residual_f32: 11 buffers, but .* binds 8"):
            device.kernel("layer_norm_backward", "residual_f32")


def test_an_interrupted_submission_is_known_of(device, monkeypatch):
    """Ctrl-C is raised as the driver comes back: what was submitted is waited for all the same."""
    submit = device.fn.vkQueueSubmit

    def interrupted(*arguments):
        assert submit(*arguments) == 0
        raise KeyboardInterrupt

    buffer = device.buffer(64 << 20)
    with device.pooled_recorder() as recorder:
        fill(recorder, buffer, 15 << 20, 7)
        with monkeypatch.context() as patched:
            patched.setattr(device.fn, "vkQueueSubmit", interrupted, raising=False)
            with pytest.raises(KeyboardInterrupt):
                recorder.submit()
    assert recorder.last_use == buffer.last_use
    assert (buffer.read(np.uint32, (15 << 20,)) == 7).all()


def test_a_submission_that_the_driver_refuses_is_none(device, monkeypatch):
    buffer = device.upload(np.zeros(10, np.uint32))
    device.finish()
    before = device.completed()
    with device.pooled_recorder() as recorder:
        fill(recorder, buffer, 10, 7)
        last_use = recorder.last_use, buffer.last_use
        with monkeypatch.context() as patched:
            patched.setattr(device.fn, "vkQueueSubmit", lambda *_: vk.VK_ERROR_OUT_OF_HOST_MEMORY, raising=False)
            with pytest.raises(OutOfMemoryError, match="submitting fill"):
                recorder.submit()
    assert (recorder.last_use, buffer.last_use) == last_use
    assert buffer.read(np.uint32, (10,)).tolist() == [0] * 10
    device.run(device.kernel("fill"), [buffer], struct.pack("II", 10, 8))
    assert (buffer.read(np.uint32, (10,)) == 8).all()
    assert device.completed() == before + 1


def test_the_subgroup_size_can_be_demanded(device):
    size = device.limits.subgroup_size
    buffer = device.buffer(40)
    device.run(device.kernel("fill", subgroup_size=size), [buffer], struct.pack("II", 10, 4))
    assert buffer.read(np.uint32, (10,)).tolist() == [4] * 10


def test_a_timeout_names_the_kernels_and_the_work_goes_on(device):
    if device.instance.validation == "gpu":
        pytest.skip("validation on the GPU makes every submission wait")
    buffer, recorder = device.buffer(4000), device.new_recorder()
    for word in range(3):
        fill(recorder, buffer, 1000, word)
    with held(device):
        submission = recorder.submit()
        with pytest.raises(DeviceTimeoutError, match=r"not done after 0 s on .*: .*fill \(4, 1, 1\), fill \(4"):
            submission.wait(timeout=0)
        assert not submission.done
    submission.wait()
    assert submission.done
    assert (buffer.read(np.uint32, (1000,)) == 2).all()


def test_a_lost_device_names_the_kernels(device, monkeypatch):
    buffer = device.buffer(4)
    with monkeypatch.context() as patched:
        patched.setattr(device.fn, "vkWaitSemaphores", lambda *_: vk.VK_ERROR_DEVICE_LOST, raising=False)
        with pytest.raises(DeviceLostError, match=r"lost while running matmul 3x4x5 on"):
            device.run(device.kernel("fill"), [buffer], struct.pack("II", 1, 1), label="matmul 3x4x5")
        patched.setattr(device.fn, "vkGetSemaphoreCounterValue", lambda *_: vk.VK_ERROR_DEVICE_LOST, raising=False)
        with pytest.raises(DeviceLostError, match=r"lost while running .*matmul 3x4x5 on"):
            device.buffer(4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_fill() -> None:
    with Device.open(SELECTOR) as device:
        buffer = device.buffer(40)
        device.run(device.kernel("fill"), [buffer], struct.pack("II", 10, 4))
        assert buffer.read(np.uint32, (10,)).tolist() == [4] * 10


def test_compiled_kernels_are_kept_on_disk_and_damage_is_mended(cache):
    run_fill()
    (file,) = cache.glob("*/*.bin")
    whole = file.read_bytes()
    written = file.stat().st_mtime_ns
    run_fill()
    assert file.stat().st_mtime_ns == written  # found, so not written again
    for damaged in (b"", whole[:-1], whole[:40] + b"\xff" + whole[41:], b"x" * len(whole)):
        file.write_bytes(damaged)
        run_fill()
        assert len(file.read_bytes()) == len(whole)
        assert hashlib.sha256(file.read_bytes()[32:]).digest() == file.read_bytes()[:32]
    assert [other.name for other in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_a_warning(cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"not cached"):
        run_fill()


def test_a_full_disk_leaves_no_part_of_a_file(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    with pytest.warns(UserWarning, match=r"not cached: .*No space left"):
        run_fill()
    assert [file for file in cache.rglob("*") if file.is_file()] == []


def test_processes_share_the_cache(cache):
    code = (
        "from vk_kernels.runtime.device import Device\n"
        f"with Device.open({SELECTOR!r}) as device:\n"
        "    for size in range(16, 129, 8):\n"
        "        device.kernel('fill', spec={'WORKGROUP': size})\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    for process in [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]:
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (0, "")
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert len(files) == 15
    for content in map(Path.read_bytes, files):
        assert hashlib.sha256(content[32:]).digest() == content[:32]


def test_kernels_are_compiled_side_by_side(monkeypatch):
    both = threading.Barrier(2, timeout=PATIENCE)
    with Device.open(SELECTOR, validation=False) as device:
        compile_one = device.fn.vkCreateComputePipelines
        monkeypatch.setattr(
            device.fn, "vkCreateComputePipelines", lambda *a: (both.wait(), compile_one(*a))[1], raising=False
        )
        kernels = [device.kernel("fill", spec={"WORKGROUP": size}) for size in (32, 64)]
        buffer = device.buffer(40)
        for kernel in kernels:
            device.run(kernel, [buffer], struct.pack("II", 10, 4))


def test_what_goes_wrong_in_a_compilation_is_raised_where_the_kernel_is_used(monkeypatch):
    with Device.open(SELECTOR, validation=False) as device:
        refuse = lambda *_: vk.VK_ERROR_OUT_OF_HOST_MEMORY  # noqa: E731
        monkeypatch.setattr(device.fn, "vkCreateComputePipelines", refuse, raising=False)
        kernel = device.kernel("fill")
        for _ in range(2):
            with pytest.raises(VulkanError, match="compiling kernel fill"):
                device.run(kernel, [device.buffer(40)], struct.pack("II", 10, 4))
        monkeypatch.undo()  # there is room again
        buffer = device.buffer(40)
        device.run(kernel, [buffer], struct.pack("II", 10, 4))
        assert buffer.read(np.uint32, (10,)).tolist() == [4] * 10


@needs_layer
@pytest.mark.parametrize("mode", ["sync", "gpu"])
def test_validation_has_nothing_to_say(mode):
    with Device.open(SELECTOR, validation=mode, direct=False) as device:
        buffers = [device.buffer(4000) for _ in range(4)]
        buffers[0].write(np.ones(1000, np.float32))
        timed = 8 if device.limits.timestamp_bits else 0
        recorder = device.new_recorder(timestamps=timed, replay=True)
        for source, target in itertools.pairwise(buffers):
            copy(recorder, source, target, 1000)
        recorder.copy(buffers[3], buffers[0])
        for _ in range(3):
            recorder.submit()
        device.run(device.kernel("fill"), [buffers[1]], struct.pack("II", 999, 1), groups(999))
        assert (buffers[3].read(np.float32, (1000,)) == 1).all()


@needs_layer
def test_validation_catches_a_missing_barrier():
    with Device.open(SELECTOR, validation=True) as device:
        a, b = device.buffer(4000), device.buffer(4000)
        recorder = device.new_recorder(hazards=False)
        fill(recorder, a, 1000, 1)
        with pytest.raises(ValidationError, match=r"copy.f32 \(4, 1, 1\): .*SYNC-HAZARD-READ-AFTER-WRITE"):
            copy(recorder, a, b, 1000)


@needs_layer
def test_validation_catches_a_missing_barrier_between_submissions(monkeypatch):
    nothing = vulkan.struct("VkMemoryBarrier")  # makes nothing visible
    barriers = *command_buffer._barriers(computes=True)[:2], nothing
    monkeypatch.setattr(command_buffer, "_barriers", lambda computes: barriers)
    with Device.open(SELECTOR, validation=True) as device:
        a, b = device.buffer(4000), device.buffer(4000)
        with device.pooled_recorder() as recorder:
            fill(recorder, a, 1000, 1)
            recorder.submit()
        with device.pooled_recorder() as recorder:
            copy(recorder, a, b, 1000)
            with pytest.raises(ValidationError, match=r"copy.f32 \(4, 1, 1\): .*SYNC-HAZARD-READ-AFTER-WRITE"):
                recorder.submit()


@needs_layer
def test_validation_catches_an_access_out_of_bounds():
    with Device.open(SELECTOR, validation="gpu") as device:
        buffer = device.buffer(4000)
        with pytest.raises(ValidationError, match=r"fill \(4, 1, 1\): .*out of bounds.*4000"):
            device.run(device.kernel("fill"), [buffer], struct.pack("II", 1001, 7), groups(1001))
