"""JAX's abstract values on the device.

PRNG keys are the uint32 words that they are made of, with the axes of one key's words last. An array of float0, JAX's
gradient of an integer, which has no content, is one of bool. Callers have both on the host.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.compiler.codegen.scalars import kind

_WIDE = frozenset(("int64", "uint64", "float64", "complex128"))
_ARRAYS = jax.core.ShapedArray, jax.ShapeDtypeStruct
FLOAT0 = jax.dtypes.float0


def is_array(aval: Any) -> bool:
    """Whether an abstract value is of arrays, of keys too; a ref or a token is none."""
    return isinstance(aval, _ARRAYS)


def is_key(aval: Any) -> bool:
    """Whether an abstract value is of PRNG keys."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def on_host(aval: Any) -> bool:
    """Whether callers have such arrays on the host: keys and float0."""
    return is_key(aval) or aval.dtype == FLOAT0


def on_device(aval: Any) -> Any:
    """The shape and the dtype of such an array on the device."""
    if is_key(aval):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return jax.ShapeDtypeStruct(aval.shape, np.bool_) if aval.dtype == FLOAT0 else aval


def to_device(x: Any, aval: Any) -> np.ndarray:
    """The contents of an array as they are on the device."""
    if is_key(aval):
        return np.asarray(jax.random.key_data(x))
    return np.zeros(aval.shape, bool) if aval.dtype == FLOAT0 else np.asarray(x, aval.dtype)


def to_host(x: np.ndarray, aval: Any) -> Any:
    """Contents on the device as callers have them, where `on_host` says so."""
    return jax.random.wrap_key_data(x, impl=aval.dtype._impl) if is_key(aval) else np.zeros(aval.shape, FLOAT0)


@functools.cache
def check_dtype(dtype: Any) -> None:
    """Raises ValueError, in one line, for a dtype that no kernel is generated for."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise ValueError(f"no kernel is generated for the extended dtype {dtype}")
    try:
        kind(np.dtype(dtype))
    except ValueError as error:
        advice = "; JAX_ENABLE_X64 is on: turn it off, or ask for 32 bits" if np.dtype(dtype).name in _WIDE else ""
        raise ValueError(f"{error}{advice}") from None
