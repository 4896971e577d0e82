"""Leaves of a call's arguments: what JAX takes each for, and what a device is given for it."""

from typing import Any

import jax
import numpy as np
from jax.extend import source_info_util

from vk_kernels.bridge.array_methods import to_jax
from vk_kernels.compiler.avals import is_array, on_host, to_device
from vk_kernels.errors import UnsupportedError
from vk_kernels.runtime.array import Array, ArrayType, array_type, repr_style

_TRACED = jax.core.Tracer, jax.ShapeDtypeStruct
_OWNED = Array, jax.Array


def type_of(x: Any) -> ArrayType:
    """The type that JAX takes an argument for. Raises TypeError for what is no array."""
    if isinstance(x, Array):
        return x.type
    if type(x) is np.ndarray and x.dtype.kind in "biuf":
        return array_type(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), False)
    return type_of_aval(jax.typeof(x))


def type_of_aval(aval: Any) -> ArrayType:
    """The type of an abstract value. Raises UnsupportedError for what is no array: a ref, a token."""
    if not is_array(aval):
        line = source_info_util.summarize(source_info_util.current())
        raise UnsupportedError(
            f"a function on Vulkan takes and gives arrays, not {aval}: pass what it holds, at {line}"
        )
    return array_type(aval.shape, aval.dtype, aval.weak_type)


def host_array(x: Any) -> np.ndarray:
    """An argument as the array that JAX takes it for."""
    return to_device(x, type_of(x))


def is_traced(x: Any) -> bool:
    """Whether an argument stands for an array: a tracer or a description."""
    kind = type(x)  # to ask for Tracer is slow
    return kind is not Array and kind is not np.ndarray and isinstance(x, _TRACED)


def is_leaf_of(x: Any, kind: ArrayType) -> bool:
    """Whether x is a pytree leaf and an array of this type."""
    if type(x) is np.ndarray and x.dtype == kind.dtype:
        return x.shape == kind.shape and not kind.weak_type
    is_leaf = type(x) is Array or jax.tree_util.all_leaves([x])
    return is_leaf and not is_traced(x) and type_of(x) == kind


def leaves_at(tree: Any, x: Any) -> list[Any] | None:
    """The parts of x where `tree` has its leaves, None for another structure; quicker than to flatten x.

    A part may be a tree itself.
    """
    repr_style.has_contents = False  # JAX puts the arrays that it finds into an error, which nobody reads
    try:
        return tree.flatten_up_to(x)
    except ValueError:
        return None
    finally:
        repr_style.has_contents = True


def delete(x: Any) -> None:
    """Deletes a donated array; numpy arrays and numbers stay."""
    if isinstance(x, _OWNED):
        x.delete()


def described(x: Any) -> Any:
    """The description that JAX traces an array of ours as; all else as it is."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) if isinstance(x, Array) else x


def copied(x: Any) -> Any:
    """A copy of an array, for JAX to compute with when a call has taken the array; all else as it is."""
    if isinstance(x, Array):
        return to_jax(x)
    if is_traced(x) or not isinstance(x, np.ndarray | jax.Array) or on_host(x):
        return x
    return jax.numpy.array(x)
