"""XLA custom calls whose handler is a Python function, through XLA's typed foreign function interface (FFI).

XLA hands a handler one C struct, the call frame, with the addresses of its operands and results. Reading it here with
ctypes, rather than through `jax.pure_callback`, leaves out every JAX array and with it the locks that a callback can
hang on, and lets the host's buffers be copied straight to the device.

Source: xla/ffi/api/c_api.h, whose layout has been stable since version 0.1 of that interface (`jax.ffi.include_dir()`).
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from vk_kernels.runtime.array_spec import ArraySpec

CALL_ATTRIBUTE = "call"  # the one attribute of our custom calls: a string that says what to do

_VERSION = (
    0,
    1,
)  # of the interface that the structs below are from: XLA serves this and every later minor version
_METADATA = 1  # XLA_FFI_Extension_Metadata
_STRING = 4  # XLA_FFI_AttrType_STRING

# XLA_FFI_Error_Code
CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL = 1, 3, 4, 8, 13

# XLA_FFI_DataType -> numpy, for what kernels take
_DTYPES = {
    number: np.dtype(dtype)
    for number, dtype in {
        1: np.bool_,
        2: np.int8,
        3: np.int16,
        4: np.int32,
        5: np.int64,
        6: np.uint8,
        7: np.uint16,
        8: np.uint32,
        9: np.uint64,
        10: np.float16,
        11: np.float32,
        12: np.float64,
        16: ml_dtypes.bfloat16,
    }.items()
}


class _Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


class _Version(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension_start", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("version", _Version),
        ("traits", c_uint32),
        ("state_type_id", c_int64),
    )


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Buffer(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(Structure):  # XLA_FFI_Args and XLA_FFI_Rets
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("buffers", POINTER(POINTER(_Buffer))),
    )


class _Span(Structure):
    _fields_ = (("address", c_void_p), ("size", c_size_t))


class _Attributes(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", POINTER(POINTER(_Span))),
        ("values", POINTER(POINTER(_Span))),
    )


class _ErrorArguments(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("message", c_char_p),
        ("code", c_int),
    )


class _Api(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))),
    )


class _CallFrame(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


class HostArray(NamedTuple):
    """An operand or a result of a custom call: host memory that is XLA's, valid during the call."""

    address: int
    array: ArraySpec

    def view(self) -> np.ndarray:
        """Its bytes, to be read or written in place."""
        if self.array.nbytes == 0:
            return np.empty(0, np.uint8)
        memory: Any = (ctypes.c_uint8 * self.array.nbytes).from_address(self.address)
        return np.frombuffer(memory, np.uint8)


class CallError(Exception):
    """A custom call's failure: an XLA error with this code and message."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


# What runs a call: the string of its attribute, its operands and its results, which it must fill.
HostFunction = Callable[[bytes, Sequence[HostArray], Sequence[HostArray]], None]

_registered: dict[str, Any] = {}  # the C callbacks, which must outlive every program that calls them


def register(target: str, handler: HostFunction) -> None:
    """Makes `handler` what runs the custom calls named `target` on XLA's CPU backend.

    It may run in several threads at once, and must not call JAX. What it raises becomes the error of the computation.
    """

    def run(pointer: Any) -> int | None:
        frame = pointer.contents
        try:
            if frame.extension_start:
                _answer_query(frame)
            else:
                handler(_call_attribute(frame.attributes), _arrays(frame.arguments), _arrays(frame.results))
        except CallError as error:
            return _error(frame, error.code, str(error))
        except KeyboardInterrupt:
            return _error(frame, CANCELLED, "interrupted")
        except BaseException as error:  # nothing may unwind into XLA
            return _error(frame, INTERNAL, f"{type(error).__name__}: {error}")
        return None

    callback = ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))(run)
    _registered[target] = callback
    capsule = jax.ffi.pycapsule(ctypes.cast(callback, c_void_p))
    jax.ffi.register_ffi_target(target, capsule, platform="cpu")


def _answer_query(frame: _CallFrame) -> None:
    """XLA asks a handler for its version once, before it calls it."""
    if frame.extension_start.contents.type != _METADATA:
        return
    metadata = ctypes.cast(frame.extension_start, POINTER(_MetadataExtension)).contents.metadata.contents
    metadata.version.major, metadata.version.minor = _VERSION
    metadata.traits = 0


def _call_attribute(attributes: _Attributes) -> bytes:
    if attributes.size != 1 or attributes.types[0] != _STRING:
        raise CallError(INTERNAL, f"a custom call of vk_kernels has one string attribute, {CALL_ATTRIBUTE!r}")
    span = attributes.values[0].contents
    return ctypes.string_at(span.address, span.size)


def _arrays(buffers: _Buffers) -> list[HostArray]:
    found = []
    for i in range(buffers.size):
        buffer = buffers.buffers[i].contents
        dtype = _DTYPES.get(buffer.dtype)
        if dtype is None:
            raise CallError(INVALID_ARGUMENT, f"no kernel takes XLA's data type number {buffer.dtype}")
        shape = tuple(buffer.dims[: buffer.rank]) if buffer.rank else ()
        found.append(HostArray(buffer.data or 0, ArraySpec(shape, dtype)))
    return found


def _error(frame: _CallFrame, code: int, message: str) -> int:
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message.encode(errors="replace"), code)
    return frame.api.contents.create_error(arguments)
