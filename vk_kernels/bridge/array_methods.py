"""JAX takes `vk_kernels.Array` wherever it takes an array: by a copy to the host, of the same dtype and weak type.

`isinstance(x, jax.Array)` is False: JAX's own classes alone answer to it.

JAX has no public registry for types of arrays. These two are what its own types of arrays are entered in.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.core import pytype_aval_mappings
from jax._src.dtypes import register_canonicalize_value_handler
from jax._src.literals import TypedNdArray

from vk_kernels.runtime.array import Array, array_type


def _aval(x: Array) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(x.shape, x.dtype, weak_type=x.weak_type)


def to_jax(x: Array) -> jax.Array:
    """A copy on the host, of the same dtype and weak type."""
    if not x.weak_type:
        return jnp.asarray(x.numpy())
    with jax.disable_jit(False):
        return _same(x)


def sharding() -> jax.sharding.Sharding:
    """The sharding of such copies."""
    return jnp.zeros(()).sharding


def from_host(x: np.ndarray, weak_type: bool) -> Array:
    """An array of ours with these contents, on the device of `use`, or else the process's.

    Raises NoDeviceError where there is none.
    """
    from vk_kernels.bridge.use import target_of
    from vk_kernels.runtime.open_devices import open_device

    device = open_device(target_of("vulkan").device)
    return Array(device.upload(x), array_type(x.shape, x.dtype, weak_type))


_same = jax.jit(lambda x: x)  # of what can be made, only results of jitted functions are of weak type and any shape


def _on_host(x: Array) -> TypedNdArray:
    return TypedNdArray(x.numpy(), aval=_aval(x))


pytype_aval_mappings[Array] = _aval
register_canonicalize_value_handler(Array, _on_host)
