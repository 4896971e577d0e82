"""Which implementation of an operation runs: what the call says, else what `use` says, else XLA."""

import contextlib
from collections.abc import Iterator
from typing import Literal, overload

import jax

from vk_kernels.compiler.op_call import CallSite
from vk_kernels.runtime.open_devices import open_device

IMPLEMENTATIONS = ("xla", "vulkan")
_ANYWHERE = CallSite()

# (implementation, target) of the innermost `use` of this thread. It is part of the key of every cache of JAX (tracing,
# lowering, compilation), so that what was traced for one implementation is never run for another.
_context = jax.make_user_context(None)


@contextlib.contextmanager
def use(implementation: str, *, device: int | str | None = None, variant: str | None = None) -> Iterator[None]:
    """Has the operations of `vk_kernels.ops` called in the `with` block, in this thread, run as `implementation`.

    Args:
      implementation: 'xla', the reference, compiled by XLA with all else; or 'vulkan', the kernels.
      device: which Vulkan device: an index, 'gpu', 'cpu' or part of a name. None is the one around this block, else
        the process's (VK_KERNELS_DEVICE, or the best GPU).
      variant: which variant of the kernels, for tests and measurements; None is the best for device and shapes.

    A function that was traced in one block is traced again in another, under jax.jit as everywhere. The backward pass
    runs as the forward pass did, wherever it is called.

    Raises:
      ValueError: another implementation, or a device or variant for 'xla'.
      NoDeviceError: no loader, no driver, or no such device.
    """
    if implementation is None:
        raise ValueError("use needs an implementation: 'xla' or 'vulkan'")
    if implementation == "xla" and (device is not None or variant is not None):
        raise ValueError(f"use('xla', device={device!r}, variant={variant!r}): these are for 'vulkan' only")
    target = target_of(implementation)
    if target is not None:
        target = CallSite(target.device if device is None else str(device), variant)
        open_device(target.device)
    with _context((implementation, target)):
        yield


@overload
def target_of(implementation: Literal["vulkan"]) -> CallSite: ...
@overload
def target_of(implementation: str | None) -> CallSite | None: ...
def target_of(implementation: str | None) -> CallSite | None:
    """The target of a call with this argument `implementation`: a call site on Vulkan, or None for XLA.

    Raises ValueError for another implementation.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is None, 'xla' or 'vulkan', not {implementation!r}")
    around, target = _context.value or ("xla", None)
    return None if (implementation or around) == "xla" else target or _ANYWHERE
