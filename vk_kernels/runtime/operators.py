"""What Python code does with an array outside of a jitted function: x + 1, x[0], x.sum(), x.at[2].set(5).

It does it on the host, with JAX, and gives JAX arrays: right everywhere, and a copy each time. What is to be fast
stands inside `vk_kernels.jit`.
"""

from collections.abc import Callable
from typing import Any

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


class Operators:
    """For a class with `__jax_array__`."""

    __slots__ = ()
    __hash__ = None  # as of every array that compares by element
    __array_priority__ = 100  # numpy leaves what it has on the left to us


for _name in (*_SPECIAL, *_METHODS):
    setattr(Operators, _name, _method(_name))
for _name in _PROPERTIES:
    setattr(Operators, _name, _property(_name))
