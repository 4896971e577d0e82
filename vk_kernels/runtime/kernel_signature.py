"""Signature of a kernel: its buffers and push constants, by name, as the manifest lists them.

Planners name both in snake_case (the shader's `dOut` is `d_out`), so that one that is missing, unknown, or of another
type is an error, and not a wrong number.
"""

import functools
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from vk_kernels.runtime.kernel import PACKING, binary_name, reflection_of
from vk_kernels.spirv.reflect import Reflection

# The scalars that a kernel may read an array as, by the array's dtype; ids, say, are told apart by value alone.
_READ_AS = {"bfloat16": {"bfloat16", "uint16"}, "int32": {"int32", "uint32"}, "uint32": {"int32", "uint32"}}
_BUFFERS, _CONSTANTS = "buffer", "push constant"


class KernelSignature:
    """The buffers of a kernel in the order of their bindings, and the layout of its push constants.

    All errors are TypeErrors that name the kernel and what is wrong with which argument.
    """

    def __init__(self, kernel: str, reflection: Reflection):
        self.kernel = kernel
        self.buffers = {snake_case(binding.name): binding for binding in reflection.bindings}
        self.constants = {snake_case(constant.name): constant for constant in reflection.push_constants}
        self._binding_count = max((binding.binding for binding in reflection.bindings), default=-1) + 1
        self._structs = {name.split(".")[0] for name in self.constants if "." in name}
        self._layout = struct.Struct("<" + "".join(f"{c.count}{PACKING[c.type]}" for c in self.constants.values()))
        if self._layout.size != reflection.push_constant_bytes:
            raise ValueError(f"kernel {kernel} leaves gaps among its push constants")

    def operands(self, buffers: Mapping[str, int | None]) -> tuple[int, ...]:
        """The operands in the order of the bindings.

        A buffer that the kernel, so specialized, does not use is None; it must be bound all the same, and is to the
        first one, or to the first that is written if it would be, too. So are numbers that no buffer has.
        """
        if buffers.keys() != self.buffers.keys():
            self._refuse_names(_BUFFERS, buffers, self.buffers)
        bound: list[int | None] = [None] * self._binding_count
        for name, binding in self.buffers.items():
            bound[binding.binding] = buffers[name]
        if None not in bound:
            return tuple(bound)
        first = next((operand for operand in bound if operand is not None), None)
        if first is None:
            raise TypeError(f"kernel {self.kernel}: no buffer is given")
        writable = [binding.binding for binding in self.buffers.values() if binding.writable]
        written = next((bound[i] for i in writable if bound[i] is not None), first)
        return tuple(
            operand if operand is not None else written if i in writable else first for i, operand in enumerate(bound)
        )

    def pack(self, constants: Mapping[str, Any]) -> bytes:
        """The bytes of the push constants; a struct's are a mapping or a NamedTuple, an array's a sequence."""
        given = self._flat(constants)
        if given.keys() != self.constants.keys():
            self._refuse_names(_CONSTANTS, given, self.constants)
        numbers: list[Any] = []
        for name, constant in self.constants.items():
            own = _numbers(given[name])
            if len(own) != constant.count:
                raise TypeError(f"{self._of(_CONSTANTS, name)} holds {constant.count} numbers, found {len(own)}")
            numbers += own
        try:
            return self._layout.pack(*numbers)
        except (struct.error, OverflowError):
            self._refuse_numbers(given)
            raise

    def check_operands(self, operands: Sequence[int], dtypes: Sequence[np.dtype], inputs: int) -> None:
        """Checks the arrays of a plan, of which the first are `inputs`, against the buffers that they are bound to.

        An array must fit one of its buffers: it stands for what is not used in the others.
        """
        fits: dict[int, bool] = {}
        for name, binding in self.buffers.items():
            operand = operands[binding.binding]
            if operand >= len(dtypes):
                continue  # scratch, of which no dtype is known
            if binding.writable and operand < inputs:
                raise TypeError(f"{self._of(_BUFFERS, name)} is written, and bound to an input of the plan")
            fits[operand] = fits.get(operand, False) or _fits(dtypes[operand], binding.types)
        for name, binding in self.buffers.items():
            operand = operands[binding.binding]
            if not fits.get(operand, True):
                holds, found = " or ".join(binding.types), dtypes[operand].name
                raise TypeError(f"{self._of(_BUFFERS, name)} holds {holds}, found {found}")

    def _flat(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """The constants by dotted name."""
        flat = {}
        for name, value in constants.items():
            if name in self._structs:
                members = value._asdict() if hasattr(value, "_asdict") else value
                flat |= {f"{name}.{member}": number for member, number in members.items()}
            else:
                flat[name] = value
        return flat

    def _refuse_names(self, what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> NoReturn:
        unknown = sorted(given.keys() - wanted.keys())
        missing = sorted(wanted.keys() - given.keys())
        problem = f"has no {what} {', '.join(unknown)}" if unknown else f"is not given {what} {', '.join(missing)}"
        raise TypeError(f"kernel {self.kernel} {problem}; it takes {', '.join(wanted) or 'none'}")

    def _refuse_numbers(self, given: Mapping[str, Any]) -> None:
        """Raises for the first constant whose numbers are not of its type."""
        for name, constant in self.constants.items():
            try:
                struct.pack(f"<{constant.count}{PACKING[constant.type]}", *_numbers(given[name]))
            except (struct.error, OverflowError):
                raise TypeError(f"{self._of(_CONSTANTS, name)} is {constant.type}, found {given[name]!r}") from None

    def _of(self, what: str, name: str) -> str:
        return f"kernel {self.kernel}: {what} {name}"


@functools.cache
def signature(kernel: str, variant: str = "") -> KernelSignature:
    """The signature of a kernel that ships. Raises ValueError for one that does not."""
    return KernelSignature(binary_name(kernel, variant), reflection_of(kernel, variant))


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def _numbers(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


@functools.lru_cache(maxsize=1024)
def _fits(dtype: np.dtype, types: tuple[str, ...]) -> bool:
    if not _READ_AS.get(dtype.name, {dtype.name}).isdisjoint(types):
        return True
    return dtype.itemsize == 4 and "uint32" in types and len(types) > 1  # raw words
