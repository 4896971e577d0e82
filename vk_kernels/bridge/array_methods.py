"""Methods of `vk_kernels.Array` for JAX and for Python code beside it, installed on the class when this is imported.

JAX takes one wherever it takes an array, by a copy to the host, of the same dtype and weak type. Operators and methods
outside of a jitted function (x + 1, x[0], x.sum(), x.at[2].set(5)) work on such copies, with JAX, and give JAX arrays:
right everywhere, and a copy each time. What is to be fast stands inside `vk_kernels.jit`.

`isinstance(x, jax.Array)` is False: JAX's own classes alone answer to it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.bridge.use import target_of
from vk_kernels.jax_compat import TypedNdArray, register_array_type
from vk_kernels.runtime.array import Array, array_type
from vk_kernels.runtime.open_devices import open_device

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and", "or", "xor")
_BINARY += ("lshift", "rshift")
_SPECIAL = (
    *(f"__{name}__" for name in (*_BINARY, *(f"r{name}" for name in _BINARY))),
    *(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert")),
    *(f"__{name}__" for name in ("getitem", "setitem", "iter", "reversed", "contains", "round", "format", "complex")),
    *(f"__{name}__" for name in ("dlpack", "dlpack_device", "array_namespace")),
)
_METHODS = (
    *("addressable_data", "all", "any", "argmax", "argmin", "argpartition", "argsort", "astype", "byteswap", "choose"),
    *("clip", "compress", "conj", "conjugate", "cumprod", "cumsum", "diagonal", "dot", "flatten", "max", "mean", "min"),
    *("nonzero", "prod", "ptp", "ravel", "repeat", "reshape", "round", "searchsorted", "sort", "squeeze", "std", "sum"),
    *("swapaxes", "take", "to_device", "tobytes", "tolist", "trace", "transpose", "var", "view"),
)
_PROPERTIES = ("T", "addressable_shards", "at", "flat", "global_shards", "imag", "mT", "real")


def _method(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.__jax_array__(), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"`jax.Array.{name}`, on the host."
    return method


def _property(name: str) -> property:
    return property(lambda self: getattr(self.__jax_array__(), name), doc=f"`jax.Array.{name}`, on the host.")


def to_jax(x: Array) -> jax.Array:
    """A copy on the host, of the same dtype and weak type."""
    if not x.weak_type:
        return jnp.asarray(x.numpy())
    with jax.disable_jit(False):
        return _same(x)


_same = jax.jit(lambda x: x)  # of what can be made, only results of jitted functions are of weak type and any shape


def from_host(x: np.ndarray, weak_type: bool) -> Array:
    """An array of ours with these contents, on the device of `use`, or else the process's.

    Raises NoDeviceError where there is none.
    """
    device = open_device(target_of("vulkan").device)
    return Array(device.upload(x), array_type(x.shape, x.dtype, weak_type))


def _aval(x: Array) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(x.shape, x.dtype, weak_type=x.weak_type)


def _on_host(x: Array) -> TypedNdArray:
    return TypedNdArray(x.numpy(), aval=_aval(x))


def _sharding(x: Array) -> jax.sharding.Sharding:
    """The sharding of the copies that JAX takes: its default device, uncommitted."""
    return jnp.zeros(()).sharding


def _devices(x: Array) -> set[jax.Device]:
    """The JAX devices of `sharding`."""
    return _sharding(x).device_set


def _reduce(x: Array) -> tuple[Callable[..., Array], tuple[np.ndarray, bool]]:
    return from_host, (x.numpy(), x.weak_type)


def _install() -> None:
    for name in (*_SPECIAL, *_METHODS):
        setattr(Array, name, _method(name))
    for name in _PROPERTIES:
        setattr(Array, name, _property(name))
    own = {"__jax_array__": to_jax, "__reduce__": _reduce, "devices": _devices}
    own |= {"aval": property(jax.typeof, doc="The type that JAX takes it for."), "sharding": property(_sharding)}
    for name, method in own.items():
        setattr(Array, name, method)
    register_array_type(Array, _aval, _on_host)


_install()
