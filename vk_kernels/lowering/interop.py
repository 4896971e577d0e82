"""JAX takes `vk_kernels.Array` wherever it takes an array: by a copy to the host, of the same dtype and weak type.

JAX has no public registry for types of arrays. These two are what its own types of arrays are entered in.
"""

import jax
import jax.numpy as jnp
from jax._src.core import pytype_aval_mappings
from jax._src.dtypes import register_canonicalize_value_handler
from jax._src.literals import TypedNdArray

from vk_kernels.array import Array


def _aval(x: Array) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(x.shape, x.dtype, weak_type=x.weak_type)


def to_jax(x: Array) -> jax.Array:
    """A copy on the host, of the same dtype and weak type."""
    return _same(x) if x.weak_type else jnp.asarray(x.numpy())


_same = jax.jit(lambda x: x)  # of what can be made, only results of jitted functions are of weak type and any shape


def _on_host(x: Array) -> TypedNdArray:
    return TypedNdArray(x.numpy(), aval=_aval(x))


pytype_aval_mappings[Array] = _aval
register_canonicalize_value_handler(Array, _on_host)
