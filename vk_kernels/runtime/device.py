"""Devices: an open one with its queue, memory and kernels.

    with Device.open() as device:
        x = device.buffer(4 * 1000)
        device.run(device.kernel("fill"), [x], struct.pack("II", 1000, 7), groups=(4, 1, 1))
        print(x.read(np.uint32, (1000,)))

A device may be used from several threads at once; a CommandRecorder belongs to one thread at a time.
"""

import atexit
import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vk_kernels.errors import DeviceLostError, VulkanError
from vk_kernels.runtime import kernel, vulkan
from vk_kernels.runtime.command_buffer import CommandRecorder
from vk_kernels.runtime.instance import Instance, validation_mode
from vk_kernels.runtime.kernel import Kernel
from vk_kernels.runtime.logical_device import LogicalDevice
from vk_kernels.runtime.memory import Buffer, Memory, MemoryStats
from vk_kernels.runtime.physical_device import DeviceInfo, QueuePlaces, choose, queue_places, survey
from vk_kernels.runtime.queue import Queue
from vk_kernels.runtime.staging import Staging
from vk_kernels.spirv.reflect import reflect

# Seconds that a wait takes at most, unless told otherwise. A CPU device compiles a kernel when it first runs it.
TIMEOUT, CPU_TIMEOUT = 120.0, 1800.0


class Device(LogicalDevice):
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
            found = survey(instance, frozenset(without))
            info = choose([info for info, _, _ in found], selector)
            _, physical, family = found[info.index]
            if timeout is None:
                timeout = CPU_TIMEOUT if info.kind == "cpu" else TIMEOUT
            places = queue_places(instance.fn, physical, family)
            return cls(instance, info, physical, places, direct, timeout)
        except BaseException:
            instance.close()
            raise

    def __init__(
        self,
        instance: Instance,
        info: DeviceInfo,
        physical: Any,
        places: QueuePlaces,
        direct: bool,
        timeout: float,
    ):
        super().__init__(instance, info, physical, places)
        self.submit_ms = 0.0  # a program is cut into submissions that take no longer, see `Executable`; 0: it is one
        self.program_lock = threading.RLock()  # held while a program is prepared: its arguments must not be moved
        self.executables: weakref.WeakSet[Any] = weakref.WeakSet()  # `Executable`s
        self._lock = threading.Lock()  # of the two below
        self._kernels: dict[Any, Kernel] = {}
        self._idle: list[CommandRecorder] = []
        self.compilers = ThreadPoolExecutor(thread_name_prefix="compile")  # a driver compiles a kernel on one core
        try:
            self.check_validation(f"opening {self.info.name}")
            self.queue = Queue(self, timeout, places.work)
            # For work and transfers beside that of the first; what they use and when is up to who submits to them.
            self.exchange_queue = Queue(self, timeout, places.exchange, self.queue)
            made = {places.exchange: self.exchange_queue}
            for place in (places.send, places.receive):
                made[place] = made.get(place) or Queue(self, timeout, place)
            self.send_queue, self.receive_queue = made[places.send], made[places.receive]
            self.memory = Memory(self.queue, direct)
            self.memory.staging = Staging(self.memory, self.pooled_recorder)
            self.memory.make_room = self._make_room
        except BaseException:
            self._destroy()
            raise
        _open_devices.add(self)

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
            found = self._keep_kernel(key, Kernel(self, self.compilers, label, code, reflection, spec, subgroup_size))
        return found

    def kernel_from_spirv(self, code: bytes, label: str, subgroup_size: int | None = None) -> Kernel:
        """A kernel from SPIR-V with one entry point; made once for the same code."""
        key = (code, subgroup_size)
        found = self._kernels.get(key)
        if found is None:
            found = self._keep_kernel(key, Kernel(self, self.compilers, label, code, reflect(code), {}, subgroup_size))
        return found

    def _keep_kernel(self, key: Any, made: Kernel) -> Kernel:
        """Threads may have made the same kernel at once: the first one stays."""
        with self._lock:
            kept = self._kernels.setdefault(key, made)
        if kept is not made:
            made.destroy()
        return kept

    def new_recorder(self, hazards: bool = True, timestamps: int = 0, replay: bool = False) -> CommandRecorder:
        """A new, empty recording; see CommandRecorder."""
        return CommandRecorder(self.queue, hazards, timestamps, replay)

    def run(
        self,
        kernel: Kernel,
        buffers: Sequence[Buffer],
        push_constants: bytes = b"",
        groups: tuple[int, int, int] = (1, 1, 1),
        label: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Runs one kernel and waits for it; arguments as in CommandRecorder.dispatch and Submission.wait."""
        with self.pooled_recorder() as recorder:
            recorder.dispatch(kernel, buffers, push_constants, groups, label)
            recorder.submit().wait(timeout)

    def _make_room(self) -> None:
        """Has all programs drop what they keep for their next calls: recordings, arrays that nobody else has, arenas.

        Where another thread runs one, nothing is dropped: it may hold what this one would wait for.
        """
        if self.program_lock.acquire(blocking=False):
            try:
                for executable in list(self.executables):
                    executable.make_room()
            finally:
                self.program_lock.release()

    # Its queues.

    @property
    def _queues(self) -> list[Queue]:
        """Each once."""
        return list(dict.fromkeys((self.queue, self.exchange_queue, self.send_queue, self.receive_queue)))

    def completed(self) -> int:
        """The newest submission that is done, and with it all before it."""
        return self.queue.completed()

    def wait(self, value: int, timeout: float | None = None) -> None:
        """Returns when submission `value` is done; raises as `Queue.wait`."""
        self.queue.wait(value, timeout)

    def finish(self) -> None:
        """Waits for all submissions, and gives back what was freed."""
        self.queue.finish()

    def collect(self) -> None:
        """Gives back what was freed, as far as the device is done with it."""
        self.queue.collect()

    @contextlib.contextmanager
    def pooled_recorder(self) -> Iterator[CommandRecorder]:
        """A recorder for one submission, reused when that is done. After an error it is dropped."""
        with self._lock:
            completed = self.queue.completed()
            free = next((i for i, idle in enumerate(self._idle) if idle.last_use <= completed), None)
            recorder = None if free is None else self._idle.pop(free)
        if recorder is None:
            recorder = CommandRecorder(self.queue)
        else:
            recorder.reset()
        yield recorder
        with self._lock:
            self._idle.append(recorder)

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
            for queue in reversed(self._queues):
                queue.wait_idle()
        except DeviceLostError:
            # The objects of a lost device may and must still be destroyed, once the driver lets go of its work: it
            # returns in finite time then.
            self.fn.vkDeviceWaitIdle(self.handle)
        except VulkanError as error:
            warnings.warn(f"closed with work unfinished: {error}", stacklevel=2)
            self.fn = vulkan.ClosedFunctions(self.info.name)
            return
        self.memory.close()
        for queue in self._queues:
            queue.forget_retired()
        self._destroy()
        try:
            self.check_validation(f"closing {self.info.name}")
        finally:
            self.instance.close()

    def _destroy(self) -> None:
        """Destroys the device and all that was made on it but memory; nothing may be running."""
        self.compilers.shutdown()
        self._idle.clear()
        for made in self._kernels.values():
            made.destroy()
        self._kernels.clear()
        self.destroy_all()

    def disown(self) -> None:
        """Counts as closed, with nothing destroyed: in a forked process, where the driver's threads do not run."""
        self.closed = True
        self.fn = vulkan.ClosedFunctions(self.info.name)
        self._lock = threading.Lock()  # a thread that did not come along may hold it
        for queue in self._queues:
            queue.disown()

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Device({self.info}{', closed' if self.closed else ''})"


_open_devices: set[Device] = set()


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
