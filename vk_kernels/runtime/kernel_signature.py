"""What a kernel binds, by name: its buffers and push constants as the manifest lists them.

Planners name both in snake_case (the shader's `dOut` is `d_out`), so that one that is missing, unknown, or of another
type is an error, and not a wrong number.
"""

import functools
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vk_kernels.runtime.kernel import PACKING, binary_name, reflection_of
from vk_kernels.spirv.reflect import Binding, PushConstant, Reflection

# The scalars that a kernel may read an array as, by the array's dtype; ids, say, are told apart by value alone.
_READ_AS = {"bfloat16": {"bfloat16", "uint16"}, "int32": {"int32", "uint32"}, "uint32": {"int32", "uint32"}}
_BUFFERS, _CONSTANTS = "buffer", "push constant"


@dataclass(frozen=True)
class KernelSignature:
    """The buffers of a kernel in the order of their bindings, and the layout of its push constants.

    All errors are TypeErrors that name the kernel and what is wrong with which argument.
    """

    kernel: str
    buffers: dict[str, Binding]
    constants: dict[str, PushConstant]
    constant_bytes: int

    @classmethod
    def of(cls, kernel: str, reflection: Reflection) -> "KernelSignature":
        return cls(
            kernel,
            {snake_case(binding.name): binding for binding in reflection.bindings},
            {snake_case(constant.name): constant for constant in reflection.push_constants},
            reflection.push_constant_bytes,
        )

    def operands(self, buffers: Mapping[str, int | None]) -> tuple[int, ...]:
        """The operands in the order of the bindings.

        A buffer that the kernel, so specialized, does not use is None; it must be bound all the same, and is to the
        first one, or to the first that is written if it would be, too. So are numbers that no buffer has.
        """
        self._check_names(_BUFFERS, buffers, self.buffers)
        given = [(binding, buffers[name]) for name, binding in self.buffers.items()]
        used = {binding.binding: operand for binding, operand in given if operand is not None}
        if not used:
            raise TypeError(f"kernel {self.kernel}: no buffer is given")
        first = used[min(used)]
        written = next((used[b.binding] for b, operand in given if b.writable and operand is not None), first)
        for binding, operand in given:
            if operand is None:
                used[binding.binding] = written if binding.writable else first
        return tuple(used.get(i, first) for i in range(max(used) + 1))

    def pack(self, constants: Mapping[str, Any]) -> bytes:
        """The bytes of the push constants; a struct's are a mapping or a NamedTuple, an array's a sequence."""
        values = dict(_flat(constants))
        self._check_names(_CONSTANTS, values, self.constants)
        packed = bytearray(self.constant_bytes)
        for name, constant in self.constants.items():
            value = values[name]
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if len(numbers) != constant.count:
                raise TypeError(f"{self._of(_CONSTANTS, name)} holds {constant.count} numbers, found {len(numbers)}")
            try:
                struct.pack_into(f"<{constant.count}{PACKING[constant.type]}", packed, constant.offset, *numbers)
            except (struct.error, OverflowError):
                raise TypeError(f"{self._of(_CONSTANTS, name)} is {constant.type}, found {value!r}") from None
        return bytes(packed)

    def check_operand(self, operand: int, operands: Sequence[int], dtype: np.dtype, is_input: bool) -> None:
        """Checks an array of the plan against the bindings that it has among `operands`.

        It must fit one of them: it stands for what is not used in the others.
        """
        bound = {name: b for name, b in self.buffers.items() if operands[b.binding] == operand}
        for name, binding in bound.items():
            if binding.writable and is_input:
                raise TypeError(f"{self._of(_BUFFERS, name)} is written, and bound to an input of the plan")
        if bound and not any(_fits(dtype, binding.types) for binding in bound.values()):
            name, binding = next(iter(bound.items()))
            raise TypeError(f"{self._of(_BUFFERS, name)} holds {' or '.join(binding.types)}, found {dtype.name}")

    def _check_names(self, what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for problem, names in (
            (f"has no {what}", given.keys() - wanted.keys()),
            (f"is not given {what}", wanted.keys() - given.keys()),
        ):
            if names:
                takes = ", ".join(wanted) or "none"
                raise TypeError(f"kernel {self.kernel} {problem} {', '.join(sorted(names))}; it takes {takes}")

    def _of(self, what: str, name: str) -> str:
        return f"kernel {self.kernel}: {what} {name}"


@functools.cache
def signature(kernel: str, variant: str = "") -> KernelSignature:
    """The signature of a kernel that ships. Raises ValueError for one that does not."""
    return KernelSignature.of(binary_name(kernel, variant), reflection_of(kernel, variant))


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def _flat(constants: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The constants by dotted name."""
    for name, value in (constants._asdict() if hasattr(constants, "_asdict") else constants).items():
        if isinstance(value, Mapping) or hasattr(value, "_asdict"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _fits(dtype: np.dtype, types: Sequence[str]) -> bool:
    if not _READ_AS.get(dtype.name, {dtype.name}).isdisjoint(types):
        return True
    return dtype.itemsize == 4 and "uint32" in types and len(types) > 1  # raw words
