"""NaN and infinities in results: what jax_debug_nans and jax_debug_infs ask for."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vk_kernels.bridge.leaves import copied
from vk_kernels.jax_compat import debug_infs, debug_nans
from vk_kernels.runtime.array import Array


def are_looked_for() -> bool:
    """Whether one of the switches is on."""
    return debug_nans.value or debug_infs.value


def find_special_value(tree: Any) -> str:
    """The first NaN or infinity that is looked for in our arrays of a tree, in words; empty where there is none."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(x, Array) and jax.numpy.issubdtype(x.dtype, np.inexact):
            values = x.numpy()
            for name, switch, has in (("nan", debug_nans, np.isnan), ("inf", debug_infs, np.isinf)):
                if switch.value and has(values).any():
                    return f"{name} in result{jax.tree_util.keystr(path)}, {x.type},"
    return ""


def call_and_look(
    call: Callable[..., Any], again: Callable[..., Any], args: tuple, kwargs: dict[str, Any], name: str
) -> Any:
    """The results of `call`. Where one has a special value, raises the FloatingPointError of JAX at what made it.

    again: the function one operation after another through JAX, which looks at each result itself.
    """
    with jax.debug_nans(False), jax.debug_infs(False):
        kept = jax.tree.map(copied, (args, kwargs))  # before the call: some may be donated
        results = call(*args, **kwargs)
    found = find_special_value(results)
    if not found:
        return results
    try:
        again(*kept[0], **kept[1])
    except FloatingPointError as error:
        error.add_note(f"vk_kernels.jit: {found} of {name}, called again operation by operation")
        raise
    raise FloatingPointError(f"{found} of {name} on Vulkan, but not operation by operation through JAX")
