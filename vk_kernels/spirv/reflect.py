"""Reflection: reads out of SPIR-V what a compute shader needs from its host.

Source: the SPIR-V specification 1.6 (binary form, section 2.3; instructions, section 3).
"""

import operator
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vk_kernels.spirv.spec import COMPUTE_MODEL, MAGIC, Capability, Decoration, ExecutionMode, Op, StorageClass

_TYPES = range(19, 40)  # OpTypeVoid ... OpTypeForwardPointer
# The arithmetic that OpSpecConstantOp may hold and array lengths use.
_SPEC_OPERATIONS = {
    113: lambda a: a,  # OpUConvert
    114: lambda a: a,  # OpSConvert
    124: lambda a: a,  # OpBitcast
    128: operator.add,
    130: operator.sub,
    132: operator.mul,
    134: operator.floordiv,  # OpUDiv
    137: operator.mod,  # OpUMod
    169: lambda condition, a, b: a if condition else b,  # OpSelect
    170: operator.eq,
    171: operator.ne,
    172: operator.gt,  # OpUGreaterThan
    174: operator.ge,
    176: operator.lt,
    178: operator.le,
    194: operator.rshift,
    196: operator.lshift,
    197: operator.or_,
    198: operator.xor,
    199: operator.and_,
}


@dataclass(frozen=True)
class SpecConstant:
    id: int
    name: str
    type: str  # uint32, int32, float32, bool, ...
    default: int | float | bool


@dataclass(frozen=True)
class Binding:
    """A storage buffer. `types`: the scalars that the kernel reads and writes it as; bf16 may be uint16."""

    binding: int
    name: str
    writable: bool
    types: tuple[str, ...]


@dataclass(frozen=True)
class PushConstant:
    """A scalar, or `count` of them in an array, `offset` bytes from the first. A struct's are named `struct.member`."""

    name: str
    type: str  # as of a SpecConstant
    offset: int
    count: int


@dataclass(frozen=True)
class Reflection:
    """One compute entry point. `workgroup` holds a number, or the name of a specialization constant, per axis."""

    entry: str
    spirv_version: str
    workgroup: tuple[int | str, ...]
    spec_constants: tuple[SpecConstant, ...]
    bindings: tuple[Binding, ...]
    push_constants: tuple[PushConstant, ...]
    push_constant_bytes: int
    shared_bytes: int
    capabilities: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Reflection":
        return cls(
            **{name: record[name] for name in ("entry", "spirv_version", "push_constant_bytes", "shared_bytes")},
            workgroup=tuple(record["workgroup"]),
            spec_constants=tuple(SpecConstant(**constant) for constant in record["spec_constants"]),
            bindings=tuple(Binding(**{**binding, "types": tuple(binding["types"])}) for binding in record["bindings"]),
            push_constants=tuple(PushConstant(**constant) for constant in record["push_constants"]),
            capabilities=tuple(record["capabilities"]),
        )

    @property
    def local_size_id(self) -> bool:
        """Whether the workgroup size depends on specialization constants (needs the feature maintenance4)."""
        return any(isinstance(size, str) for size in self.workgroup)


class _Declarations:
    """The declarations of a module, by result id."""

    def __init__(self, code: bytes, spec: dict[str, int | float | bool]):
        words = struct.unpack(f"<{len(code) // 4}I", code[: len(code) // 4 * 4])
        if len(words) < 5 or words[0] != MAGIC:
            raise ValueError("not SPIR-V: the first word is not the magic number")
        self.version = f"{words[1] >> 16 & 0xFF}.{words[1] >> 8 & 0xFF}"
        self.names: dict[int, str] = {}
        self.member_names: dict[tuple[int, int], str] = {}
        self.decorations: dict[int, dict[int, int]] = {}
        self.member_decorations: dict[int, dict[int, dict[int, int]]] = {}
        self.types: dict[int, tuple] = {}
        self.constants: dict[int, Any] = {}
        self.spec_constants: dict[int, SpecConstant] = {}
        self.variables: list[tuple[int, int, int]] = []  # (id, pointer type, storage class)
        self.entry_points: dict[int, str] = {}
        self.local_sizes: dict[int, tuple[bool, tuple[int, ...]]] = {}
        self.capabilities: set[int] = set()
        self._spec = spec
        position = 5
        while position < len(words):
            count, opcode = words[position] >> 16, words[position] & 0xFFFF
            if count == 0:
                raise ValueError(f"not SPIR-V: an instruction of no words at word {position}")
            if opcode == Op.FUNCTION:
                break  # every declaration stands before the first function
            self._read(opcode, words[position + 1 : position + count])
            position += count

    def _read(self, opcode: int, operands: tuple[int, ...]) -> None:
        match opcode:
            case Op.CAPABILITY:
                self.capabilities.add(operands[0])
            case Op.NAME:
                self.names[operands[0]] = _string(operands[1:])
            case Op.MEMBER_NAME:
                self.member_names[operands[0], operands[1]] = _string(operands[2:])
            case Op.ENTRY_POINT:
                if operands[0] == COMPUTE_MODEL:
                    self.entry_points[operands[1]] = _string(operands[2:])
            case Op.EXECUTION_MODE | Op.EXECUTION_MODE_ID:
                if operands[1] in (ExecutionMode.LOCAL_SIZE, ExecutionMode.LOCAL_SIZE_ID):
                    self.local_sizes[operands[0]] = (operands[1] == ExecutionMode.LOCAL_SIZE_ID, operands[2:5])
            case Op.DECORATE:
                self.decorations.setdefault(operands[0], {})[operands[1]] = operands[2] if len(operands) > 2 else 1
            case Op.MEMBER_DECORATE:
                members = self.member_decorations.setdefault(operands[0], {})
                members.setdefault(operands[1], {})[operands[2]] = operands[3] if len(operands) > 3 else 1
            case _ if opcode in _TYPES:
                self.types[operands[0]] = (opcode, *operands[1:])
            case Op.CONSTANT_TRUE | Op.CONSTANT_FALSE:
                self.constants[operands[1]] = opcode == Op.CONSTANT_TRUE
            case Op.CONSTANT:
                self.constants[operands[1]] = self._literal(operands[0], operands[2:])
            case Op.SPEC_CONSTANT_TRUE | Op.SPEC_CONSTANT_FALSE:
                self._spec_constant(operands[1], operands[0], opcode == Op.SPEC_CONSTANT_TRUE)
            case Op.SPEC_CONSTANT:
                self._spec_constant(operands[1], operands[0], self._literal(operands[0], operands[2:]))
            case Op.SPEC_CONSTANT_OP:
                arguments = [self.constants.get(operand) for operand in operands[3:]]
                operation = _SPEC_OPERATIONS.get(operands[2])
                if operation is not None and None not in arguments:
                    self.constants[operands[1]] = operation(*arguments)
            case Op.VARIABLE:
                self.variables.append((operands[1], operands[0], operands[2]))

    def _spec_constant(self, result: int, type_id: int, default) -> None:
        spec_id = self.decorations[result][Decoration.SPEC_ID]
        constant = SpecConstant(spec_id, self.names.get(result, f"spec{spec_id}"), self._type_name(type_id), default)
        self.spec_constants[result] = constant
        self.constants[result] = self._spec.get(constant.name, default)

    def _type_name(self, type_id: int) -> str:
        opcode, *rest = self.types[type_id]
        if opcode == Op.TYPE_BOOL:
            return "bool"
        if opcode == Op.TYPE_INT:  # width, signedness
            return f"{'int' if rest[1] else 'uint'}{rest[0]}"
        if opcode == Op.TYPE_STRUCT:
            return "struct"
        return "bfloat16" if len(rest) > 1 else f"float{rest[0]}"  # width, and an encoding that is not IEEE's

    def element(self, pointer: int) -> tuple[str, bool]:
        """(scalar type, whether in vectors) of the runtime array that is all of a storage buffer."""
        _, array = self.types[self.pointee(pointer)]
        _, element = self.types[array]
        opcode, *rest = self.types[element]
        return (self._type_name(rest[0]), True) if opcode == Op.TYPE_VECTOR else (self._type_name(element), False)

    def members(self, struct_type: int, prefix: str = "", base: int = 0) -> Iterator[PushConstant]:
        """The scalars of a struct and of the structs in it."""
        for i, member in enumerate(self.types[struct_type][1:]):
            name = prefix + self.member_names.get((struct_type, i), f"member{i}")
            offset = base + self.member_decorations[struct_type][i][Decoration.OFFSET]
            count, (opcode, *rest) = 1, self.types[member]
            if opcode == Op.TYPE_STRUCT:
                yield from self.members(member, f"{name}.", offset)
                continue
            if opcode == Op.TYPE_ARRAY:
                member, count = rest[0], self.constants[rest[1]]
                name = name.removesuffix(".data")  # Slang wraps an array in a struct of one member
            elif opcode == Op.TYPE_VECTOR:
                member, count = rest
            yield PushConstant(name, self._type_name(member), offset, count)

    def _literal(self, type_id: int, words: tuple[int, ...]):
        data = struct.pack(f"<{len(words)}I", *words)
        opcode, width, *rest = self.types[type_id]
        if opcode == Op.TYPE_INT:
            return int.from_bytes(data[: max(width // 8, 1)], "little", signed=bool(rest[0]))
        return struct.unpack({16: "<e", 32: "<f", 64: "<d"}[width], data[: width // 8])[0]

    def size(self, type_id: int, strided: bool = True) -> int:
        """Bytes of a type: by its offsets and strides, or (not `strided`: shared memory) packed."""
        opcode, *rest = self.types[type_id]
        match opcode:
            case Op.TYPE_BOOL:
                return 4
            case Op.TYPE_INT | Op.TYPE_FLOAT:
                return rest[0] // 8
            case Op.TYPE_VECTOR | Op.TYPE_MATRIX:
                return rest[1] * self.size(rest[0], strided)
            case Op.TYPE_ARRAY:
                stride = self.decorations.get(type_id, {}).get(Decoration.ARRAY_STRIDE) if strided else None
                return self.constants[rest[1]] * (stride or self.size(rest[0], strided))
            case Op.TYPE_STRUCT:
                if not strided:
                    return sum(self.size(member, strided) for member in rest)
                offsets = self.member_decorations.get(type_id, {})
                return max((offsets[i][Decoration.OFFSET] + self.size(m) for i, m in enumerate(rest)), default=0)
            case Op.TYPE_POINTER:
                return 8
        raise ValueError(f"no size is known for SPIR-V type opcode {opcode}")

    def pointee(self, pointer_type: int) -> int:
        return self.types[pointer_type][2]


def reflect(code: bytes, entry: str | None = None, spec: dict[str, int | float | bool] | None = None) -> Reflection:
    """Reads the compute entry point of `code`; `spec` sets specialization constants by name.

    Raises ValueError for what the runtime cannot serve: another descriptor than a storage buffer in set 0, a
    capability that no known feature allows, or not exactly one entry point (called `entry`, if given).
    """
    module = _Declarations(code, spec or {})
    points = {name: result for result, name in module.entry_points.items() if entry in (None, name)}
    if len(points) != 1:
        raise ValueError(f"{len(points)} compute entry points{f' called {entry!r}' if entry else ''}, not 1")
    ((name, point),) = points.items()

    unknown = sorted(c for c in module.capabilities if c not in set(Capability))
    if unknown:
        raise ValueError(
            f"{name}: unknown SPIR-V capabilities {unknown}; add them to vk_kernels/spirv/reflect.py and features.py"
        )

    views: dict[int, list[tuple[int, int]]] = {}  # by binding: (variable, pointer type) of each
    push_constants, push_constant_bytes, shared_bytes = (), 0, 0
    for variable, pointer, storage_class in module.variables:
        if storage_class == StorageClass.STORAGE_BUFFER:
            views.setdefault(module.decorations[variable][Decoration.BINDING], []).append((variable, pointer))
        elif storage_class == StorageClass.PUSH_CONSTANT:
            push_constants = tuple(module.members(module.pointee(pointer)))
            push_constant_bytes = (module.size(module.pointee(pointer)) + 3) // 4 * 4
        elif storage_class == StorageClass.WORKGROUP:
            shared_bytes += module.size(module.pointee(pointer), strided=False)
        elif storage_class in (StorageClass.UNIFORM, StorageClass.UNIFORM_CONSTANT):
            raise ValueError(f"{name}: {module.names.get(variable)!r} is no storage buffer; kernels take nothing else")
    by_id, sizes = module.local_sizes[point]
    workgroup = tuple(_axis(module, size) if by_id else size for size in sizes)
    return Reflection(
        entry=name,
        spirv_version=module.version,
        workgroup=workgroup,
        spec_constants=tuple(sorted(module.spec_constants.values(), key=lambda constant: constant.id)),
        bindings=tuple(_binding(module, binding, views[binding], name) for binding in sorted(views)),
        push_constants=push_constants,
        push_constant_bytes=push_constant_bytes,
        shared_bytes=shared_bytes,
        capabilities=tuple(sorted(Capability(c).name for c in module.capabilities)),
    )


def _binding(module: _Declarations, binding: int, views: list[tuple[int, int]], entry: str) -> Binding:
    """The buffer that is bound there; Slang declares one that is read in several types once for each."""
    name = module.names.get(views[0][0], "").removeprefix("entryPointParams.")
    writable = False
    for variable, pointer in views:
        decorations = module.decorations[variable]
        if decorations[Decoration.DESCRIPTOR_SET] != 0:
            raise ValueError(
                f"{entry}: buffer {name!r} is in descriptor set {decorations[Decoration.DESCRIPTOR_SET]}; use set 0"
            )
        members = module.member_decorations.get(module.pointee(pointer), {})
        read_only = Decoration.NON_WRITABLE in decorations or (
            members and all(Decoration.NON_WRITABLE in m for m in members.values())
        )
        writable |= not read_only
    elements = [module.element(pointer) for _, pointer in views]
    scalars = {kind for kind, is_vector in elements if not is_vector}  # vectors only say how much is read at a time
    return Binding(binding, name, writable, tuple(sorted(scalars or {kind for kind, _ in elements})))


def _axis(module: _Declarations, size_id: int) -> int | str:
    constant = module.spec_constants.get(size_id)
    return constant.name if constant else module.constants[size_id]


def _string(words: tuple[int, ...]) -> str:
    return struct.pack(f"<{len(words)}I", *words).split(b"\0", 1)[0].decode()
