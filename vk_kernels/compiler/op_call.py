"""A call of a kernel op: a JSON string, [op, parameters, call site], and the plan that it stands for.

It holds no number of this process, so that a program out of JAX's persistent compilation cache does the same in
another one.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from vk_kernels.compiler.op_registry import kernel_op
from vk_kernels.errors import BufferSizeError, FeatureError
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.dispatch_plan import Plan, kernel_of
from vk_kernels.runtime.open_devices import open_device

_MOST_SHOWN = 8  # arrays of a call, in messages and labels: an optimizer's has hundreds


class CallSite(NamedTuple):
    """A call's device selector ('' is the process's default device), and the variant of its kernels.

    variant None is what the planner thinks best.
    """

    device: str = ""
    variant: str | None = None


def encode_call(op: str, parameters: dict[str, Any], site: CallSite) -> str:
    """The string of a call; parameters are numbers, strings, None, and tuples of these."""
    return json.dumps([op, parameters, site])


@functools.lru_cache(maxsize=4096)
def decode_call(call: bytes) -> tuple[str, dict[str, Any], CallSite]:
    """(op, parameters, call site) of an encoded call."""
    op, parameters, site = json.loads(call)
    return op, {name: _with_tuples(value) for name, value in parameters.items()}, CallSite(*site)


def _with_tuples(value: Any) -> Any:
    """JSON has lists where the parameters had tuples."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def with_parameters(call: bytes, parameters: dict[str, Any]) -> bytes:
    """The same call with other parameters."""
    op, _, site = decode_call(call)
    return encode_call(op, parameters, site).encode()


def with_op(call: bytes, op: str) -> bytes:
    """A call of another op with the same parameters."""
    _, parameters, site = decode_call(call)
    return encode_call(op, parameters, site).encode()


@functools.lru_cache(maxsize=4096)
def make_plan(device: Device, call: bytes, inputs: tuple[ArraySpec, ...], outputs: tuple[ArraySpec, ...]) -> Plan:
    """The plan of a call, and its kernels; made once.

    Raises ValueError or FeatureError, naming op and shapes, for what the kernels or the device cannot do.
    """
    op, parameters, site = decode_call(call)
    what = f"{describe_call(op, inputs)} on {device.info.name}"
    options = {"variant": site.variant} if site.variant else {}
    _check_sizes(device, what, [(array, array.nbytes) for array in (*inputs, *outputs)])
    try:
        plan = kernel_op(op).planner(device.info, inputs, outputs, **parameters, **options)
        for dispatch in plan.dispatches:
            kernel_of(device, dispatch)
        if site.device and open_device(site.device) is not device:
            raise ValueError(f"asked for on device {site.device!r}, in a program for another one")
    except (ValueError, FeatureError) as error:
        raise type(error)(f"{what}: {error}") from None
    _check_sizes(device, what, [("scratch", nbytes) for nbytes in plan.scratch])
    return plan


def _check_sizes(device: Device, what: str, sizes: Sequence[tuple[object, int]]) -> None:
    limit = device.limits.storage_buffer_range
    for name, nbytes in sizes:
        if nbytes > limit:
            raise BufferSizeError(
                f"{what}: {name} takes {nbytes:,} bytes, and a buffer there at most {limit:,} (maxStorageBufferRange)"
            )


def describe_call(op: str, inputs: Sequence[object]) -> str:
    """The call for messages: op(dtype[shape], ...), of many arrays the first ones."""
    shown = ", ".join(map(str, inputs[:_MOST_SHOWN]))
    more = len(inputs) - _MOST_SHOWN
    return f"{op}({shown} and {more} more)" if more > 0 else f"{op}({shown})"
