"""A function on its way to the device, as in `jax.stages`: lowered for arguments of given types, then compiled.

lowered = vk_kernels.jit(fn).lower(x)  # x may be a jax.ShapeDtypeStruct
print(lowered.as_text(), lowered.cost())
y = lowered.compile()(x)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from vk_kernels.bridge.profile import Cost
from vk_kernels.compiler.ir import Graph
from vk_kernels.runtime.array import ArrayType
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.program import Program

if TYPE_CHECKING:
    from vk_kernels.bridge.jit import Compiled


class Lowered:
    """A function for arguments of given types. It is not called itself: `compile` gives what is."""

    def __init__(self, compiled: "Compiled"):
        self._compiled = compiled

    def compile(self) -> "Compiled":
        return self._compiled

    def as_text(self) -> str:
        """The program: every dispatch with what it reads and writes, and where a barrier is."""
        return self._compiled.as_text()

    def cost(self) -> Cost:
        return self._compiled.cost()

    @property
    def device(self) -> Device:
        return self._compiled.device

    @property
    def graph(self) -> Graph:
        return self._compiled.graph

    @property
    def program(self) -> Program:
        return self._compiled.program

    @property
    def donated(self) -> list[int]:
        """The numbers of the arguments' leaves that are donated."""
        return self._compiled.donated

    @property
    def in_tree(self) -> Any:
        """The structure of (args, kwargs), without static arguments."""
        return self._compiled.in_tree

    @property
    def out_tree(self) -> Any:
        return self._compiled.out_tree


def check_arguments(tree: Any, types: Sequence[ArrayType], given: Any, given_types: Sequence[ArrayType]) -> None:
    """Raises TypeError, in one line, for arguments of another structure or of other types than those compiled for.

    tree, given: of (args, kwargs), the structure and the arguments.
    """
    paths, found = jax.tree_util.tree_flatten_with_path(given)
    if found != tree:
        raise TypeError(
            f"compiled for arguments of the structure {tree}, called with {found}; static arguments are left out"
        )
    for (path, _), wanted, kind in zip(paths, types, given_types, strict=True):
        if (kind.shape, kind.dtype) != (wanted.shape, wanted.dtype):
            place, rest = path[:2], path[2:]
            keyword = getattr(place[1], "key", None)
            name = f"args[{place[1].idx}]" if keyword is None else str(keyword)
            raise TypeError(
                f"compiled with {name}{jax.tree_util.keystr(rest)} of {_text(wanted)}, called with {_text(kind)}: "
                "lower it for that, or call the function of vk_kernels.jit, which does"
            )


def _text(kind: ArrayType) -> str:
    return f"{kind.dtype}[{','.join(map(str, kind.shape))}]"
