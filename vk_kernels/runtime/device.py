"""Vulkan devices: which there are, which one to use, and an open one with its queue, memory and kernels.

    with Device.open() as device:
        x = device.buffer(4 * 1000)
        device.run(device.kernel("fill"), [x], struct.pack("II", 1000, 7), groups=(4, 1, 1))
        print(x.read(np.uint32, (1000,)))

A device may be used from several threads at once; a Recorder belongs to one thread at a time.
"""

import atexit
import contextlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vk_kernels.errors import DeviceLostError, DeviceTimeoutError, NoDeviceError, VulkanError
from vk_kernels.runtime import disk_cache, kernel, vulkan
from vk_kernels.runtime.command_buffer import Recorder
from vk_kernels.runtime.features import Features, Limits, device_properties, enabling, query_features, query_limits
from vk_kernels.runtime.instance import NO_DRIVER, Instance, validation_mode
from vk_kernels.runtime.kernel import Kernel
from vk_kernels.runtime.memory import Buffer, Memory, MemoryStats, Staging
from vk_kernels.runtime.vulkan import ffi, vk
from vk_kernels.spirv.reflect import reflect

# Seconds that a wait takes at most, unless told otherwise. A CPU device compiles a kernel when it first runs it.
TIMEOUT, CPU_TIMEOUT = 120.0, 1800.0

# VkPhysicalDeviceType -> our name; the order is the order of choice. A CPU device is taken only when asked for.
_KINDS = {2: "discrete", 1: "integrated", 3: "virtual", 0: "other", 4: "cpu"}


@dataclass(frozen=True)
class DeviceInfo:
    """A device that the loader lists. `index` selects it; `memory` is its largest local heap in bytes.

    `unusable` says why the runtime cannot use it, and is empty where it can.
    """

    index: int
    name: str
    kind: str
    api_version: str
    driver: str
    driver_version: int
    vendor_id: int
    device_id: int
    cache_uuid: str
    memory: int
    features: Features = field(repr=False)
    limits: Limits = field(repr=False)
    unusable: str = ""

    def __str__(self) -> str:
        return f"{self.index}: {self.name} ({self.kind}, Vulkan {self.api_version}, {self.driver})"


def list_devices(without: Iterable[str] = ()) -> list[DeviceInfo]:
    """Every Vulkan device of this machine, best first. Extensions in `without` count as absent.

    Raises NoDeviceError without a loader or a driver.
    """
    instance = Instance()
    try:
        return [info for info, _, _ in _survey(instance, frozenset(without))]
    finally:
        instance.close()


def _survey(instance: Instance, without: frozenset[str]) -> list[tuple[DeviceInfo, Any, int]]:
    """(info, physical device, queue family) of every device, best first."""
    ranks = list(_KINDS)
    found = []
    for physical in instance.physical_devices():
        properties = device_properties(instance.fn, physical)
        found.append((ranks.index(properties.deviceType), physical, properties))
    if not found:
        raise NoDeviceError(NO_DRIVER)
    found.sort(key=lambda item: item[0])
    return [
        _describe(instance.fn, i, physical, properties, without) for i, (_, physical, properties) in enumerate(found)
    ]


def _describe(fn, index: int, physical: Any, properties: Any, without: frozenset[str]) -> tuple[DeviceInfo, Any, int]:
    family, timestamp_bits = _compute_queue(fn, physical)
    old = properties.apiVersion < 1 << 22 | 2 << 12
    features = Features(frozenset()) if old else query_features(fn, physical, without)
    driver = vulkan.struct("VkPhysicalDeviceDriverProperties")
    if not old:
        fn.vkGetPhysicalDeviceProperties2(physical, vulkan.struct("VkPhysicalDeviceProperties2", pNext=driver))
    unusable = ""
    if old:
        unusable = f"it has Vulkan {vulkan.version(properties.apiVersion)}, and 1.2 is needed"
    elif family < 0:
        unusable = "it has no queue for compute work"
    elif "timelineSemaphore" not in features:
        unusable = "it has no timeline semaphores"
    memory = ffi.new("VkPhysicalDeviceMemoryProperties*")
    fn.vkGetPhysicalDeviceMemoryProperties(physical, memory)
    heaps = [memory.memoryHeaps[i] for i in range(memory.memoryHeapCount)]
    info = DeviceInfo(
        index=index,
        name=ffi.string(properties.deviceName).decode(),
        kind=_KINDS[properties.deviceType],
        api_version=vulkan.version(properties.apiVersion),
        driver=f"{ffi.string(driver.driverName).decode()} {ffi.string(driver.driverInfo).decode()}".strip(),
        driver_version=properties.driverVersion,
        vendor_id=properties.vendorID,
        device_id=properties.deviceID,
        cache_uuid=bytes(properties.pipelineCacheUUID).hex(),
        memory=max((heap.size for heap in heaps if heap.flags & vk.VK_MEMORY_HEAP_DEVICE_LOCAL_BIT), default=0),
        features=features,
        limits=query_limits(fn, physical, features, timestamp_bits),
        unusable=unusable,
    )
    return info, physical, family


def _compute_queue(fn, physical: Any) -> tuple[int, int]:
    """(index, timestamp bits) of the first queue family for compute; -1 where there is none."""
    count = ffi.new("uint32_t*")
    fn.vkGetPhysicalDeviceQueueFamilyProperties(physical, count, ffi.NULL)
    families = ffi.new("VkQueueFamilyProperties[]", count[0])
    fn.vkGetPhysicalDeviceQueueFamilyProperties(physical, count, families)
    for i in range(count[0]):
        if families[i].queueFlags & vk.VK_QUEUE_COMPUTE_BIT:
            return i, families[i].timestampValidBits
    return -1, 0


def choose(devices: Sequence[DeviceInfo], selector: int | str | None = None) -> DeviceInfo:
    """The device that `selector` names: an index, 'gpu', 'cpu', or part of a name (any case).

    None takes the environment's VK_KERNELS_DEVICE, or else the best real GPU; a CPU device must be asked for.
    Raises NoDeviceError, listing the devices, where none answers.
    """
    if selector is None:
        selector = os.environ.get("VK_KERNELS_DEVICE") or None
    listed = "; ".join(map(str, devices))
    if isinstance(selector, int) or (selector or "").isdecimal():
        matching = [device for device in devices if device.index == int(selector)]
        matching = matching or [device for device in devices if str(selector) in device.name]  # "4090"
    elif selector is None or selector.lower() == "gpu":
        matching = [device for device in devices if device.kind != "cpu"]
    elif selector.lower() == "cpu":
        matching = [device for device in devices if device.kind == "cpu"]
    else:
        matching = [device for device in devices if selector.lower() in device.name.lower()]
    if not matching and selector is None:
        raise NoDeviceError(
            f"no GPU with a Vulkan driver, only a CPU device, which must be asked for: VK_KERNELS_DEVICE=cpu ({listed})"
        )
    if not matching:
        raise NoDeviceError(f"no Vulkan device is called {selector!r}; there are {listed}")
    usable = [device for device in matching if not device.unusable]
    if not usable:
        raise NoDeviceError(f"cannot use {matching[0]}: {matching[0].unusable}")
    return usable[0]


class Device:
    """An open device. `with Device.open() as device: ...` closes it; so does the end of the process."""

    @classmethod
    def open(
        cls,
        selector: int | str | None = None,
        *,
        validation: bool | str | None = None,
        without: Iterable[str] = (),
        direct: bool = True,
        timeout: float | None = None,
    ) -> "Device":
        """Opens the device that `choose` picks by `selector`, with every feature of ours that it has.

        validation: see `validation_mode`. without: extensions to leave alone. direct: map device memory where all of
        it can be. timeout: seconds that a wait takes at most; None is 120, or half an hour on a CPU device.
        Raises NoDeviceError, or VulkanError where the driver fails.
        """
        instance = Instance(validation_mode(validation))
        try:
            found = _survey(instance, frozenset(without))
            info = choose([info for info, _, _ in found], selector)
            _, physical, family = found[info.index]
            if timeout is None:
                timeout = CPU_TIMEOUT if info.kind == "cpu" else TIMEOUT
            return cls(instance, info, physical, family, direct, timeout)
        except BaseException:
            instance.close()
            raise

    def __init__(self, instance: Instance, info: DeviceInfo, physical: Any, family: int, direct: bool, timeout: float):
        self.instance, self.info, self.physical, self.queue_family = instance, info, physical, family
        self.features, self.limits = info.features, info.limits
        self.timeout = timeout
        self.submit_ms = 0.0  # a program is cut into submissions that take no longer, see `Executable`; 0: it is one
        self.closed = False
        self.cache_dir = _cache_dir(info)
        # Validation on the GPU takes pushed descriptors for uninitialized ones (layer 1.3.239).
        self.push_descriptors = "VK_KHR_push_descriptor" in info.features and instance.validation != "gpu"
        self.calls = threading.RLock()  # of programs: while one is made ready, no array that it takes may move
        self._lock = threading.Lock()  # of the queue, and of what is kept about its submissions
        self._kernels: dict[Any, Kernel] = {}
        self.compilers = ThreadPoolExecutor(thread_name_prefix="compile")  # a driver compiles a kernel on one core
        self._made: dict[tuple[str, int], Any] = {}  # objects that `make` made, to be destroyed in the end
        self._idle: list[Recorder] = []
        self._retired: deque[tuple[int, Callable[[], None]]] = deque()
        self._submitted = self._completed = 0
        # (submission, its kernels), for messages.
        self._newest: deque[tuple[int, str]] = deque(maxlen=64)

        self.handle = self._create()
        self.fn: Any = vulkan.device_functions(self.handle)
        try:
            self._prepare(direct)
        except BaseException:
            self._destroy()
            raise
        _open_devices.add(self)

    def _prepare(self, direct: bool) -> None:
        self.check_validation(f"opening {self.info.name}")
        queue = ffi.new("VkQueue*")
        self.fn.vkGetDeviceQueue(self.handle, self.queue_family, 0, queue)
        self._queue = queue[0]
        timeline = vulkan.struct("VkSemaphoreTypeCreateInfo", semaphoreType=vk.VK_SEMAPHORE_TYPE_TIMELINE)
        self._timeline = self.make("Semaphore", vulkan.struct("VkSemaphoreCreateInfo", pNext=timeline))
        self._prepare_submission()
        write = vk.VK_ACCESS_SHADER_WRITE_BIT | vk.VK_ACCESS_TRANSFER_WRITE_BIT
        use = write | vk.VK_ACCESS_SHADER_READ_BIT | vk.VK_ACCESS_TRANSFER_READ_BIT
        host = vk.VK_ACCESS_HOST_READ_BIT | vk.VK_ACCESS_HOST_WRITE_BIT
        shader_write, shader_use = vk.VK_ACCESS_SHADER_WRITE_BIT, vk.VK_ACCESS_SHADER_READ_BIT
        self.compute_barrier = vulkan.struct(
            "VkMemoryBarrier", srcAccessMask=shader_write, dstAccessMask=shader_use | shader_write
        )
        self.memory_barrier = vulkan.struct("VkMemoryBarrier", srcAccessMask=write, dstAccessMask=use)
        self.final_barrier = vulkan.struct("VkMemoryBarrier", srcAccessMask=write, dstAccessMask=use | host)
        self.memory = Memory(self, direct)
        self.staging = Staging(self)

    def _create(self) -> Any:
        gpu_validation = self.instance.validation == "gpu"
        head, _chain, extensions = enabling(self.instance.fn, self.physical, self.features, gpu_validation)
        priority = ffi.new("float[]", [1.0])
        queue = vulkan.struct(
            "VkDeviceQueueCreateInfo", queueFamilyIndex=self.queue_family, queueCount=1, pQueuePriorities=priority
        )
        info = vulkan.struct(
            "VkDeviceCreateInfo",
            pNext=head,
            queueCreateInfoCount=1,
            pQueueCreateInfos=queue,
            enabledExtensionCount=len(extensions),
            ppEnabledExtensionNames=vulkan.strings(extensions),
        )
        handle = ffi.new("VkDevice*")
        result = self.instance.fn.vkCreateDevice(self.physical, info, ffi.NULL, handle)
        vulkan.check(result, f"opening {self.info.name}")
        return handle[0]

    def _prepare_submission(self) -> None:
        """One VkSubmitInfo for every submission; `_lock` guards it."""
        self._signal_value = ffi.new("uint64_t[1]")
        self._command = ffi.new("VkCommandBuffer[1]")
        values = vulkan.struct(
            "VkTimelineSemaphoreSubmitInfo", signalSemaphoreValueCount=1, pSignalSemaphoreValues=self._signal_value
        )
        self._submit_info = vulkan.struct(
            "VkSubmitInfo",
            pNext=values,
            commandBufferCount=1,
            pCommandBuffers=self._command,
            signalSemaphoreCount=1,
            pSignalSemaphores=vulkan.array("VkSemaphore", [self._timeline]),
        )

    # What a program uses.

    def buffer(self, nbytes: int, sliced: bool = False) -> Buffer:
        """A buffer of `nbytes` in device memory, with undefined content; see `Memory.allocate`."""
        return self.memory.allocate(nbytes, "device", sliced)

    def upload(self, array: np.ndarray) -> Buffer:
        """A new buffer that holds the bytes of `array`."""
        buffer = self.buffer(array.nbytes)
        buffer.write(array)
        return buffer

    def import_host(self, array: np.ndarray) -> Buffer:
        """The memory of `array` itself as a buffer; see `Memory.import_host`."""
        return self.memory.import_host(array)

    def memory_stats(self) -> MemoryStats:
        return self.memory.stats()

    def kernel(
        self,
        name: str,
        variant: str = "",
        spec: dict[str, int | float | bool] | None = None,
        subgroup_size: int | None = None,
    ) -> Kernel:
        """The kernel of that name among those that ship; made once, whoever asks.

        `spec` sets specialization constants by name, `subgroup_size` demands a size of subgroup.
        Raises ValueError for a name or constant that is not there, FeatureError for what the device lacks.
        """
        spec = spec or {}
        key = (name, variant, tuple(sorted(spec.items())), subgroup_size)
        found = self._kernels.get(key)
        if found is None:
            code, reflection = kernel.load(name, variant)
            label = f"{name}.{variant}" if variant else name
            found = self._keep_kernel(key, Kernel(self, label, code, reflection, spec, subgroup_size))
        return found

    def kernel_from_spirv(self, code: bytes, label: str, subgroup_size: int | None = None) -> Kernel:
        """A kernel from SPIR-V with one entry point; made once for the same code."""
        key = (code, subgroup_size)
        found = self._kernels.get(key)
        if found is None:
            found = self._keep_kernel(key, Kernel(self, label, code, reflect(code), {}, subgroup_size))
        return found

    def _keep_kernel(self, key: Any, made: Kernel) -> Kernel:
        """Threads may have made the same kernel at once: the first one stays."""
        with self._lock:
            kept = self._kernels.setdefault(key, made)
        if kept is not made:
            made.destroy()
        return kept

    def record(self, hazards: bool = True, timestamps: int = 0, replay: bool = False) -> Recorder:
        """A new, empty recording; see Recorder."""
        return Recorder(self, hazards, timestamps, replay)

    def run(
        self,
        kernel: Kernel,
        buffers: Sequence[Buffer],
        push_constants: bytes = b"",
        groups: tuple[int, int, int] = (1, 1, 1),
        label: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Runs one kernel and waits for it; arguments as in Recorder.dispatch and Submission.wait."""
        with self.recorder() as recorder:
            recorder.dispatch(kernel, buffers, push_constants, groups, label)
            recorder.submit().wait(timeout)

    # What the rest of the runtime uses.

    @contextlib.contextmanager
    def recorder(self) -> Iterator[Recorder]:
        """A recorder for one submission, reused when that is done. After an error it is dropped."""
        with self._lock:
            completed = self.completed()
            free = next((i for i, idle in enumerate(self._idle) if idle.last_use <= completed), None)
            recorder = None if free is None else self._idle.pop(free)
        if recorder is None:
            recorder = Recorder(self)
        else:
            recorder.reset()
        yield recorder
        with self._lock:
            self._idle.append(recorder)

    def submit(self, command: Any, users: Sequence[Any], label: str) -> int:
        """Hands a command buffer to the queue; returns the value that the timeline reaches when it is done, which is
        the `last_use` of all `users` from here on."""
        with self._lock:
            value = self._submitted + 1
            self._command[0] = command
            self._signal_value[0] = value
            # Before it is so: a signal's handler may raise as the driver comes back.
            self._submitted = value
            self._newest.append((value, label))
            for user in users:
                user.last_use = value
            result = self.fn.vkQueueSubmit(self._queue, 1, self._submit_info, ffi.NULL)
            if result < 0:
                self._submitted = value - 1
                for user in users:  # what they wait for is among what came before
                    user.last_use = value - 1
                vulkan.check(result, f"submitting {label}")
        self.check_validation(label)
        return value

    def completed(self) -> int:
        """The newest submission that is done, and with it all before it."""
        value = ffi.new("uint64_t*")
        result = self.fn.vkGetSemaphoreCounterValue(self.handle, self._timeline, value)
        if result < 0:
            vulkan.check(result, f"running {self._running(self._submitted)} on {self.info.name}")
        self._completed = max(self._completed, value[0])
        return self._completed

    def wait(self, value: int, timeout: float | None = None) -> None:
        """Returns when submission `value` is done.

        Raises DeviceTimeoutError, DeviceLostError or ValidationError, each naming the kernels that were running.
        """
        if value > self._completed:
            running = self._running(value)
            self._await(value, self.timeout if timeout is None else timeout)
            self.check_validation(running)

    def _await(self, value: int, seconds: float) -> None:
        info = vulkan.struct(
            "VkSemaphoreWaitInfo",
            semaphoreCount=1,
            pSemaphores=vulkan.array("VkSemaphore", [self._timeline]),
            pValues=ffi.new("uint64_t[]", [value]),
        )
        result = self.fn.vkWaitSemaphores(self.handle, info, int(seconds * 1e9))
        if result == vk.VK_TIMEOUT:
            raise DeviceTimeoutError(f"not done after {seconds:g} s on {self.info.name}: {self._running(value)}")
        vulkan.check(result, f"running {self._running(value)} on {self.info.name}")
        self._completed = max(self._completed, value)

    def _running(self, value: int) -> str:
        """The kernels of the submissions up to `value` that are not known to be done."""
        newest = self._newest.copy()  # takes no lock: whoever asks may hold it
        labels = [label for number, label in newest if self._completed < number <= value]
        return "; ".join(labels[-4:]) or "nothing"

    def retire(self, value: int, action: Callable[[], None]) -> None:
        """Has `action` called some time after submission `value` is done. Safe in a finalizer: it takes no lock."""
        self._retired.append((value, action))

    def finish(self) -> None:
        """Waits for all submissions, and calls what was retired."""
        self.wait(self._submitted)
        self.collect()

    def collect(self) -> None:
        """Calls the retired actions whose submissions are done."""
        completed = self.completed()
        for _ in range(len(self._retired)):
            try:
                value, action = self._retired.popleft()
            except IndexError:  # another thread took it
                return
            if value <= completed:
                action()
            else:
                self._retired.append((value, action))

    def make(self, kind: str, info: Any) -> Any:
        """Creates a Vk`kind` that lives until `unmake`, or until the device is closed."""
        handle = ffi.new(f"Vk{kind}*")
        result = getattr(self.fn, f"vkCreate{kind}")(self.handle, info, ffi.NULL, handle)
        vulkan.check(result, f"creating a Vk{kind}")
        self._made[kind, vulkan.address(handle[0])] = handle[0]
        return handle[0]

    def unmake(self, kind: str, handle: Any) -> None:
        if self._made.pop((kind, vulkan.address(handle)), None) is not None:
            getattr(self.fn, f"vkDestroy{kind}")(self.handle, handle, ffi.NULL)

    def check_validation(self, doing: str) -> None:
        """Raises ValidationError for what the validation layer found since the last call."""
        self.instance.check_validation(doing)

    def close(self) -> None:
        """Waits for the device, then destroys everything; a second call does nothing.

        A submission that does not finish within the time limit makes this warn and leave its objects to the process's
        end: destroying what the device still uses is undefined.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
        _open_devices.discard(self)
        try:
            self._await(self._submitted, self.timeout)
        except DeviceLostError:
            # The objects of a lost device may and must still be destroyed, once the driver lets go of its work: it
            # returns in finite time then.
            self.fn.vkDeviceWaitIdle(self.handle)
        except VulkanError as error:
            warnings.warn(f"closed with work unfinished: {error}", stacklevel=2)
            self.fn = vulkan.ClosedFunctions(self.info.name)
            return
        self.memory.close()
        self._destroy()
        try:
            self.check_validation(f"closing {self.info.name}")
        finally:
            self.instance.close()

    def _destroy(self) -> None:
        """Destroys the device and all that was made on it but memory; nothing may be running."""
        self.compilers.shutdown()
        self._retired.clear()
        self._idle.clear()
        for made in self._kernels.values():
            made.destroy()
        self._kernels.clear()
        for kind, handle in list(self._made):
            self.unmake(kind, ffi.cast(f"Vk{kind}", handle))
        self.fn.vkDestroyDevice(self.handle, ffi.NULL)
        self.fn = vulkan.ClosedFunctions(self.info.name)

    def disown(self) -> None:
        """Counts as closed, with nothing destroyed: in a forked process, where the driver's threads do not run."""
        self.closed = True
        self.fn = vulkan.ClosedFunctions(self.info.name)
        self._lock = threading.Lock()  # a thread that did not come along may hold it

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Device({self.info}{', closed' if self.closed else ''})"


def _cache_dir(info: DeviceInfo) -> Path:
    """Where the pipelines that this device's driver compiled are kept."""
    return disk_cache.root() / f"{info.vendor_id:04x}-{info.device_id:04x}-{info.cache_uuid}-{info.driver_version:x}"


_open_devices: set[Device] = set()
_default: Device | None = None
_default_lock = threading.Lock()


def default_device() -> Device:
    """The device that this process shares, opened on first use as VK_KERNELS_DEVICE says; again after a close."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = Device.open()
        return _default


@atexit.register
def _close_all() -> None:
    with contextlib.ExitStack() as stack:  # one that fails keeps no other from being closed
        for device in _open_devices.copy():
            stack.callback(device.close)


def _disown_all() -> None:
    while _open_devices:
        _open_devices.pop().disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
