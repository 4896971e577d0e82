"""Public ops: each runs as its reference, compiled by XLA with all around it, or as its Vulkan kernels.

On Vulkan an op is a primitive for its forward and one for its backward pass (`make_primitive`), tied by
`make_differentiable`; optional operands stand last, and are left out where absent. What an op's api does is what
kernels leave to their caller: to check shapes and dtypes, and to bring the operands into the form that kernels take.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.bridge.use import target_of
from vk_kernels.runtime.array_spec import ArraySpec

R = TypeVar("R")

_LONGEST = 300  # characters of the operands in a message

_IMPLEMENTATION = """

implementation: 'xla', 'vulkan', or None for what `vk_kernels.use` says, else 'xla'. 'vulkan' raises NoDeviceError
without a device, ValueError or FeatureError for what the kernels or the device cannot do.
"""


def public(reference: Callable[..., R]) -> Callable[[Callable[..., Any]], Callable[..., R]]:
    """Makes a reference, and a function `kernels(target, ...)` of the same arguments, one public operation."""

    signature = inspect.signature(reference)

    def decorate(kernels: Callable[..., Any]) -> Any:
        @functools.wraps(reference)
        def operation(*arguments: Any, implementation: str | None = None, **options: Any) -> Any:
            target = target_of(implementation)
            arguments = tuple(map(_operand, arguments))
            options = {name: _operand(option) for name, option in options.items()}
            try:
                if target is None:
                    return reference(*arguments, **options)
                return kernels(target, *arguments, **options)
            except (AttributeError, TypeError, ValueError) as error:
                _check_call(kernels.__name__, signature, arguments, options)
                error.add_note(_describe(kernels.__name__, arguments, options))
                raise

        keyword = inspect.Parameter.KEYWORD_ONLY
        added = inspect.Parameter("implementation", keyword, default=None, annotation=str | None)
        parameters = [*signature.parameters.values()]
        keywords_end = next((i for i, p in enumerate(parameters) if p.kind == p.VAR_KEYWORD), len(parameters))
        parameters.insert(keywords_end, added)
        operation.__name__ = operation.__qualname__ = kernels.__name__
        operation.__signature__ = signature.replace(parameters=parameters)
        operation.__doc__ = inspect.cleandoc(reference.__doc__) + _IMPLEMENTATION
        return operation

    return decorate


def _operand(x: Any) -> Any:
    """An array of numpy's as JAX takes it, float64 as float32; of a typed key the two numbers; all else as it is."""
    if isinstance(x, np.ndarray):
        return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)  # no copy beside the device's own
    if not (isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)):
        return x
    data = jax.random.key_data(x)
    if data.shape != (2,):
        raise ValueError(f"rng must be one key of two numbers, as jax.random.key's by default, found {x}")
    return data


def _check_call(name: str, signature: inspect.Signature, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raises TypeError for an operand that is missing or unknown; only after a failure, for it takes its time."""
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _describe(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """A call of an op, its arrays by shape and dtype."""

    def shown(x: Any) -> str:
        return str(ArraySpec(x.shape, x.dtype)) if hasattr(x, "shape") and hasattr(x, "dtype") else repr(x)

    given = [*map(shown, arguments), *(f"{option}={shown(x)}" for option, x in options.items())]
    text = ", ".join(given)
    return f"called as vk_kernels.ops.{name}({text if len(text) <= _LONGEST else text[:_LONGEST] + '...'})"


def check_arrays(operation: str, **arrays: tuple[Any, tuple[int, ...], Any]) -> None:
    """Raises ValueError for an array, given as (array, shape, dtype), that is not of that shape and dtype."""
    for name, (array, shape, dtype) in arrays.items():
        if array is not None and (jnp.shape(array) != shape or jnp.result_type(array) != dtype):
            wanted, found = (
                ArraySpec(sizes, jnp.dtype(kind))
                for sizes, kind in ((shape, dtype), (jnp.shape(array), jnp.result_type(array)))
            )
            raise ValueError(f"{operation}: {name} must be {wanted}, found {found}")


def as_rows(x: jax.Array) -> jax.Array:
    """(..., D) as (rows, D)."""
    return x.reshape(math.prod(x.shape[:-1]), *x.shape[-1:])


def present(*operands: jax.Array | None) -> list[jax.Array]:
    return [x for x in operands if x is not None]
