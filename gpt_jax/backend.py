"""The backend of a run: XLA, or a Vulkan device, where each step is one recorded submission."""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from ml_collections import ConfigDict

import vk_kernels
from gpt_jax.distributed.placement import OneDevice
from gpt_jax.distributed.processes import ALONE, Processes, device_numbers
from gpt_jax.distributed.vulkan_devices import VulkanDevices
from gpt_jax.errors import UserError
from gpt_jax.runs.info import device_facts, device_peak_bytes
from vk_kernels import NoDeviceError, SettingError, VulkanError
from vk_kernels.ops.attention.planner import MAX_HEAD_DIM
from vk_kernels.runtime.instance import validation_mode
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.runtime.physical_device import choose, list_devices


@dataclass(frozen=True)
class Backend:
    """The compiler of a run's functions and the place of its state.

    device: its facts: platform, kind and count. jit: `jax.jit`, or `vk_kernels.jit`, which takes the same arguments.
    put: a pytree of host arrays to the device. peak_bytes: the most of its memory that was in use; None: not known.
    placement: how state and batches lie on the devices.
    """

    name: str  # xla or vulkan
    reason: str
    device: dict[str, Any]
    jit: Callable[..., Any]
    put: Callable[[Any], Any]
    peak_bytes: Callable[[], int | None]
    placement: OneDevice = field(default_factory=OneDevice)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason}) on {self.device['count']} x {self.device['kind']}"


def enter_backend(
    name: str,
    matmul_precision: str,
    stack: contextlib.ExitStack,
    submit_ms: float = 0,
    processes: Processes = ALONE,
    shard: str = "replicated",
) -> Backend:
    """The backend that a config asks for, in force until `stack` is closed.

    Args:
      name: xla, vulkan, or auto: Vulkan where there is a real GPU for it and XLA has none, else XLA.
      matmul_precision: of XLA's products, see `jax.default_matmul_precision`.
      submit_ms: how long one submission to a Vulkan device may take, see `Device.submit_ms`; 0: no limit.
      processes: of the run. shard: see `OnMesh`.

    Raises:
      UserError: there is no Vulkan device, it cannot be opened, or a variable of `vk_kernels` means nothing.
    """
    if processes.count > 1 and not (name == "vulkan" and processes.host_count == 1):
        processes.join_jax()
    require_devices()
    for setting in (
        jax.default_matmul_precision(matmul_precision),
        # Variables exported for other programs change nothing here: all dtypes, random bits and transfers are our own.
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.default_prng_impl("threefry2x32"),
        jax.transfer_guard("allow"),
    ):
        stack.enter_context(setting)
    reason = "asked for"
    if name == "auto":
        name, reason = _choose()
    if name == "xla":
        return _enter_xla(reason, stack, processes, shard)
    if shard != "replicated":
        raise UserError(
            f"config.shard={shard}: Vulkan devices have all parameters each; --config.backend=xla has parts"
        )
    require_devices("cpu")
    try:
        number = processes.device(len(list_devices())) if processes.count > 1 or processes.devices else None
        if number is not None:
            os.environ["VK_KERNELS_DEVICE"] = str(number)  # the device that all of this process means
        device = open_device()
        device.submit_ms = submit_ms
    except VulkanError as error:
        raise UserError(f"config.backend=vulkan: {error}") from None
    stack.enter_context(
        jax.default_device(jax.local_devices(backend="cpu")[0])
    )  # for what is done once, like initialisation
    facts = {"platform": "vulkan", "kind": device.info.name, "count": processes.count}
    kind = f"{device.info.name}, {device.info.driver} {device.info.driver_version}"
    placement = VulkanDevices(processes, kind) if processes.count > 1 else OneDevice()
    peak_bytes = lambda: device.memory.peak  # noqa: E731
    return Backend(name, reason, facts, vk_kernels.jit, vk_kernels.device_put, peak_bytes, placement)


def _enter_xla(reason: str, stack: contextlib.ExitStack, processes: Processes, shard: str) -> Backend:
    """XLA's default device, or a mesh of those that the run names."""
    facts = device_facts()
    if processes.count == 1 and not processes.devices and shard == "replicated":
        return Backend("xla", reason, facts, jax.jit, jax.device_put, device_peak_bytes)
    from gpt_jax.distributed.mesh import OnMesh  # here: few runs need it, and its imports take time

    devices = jax.devices()
    if processes.count == 1 and processes.devices:
        numbers = processes.device_numbers(len(devices))
        devices = [devices[number] for number in dict.fromkeys(numbers)]
    mesh = OnMesh(devices, shard, processes)
    stack.enter_context(jax.default_device(next(each for each in devices if each.process_index == jax.process_index())))
    facts = facts | {"count": len(devices)}
    return Backend("xla", reason, facts, jax.jit, mesh.put, device_peak_bytes, mesh)


def processes_to_launch(config: ConfigDict) -> int:
    """The number of processes that this host needs, one a device; 1: this one is enough, or others are started by hand.

    XLA serves all devices from one process; it needs several only where they are to share one, as 0,0 says.
    """
    if not config.devices or config.distributed:
        return 1
    require_devices()
    name = _choose()[0] if config.backend == "auto" else config.backend
    if name == "vulkan":
        try:
            return len(device_numbers(config.devices, len(list_devices())))
        except VulkanError as error:
            raise UserError(f"config.backend=vulkan: {error}") from None
    numbers = device_numbers(config.devices, jax.local_device_count())
    if len(set(numbers)) == len(numbers):
        return 1
    if jax.default_backend() != "cpu":
        raise UserError(f"config.devices={config.devices}: XLA's processes cannot share a device; name each once")
    return len(numbers)


def require_devices(platform: str | None = None) -> None:
    """Raises UserError, naming the variables that may be why, if JAX has no device, or none of a platform."""
    try:
        jax.devices(platform)
    except (RuntimeError, AssertionError) as error:  # JAX knows the platform's name, but has nothing for it
        found = [f"{name}={os.environ[name]}" for name in _PLATFORM_VARIABLES if os.environ.get(name)]
        found = found[:-1] if len(found) > 1 and found[-1].startswith("XLA_FLAGS=") else found  # the least likely
        why = f" (JAX says: {' '.join(str(error).split())})" if str(error) else ""
        needed = "the processor, which Vulkan's backend needs beside it" if platform == "cpu" else "a device"
        cure = f"{' and '.join(found)} must be unset or name what this machine has" if found else "reinstall jax"
        raise UserError(f"JAX does not find {needed}: {cure}{why}") from None


_PLATFORM_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")


def _choose() -> tuple[str, str]:
    """(backend, why). A Vulkan device that is a processor is never chosen."""
    if jax.default_backend() != "cpu":
        return "xla", "auto: JAX has an accelerator of its own"
    try:
        validation_mode(None)  # which only an opened device reads
        devices = list_devices()
    except SettingError as error:  # a mistake to mend, not a machine without Vulkan
        raise UserError(f"config.backend=auto: {error}") from None
    except NoDeviceError as error:
        return "xla", f"auto: {error}"
    except VulkanError as error:
        return "xla", f"auto: Vulkan does not work here: {' '.join(str(error).split())}"
    if not os.environ.get("VK_KERNELS_DEVICE") and all(info.kind == "cpu" for info in devices):
        return "xla", "auto: no GPU with a Vulkan driver"
    try:
        info = choose(devices)
    except NoDeviceError as error:
        if os.environ.get("VK_KERNELS_DEVICE"):
            raise UserError(
                f"config.backend=auto: {error}: set VK_KERNELS_DEVICE to one of them, unset it, or give backend=xla"
            ) from None
        return "xla", f"auto: {error}"
    if info.kind == "cpu":
        return "xla", f"auto: the only Vulkan device is a processor, {info.name}"
    return "vulkan", "auto: a GPU that JAX itself does not serve"


def check_heads(model: ConfigDict, backend: Backend) -> None:
    """Raises UserError for a model whose attention heads are wider than the kernels of the backend take."""
    width, heads = model.embed_dim, model.num_heads
    if backend.name == "vulkan" and width // heads > MAX_HEAD_DIM:
        raise UserError(
            f"config.model.embed_dim={width} over config.model.num_heads={heads} makes a head {width // heads} wide, "
            f"and the Vulkan kernels take at most {MAX_HEAD_DIM}: num_heads of {-(-width // MAX_HEAD_DIM)} or more, or "
            f"--config.backend=xla (sampling: --backend=xla), which has no limit (the backend is {backend})"
        )


def is_device_error(error: BaseException) -> bool:
    """Whether Vulkan, XLA's allocator or Python's ran into what the machine lacks, or lost the device."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, (VulkanError, MemoryError))


def describe(error: BaseException) -> str:
    """Says what happened, in one line."""
    return " ".join(str(error).split()) or "out of memory"  # a bare MemoryError says nothing


def print_device_error(error: RuntimeError | MemoryError) -> int:
    """Prints what the device ran into, in one line with a way out of Vulkan's troubles; gives the exit code.

    Raises:
      RuntimeError: the error is none of the device's.
    """
    if not is_device_error(error):
        raise error
    way_out = "; --backend=xla answers without Vulkan" if isinstance(error, VulkanError) else ""
    print(f"error: {describe(error)}{way_out}", file=sys.stderr)
    return 1
