"""A small SPIR-V assembler for compute kernels: one entry point, storage buffers, structured control flow.

It knows nothing of JAX. Values are result ids. Integers of every width are one 32-bit unsigned type in registers:
SPIR-V has signed and unsigned instructions, so that one type does for both. A pure instruction that was written
already, in a block that dominates this one, is not written again; one that nothing uses is dropped in the end.

Source: the SPIR-V specification 1.6 and GLSL.std.450. Modules are SPIR-V 1.5 (Vulkan 1.2).
"""

import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from vk_kernels.spirv.spec import (
    MAGIC,
    WORKGROUP_SCOPE,
    WORKGROUP_SEMANTICS,
    BuiltIn,
    Capability,
    Decoration,
    Ext,
    Op,
    StorageClass,
)

_VERSION = 0x00010500

Id = int
# A piece of code that may ask its driver for values, and returns ids.
Code = Generator[Any, Any, Any]


_COMPARISONS = {op for op in Op if 164 <= op <= 190 and op != Op.SELECT}
_FLOAT_COMPARISONS = {op for op in _COMPARISONS if op >= Op.F_EQUAL}
_FLOATS = {Op.S_TO_F, Op.U_TO_F, Op.F_NEGATE, Op.F_ADD, Op.F_SUB, Op.F_MUL, Op.F_DIV}
_EXACT = {Op.F_ADD, Op.F_SUB, Op.F_MUL}  # never contracted: the same bits whatever the driver's compiler does
_ALGEBRA = _EXACT | {Op.F_DIV}  # which a driver's compiler may do by algebra where it knows an operand: see `hidden`
_EXT_FLOATS = {Ext.ROUND_EVEN, Ext.TRUNC, Ext.F_ABS, Ext.FLOOR, Ext.CEIL, Ext.SQRT, Ext.INVERSE_SQRT, Ext.FMA}
_COMMUTATIVE = {Op.I_ADD, Op.I_MUL, Op.F_ADD, Op.F_MUL, Op.OR, Op.XOR, Op.AND, Op.I_EQUAL, Op.I_NOT_EQUAL}
_FOLDED: dict[Op, Callable[[int, int], int]] = {
    Op.I_ADD: lambda a, b: a + b,
    Op.I_SUB: lambda a, b: a - b,
    Op.I_MUL: lambda a, b: a * b,
    Op.U_DIV: lambda a, b: a // b,
    Op.U_MOD: lambda a, b: a % b,
}

_INTEGER_TO_FLOAT = {Op.S_TO_F: lambda a: a - (a >> 31 << 32), Op.U_TO_F: lambda a: a}
_TESTED: dict[Op, Callable[[int, int], bool]] = {
    Op.I_EQUAL: lambda a, b: a == b,
    Op.I_NOT_EQUAL: lambda a, b: a != b,
    Op.U_LESS: lambda a, b: a < b,
    Op.U_LESS_EQUAL: lambda a, b: a <= b,
}


class Module:
    """One kernel in the making. Instructions go to the end of the current block."""

    def __init__(self, workgroup: int):
        """`workgroup`: threads of a workgroup, in one dimension."""
        self._workgroup = workgroup
        self._next = 1
        self._capabilities = {"Shader"}
        self._declared: dict[tuple, Id] = {}
        self._decorations: list[list[int]] = []
        self._declarations: list[list[int]] = []
        self._interface: list[Id] = []
        self._body: list[list[int]] = []
        self._results: dict[int, int] = {}  # position in the body of a pure instruction -> its result id
        self._scopes: list[dict] = [{}]
        self._types: dict[Id, Id] = {}
        self._constants: dict[Id, int] = {}  # 32-bit integers
        self._reals: dict[Id, int] = {}  # the bits of floats
        self._computable: set[Id] = set()  # what a compiler can compute: constants, and what is made of them alone
        self._glsl = self._new()
        self._function = self._new()
        self.bool = self._declare(Op.TYPE_BOOL)
        self.u32 = self._declare(Op.TYPE_INT, 32, 0)
        self.f32 = self._declare(Op.TYPE_FLOAT, 32)
        self._void = self._declare(Op.TYPE_VOID)
        self._function_type = self._declare(Op.TYPE_FUNCTION, self._void)
        vector = self._declare(Op.TYPE_VECTOR, self.u32, 3)
        workgroup_id = self._built_in(vector, BuiltIn.WORKGROUP_ID)
        local_index = self._built_in(self.u32, BuiltIn.LOCAL_INVOCATION_INDEX)
        self._label(self._new())
        group = self._pure(Op.LOAD, vector, workgroup_id)
        self.group_x = self._pure(Op.COMPOSITE_EXTRACT, self.u32, group, 0)
        self.group_y = self._pure(Op.COMPOSITE_EXTRACT, self.u32, group, 1)
        self._zero = self._pure(Op.COMPOSITE_EXTRACT, self.u32, group, 2)  # 0 in every dispatch: see `hidden`
        self.thread = self._pure(Op.LOAD, self.u32, local_index)

    # Declarations.

    def _new(self) -> Id:
        self._next += 1
        return self._next - 1

    def _declare(self, op: Op, *operands: int) -> Id:
        """A type, once for the same operands."""
        key = (op, *operands)
        if key not in self._declared:
            self._declared[key] = self._new()
            self._declarations.append(_words(op, self._declared[key], *operands))
        return self._declared[key]

    def _variable(self, pointer: Id, storage: int) -> Id:
        result = self._new()
        self._declarations.append(_words(Op.VARIABLE, pointer, result, storage))
        self._interface.append(result)
        return result

    def _decorate(self, target: Id, *decoration: int) -> None:
        self._decorations.append(_words(Op.DECORATE, target, *decoration))

    def _built_in(self, type: Id, number: int) -> Id:
        result = self._variable(self._declare(Op.TYPE_POINTER, StorageClass.INPUT, type), StorageClass.INPUT)
        self._decorate(result, Decoration.BUILT_IN, number)
        return result

    def buffer(self, binding: int, bits: int, writable: bool) -> "StorageBuffer":
        """A storage buffer of unsigned integers of 8, 16 or 32 bits."""
        if bits < 32:
            # A type that no arithmetic uses needs no other capability.
            self._capabilities.add(f"StorageBuffer{bits}BitAccess")
        element = self._declare(Op.TYPE_INT, bits, 0)
        if ("block", bits, writable) not in self._declared:
            array = self._new()
            self._declarations.append(_words(Op.TYPE_RUNTIME_ARRAY, array, element))
            self._decorate(array, Decoration.ARRAY_STRIDE, bits // 8)
            block = self._new()
            self._declarations.append(_words(Op.TYPE_STRUCT, block, array))
            self._decorate(block, Decoration.BLOCK)
            self._decorations.append(_words(Op.MEMBER_DECORATE, block, 0, Decoration.OFFSET, 0))
            self._declared["block", bits, writable] = block
        pointer = self._declare(Op.TYPE_POINTER, StorageClass.STORAGE_BUFFER, self._declared["block", bits, writable])
        variable = self._variable(pointer, StorageClass.STORAGE_BUFFER)
        self._decorate(variable, Decoration.DESCRIPTOR_SET, 0)
        self._decorate(variable, Decoration.BINDING, binding)
        if not writable:
            self._decorate(variable, Decoration.NON_WRITABLE)
        return StorageBuffer(self, variable, element, bits)

    def shared(self, words: int) -> "Shared":
        """An array of 32-bit words that a workgroup shares."""
        array = self._declare(Op.TYPE_ARRAY, self.u32, self.constant(words))
        variable = self._variable(self._declare(Op.TYPE_POINTER, StorageClass.WORKGROUP, array), StorageClass.WORKGROUP)
        return Shared(self, variable)

    def constant(self, value: int) -> Id:
        """A 32-bit integer; a negative one in two's complement."""
        result = self._constant(self.u32, value & 0xFFFFFFFF)
        self._constants[result] = value & 0xFFFFFFFF
        return result

    def real(self, value: float) -> Id:
        """A float; rounded to 32 bits."""
        with_overflow = value if abs(value) < 3.5e38 or value != value else (1 if value > 0 else -1) * float("inf")
        return self._real(struct.unpack("<I", struct.pack("<f", with_overflow))[0])

    def _real(self, word: int) -> Id:
        result = self._constant(self.f32, word)
        self._reals[result] = word
        return result

    def boolean(self, value: bool) -> Id:
        op = Op.CONSTANT_TRUE if value else Op.CONSTANT_FALSE
        return self._constant(self.bool, None, op)

    def _constant(self, type: Id, word: int | None, op: Op = Op.CONSTANT) -> Id:
        key = (op, type, word)
        if key not in self._declared:
            self._declared[key] = result = self._new()
            self._declarations.append(_words(op, type, result, *(() if word is None else (word,))))
            self._types[result] = type
            self._computable.add(result)
        return self._declared[key]

    def known(self, value: Id) -> int | None:
        """The integer that a constant is; None for what is not one."""
        return self._constants.get(value)

    def known_real(self, value: Id) -> float | None:
        """The float that a constant is; None for what is not one."""
        word = self._reals.get(value)
        return None if word is None else struct.unpack("<f", struct.pack("<I", word))[0]

    def hidden(self, value: Id) -> Id:
        """A float that no compiler knows, though it may be made of constants alone.

        Drivers do algebra with what they know: x * 0, 0 / x and x / inf become 0, 0 - x becomes -x, x - x becomes 0,
        and a division by a literal 0 is dropped with the store of its result (lavapipe). Vulkan lets them, as NaN,
        infinities and the signs of zeros count for nothing there; SignedZeroInfNanPreserve, where a device has it,
        mends the products alone. A specialization constant is known when the pipeline is compiled. But that the z of
        every workgroup is 0 only our dispatches say: the bits XOR z take an instruction, 0 itself takes none, and the
        arithmetic is that of IEEE 754. To what is computed z is added: there may be such a z in it, as in -0 made of a
        hidden 0, and z XOR z would be known again.
        """
        word = self._reals.get(value)
        if word == 0:
            return self.from_bits(self._zero)
        if word is None:
            return self.from_bits(self._pure(Op.I_ADD, self.u32, self.bits(value), self._zero))
        return self.from_bits(self._pure(Op.XOR, self.u32, self.constant(word), self._zero))

    def opaque(self, word: int) -> Id:
        """The float of these bits, hidden where a compiler could do algebra with it."""
        return self._uncertain(self._real(word))

    # Memory of the generator: what was computed in blocks that dominate the current one.

    def recall(self, key: Any) -> Any:
        for scope in reversed(self._scopes):
            if key in scope:
                return scope[key]
        return None

    def remember(self, key: Any, value: Any) -> Any:
        self._scopes[-1][key] = value
        return value

    @contextmanager
    def scope(self):
        self._scopes.append({})
        yield
        self._scopes.pop()

    # Instructions.

    def _pure(self, op: Op, type: Id, *operands: int) -> Id:
        key = (op, type, *(sorted(operands) if op in _COMMUTATIVE else operands))
        found = self.recall(key)
        if found is not None:
            return found
        result = self._new()
        self._results[len(self._body)] = result
        self._body.append(_words(op, type, result, *operands))
        self._types[result] = type
        values = operands[2:] if op == Op.EXT_INST else operands[:1] if op == Op.COMPOSITE_EXTRACT else operands
        if op not in (Op.LOAD, Op.ACCESS_CHAIN) and self._computable.issuperset(values):
            self._computable.add(result)
        if op in _EXACT:
            self._decorate(result, Decoration.NO_CONTRACTION)
        return self.remember(key, result)

    def _effect(self, op: Op, *operands: int) -> None:
        self._body.append(_words(op, *operands))

    def op(self, op: Op, *operands: Id, type: Id | None = None) -> Id:
        """An instruction whose result type follows from its opcode, or is `type`, or is that of its last operand."""
        known = [self._constants.get(operand) for operand in operands]
        if len(known) == 2 and (folded := self._fold(op, operands, known)) is not None:
            return folded
        if op in _INTEGER_TO_FLOAT and known[0] is not None:
            return self.real(float(_INTEGER_TO_FLOAT[op](known[0])))
        if op in _ALGEBRA or op in _FLOAT_COMPARISONS:
            operands = self._guarded(op, *operands)
        if type is None:
            if op in _COMPARISONS:
                type = self.bool
            elif op in _FLOATS:
                type = self.f32
            elif op in (Op.F_TO_U, Op.F_TO_S):
                type = self.u32
            else:
                type = self._types[operands[-1]]
        return self._pure(op, type, *operands)

    def _guarded(self, op: Op, a: Id, b: Id) -> tuple[Id, Id]:
        """The operands of arithmetic, without anything that algebra could be done with."""
        if a == b and op not in (Op.F_ADD, Op.F_MUL):
            return a, self.hidden(b)
        if op in _FLOAT_COMPARISONS:
            return a, b
        return self._uncertain(a), self._uncertain(b)

    def _uncertain(self, value: Id) -> Id:
        """A float that is no constant but an ordinary one: with those there is no algebra that changes a result."""
        word = self._reals.get(value)
        if word is None:
            return self.hidden(value) if value in self._computable else value
        return value if _is_ordinary(word) else self.hidden(value)

    def _fold(self, op: Op, operands: Sequence[Id], known: Sequence[int | None]) -> Id | None:
        (a, b), (x, y) = operands, known
        if x is not None and y is not None and op in _FOLDED and not (op in (Op.U_DIV, Op.U_MOD) and y == 0):
            return self.constant(_FOLDED[op](x, y))
        if x is not None and y is not None and op in _TESTED:
            return self.boolean(_TESTED[op](x, y))
        if op == Op.LOGICAL_AND and self.boolean(True) in operands:
            return a if b == self.boolean(True) else b
        if op == Op.I_ADD and 0 in (x, y):
            return b if x == 0 else a
        if op == Op.I_MUL and 1 in (x, y):
            return b if x == 1 else a
        if (op == Op.I_MUL and 0 in (x, y)) or (op == Op.U_MOD and y == 1):
            return self.constant(0)
        if (op == Op.I_SUB and y == 0) or (op == Op.U_DIV and y == 1):
            return a
        return None

    def ext(self, instruction: Ext, *operands: Id) -> Id:
        """An instruction of GLSL.std.450."""
        type = self.f32 if instruction in _EXT_FLOATS else self.u32
        if instruction == Ext.FMA:
            operands = tuple(map(self._uncertain, operands))
        return self._pure(Op.EXT_INST, type, self._glsl, instruction, *operands)

    def select(self, condition: Id, yes: Id, no: Id) -> Id:
        return yes if yes == no else self.op(Op.SELECT, condition, yes, no)

    def bits(self, value: Id) -> Id:
        """A float as its bits."""
        return self.op(Op.BITCAST, value, type=self.u32)

    def from_bits(self, word: Id) -> Id:
        return self.op(Op.BITCAST, word, type=self.f32)

    def multiply_high(self, a: Id, b: Id, signed: bool) -> Id:
        """The upper 32 bits of a product."""
        pair = self._declare(Op.TYPE_STRUCT, self.u32, self.u32)
        both = self._pure(Op.S_MUL_EXTENDED if signed else Op.U_MUL_EXTENDED, pair, a, b)
        return self._pure(Op.COMPOSITE_EXTRACT, self.u32, both, 1)

    # Blocks.

    def _label(self, label: Id) -> None:
        self._effect(Op.LABEL, label)
        self._block = label

    def _phi(self, type: Id, *sources: Id) -> Id:
        """`sources`: (value, block) in turn."""
        result = self._new()
        self._types[result] = type
        self._body.append(_words(Op.PHI, type, result, *sources))
        return result

    def barrier(self) -> None:
        """All threads of the workgroup get here, and see what the others wrote to shared memory."""
        scope = self.constant(WORKGROUP_SCOPE)
        self._effect(Op.CONTROL_BARRIER, scope, scope, self.constant(WORKGROUP_SEMANTICS))

    def branch(self, condition: Id, then: Callable[[], Code], otherwise: Callable[[], Code] | None = None) -> Code:
        """Runs one of two pieces of code, each giving a list of ids (none, without `otherwise`); gives the one's.

        Where it is known which one, there is no code of the other.
        """
        if condition in (self.boolean(True), self.boolean(False)):
            code = then if condition == self.boolean(True) else otherwise
            return (yield from code()) if code else []
        labels = [self._new() for _ in range(3 if otherwise else 2)]
        merge = labels[-1]
        self._effect(Op.SELECTION_MERGE, merge, 0)
        self._effect(Op.BRANCH_CONDITIONAL, condition, labels[0], labels[1])
        ends = []
        for label, code in zip(labels, (then, otherwise) if otherwise else (then,), strict=False):
            self._label(label)
            with self.scope():
                found = yield from code()
            ends.append((found or [], self._block))
            self._effect(Op.BRANCH, merge)
        self._label(merge)
        if otherwise is None:
            return []
        (some, first), (others, second) = ends
        return [self._phi(self._types[a], a, first, b, second) for a, b in zip(some, others, strict=True)]

    def loop(self, start: Id, stop: Id, step: Id, initial: Sequence[Id], body: Callable[[Id, list[Id]], Code]) -> Code:
        """for i in range(start, stop, step): carried = body(i, carried). Gives the last `carried`."""
        before, header, inside, latch, done = self._block, *(self._new() for _ in range(4))
        self._effect(Op.BRANCH, header)
        self._label(header)
        following = self._new()
        index = self._phi(self.u32, start, before, following, latch)
        carried = [self._phi(self._types[x], x, before, 0, latch) for x in initial]
        phis = self._body[len(self._body) - len(initial) :]
        with self.scope():
            condition = self.op(Op.U_LESS, index, stop)
            self._effect(Op.LOOP_MERGE, done, latch, 0)
            self._effect(Op.BRANCH_CONDITIONAL, condition, inside, done)
            self._label(inside)
            results = yield from body(index, carried)
            self._effect(Op.BRANCH, latch)
            self._label(latch)
            self._body.append(_words(Op.I_ADD, self.u32, following, index, step))
            self._effect(Op.BRANCH, header)
        for phi, result in zip(phis, results, strict=True):
            phi[5] = result
        self._label(done)
        return carried

    # The binary.

    @property
    def code_bytes(self) -> int:
        """The bytes of the instructions so far, those that nothing will use among them."""
        return 4 * sum(map(len, self._body))

    def assemble(self) -> bytes:
        """The module, closed. Called once."""
        self._effect(Op.RETURN)
        body, used = self._live_body()
        decorations = [d for d in self._decorations if d[2] != Decoration.NO_CONTRACTION or d[1] in used]
        instructions = [
            *(_words(Op.CAPABILITY, Capability[name]) for name in sorted(self._capabilities)),
            _words(Op.EXT_INST_IMPORT, self._glsl, *_string("GLSL.std.450")),
            _words(Op.MEMORY_MODEL, 0, 1),  # logical addressing, GLSL450
            _words(Op.ENTRY_POINT, 5, self._function, *_string("main"), *self._interface),
            _words(Op.EXECUTION_MODE, self._function, 17, self._workgroup, 1, 1),  # LocalSize
            *decorations,
            *self._declarations,
            _words(Op.FUNCTION, self._void, self._function, 0, self._function_type),
            *body,
            _words(Op.FUNCTION_END),
        ]
        words = [MAGIC, _VERSION, 0, self._next, 0]
        for instruction in instructions:
            words.append(len(instruction) << 16 | instruction[0])
            words += instruction[1:]
        return struct.pack(f"<{len(words)}I", *words)

    def _live_body(self) -> tuple[list[list[int]], set[int]]:
        """The body without unused results. A literal that looks like an id keeps something at worst."""
        used = {word for instruction in self._body if instruction[0] == Op.PHI for word in instruction[3:]}
        kept = []
        for position in range(len(self._body) - 1, -1, -1):
            instruction = self._body[position]
            result = self._results.get(position)
            if result is None or result in used:
                used.update(instruction[1:])
                kept.append(instruction)
        return kept[::-1], used


class StorageBuffer:
    """A storage buffer of a kernel: an array of 8, 16 or 32-bit words, which are 32-bit words in registers."""

    def __init__(self, module: Module, variable: Id, element: Id, bits: int):
        self._module, self._variable, self._element, self._bits = module, variable, element, bits

    def may_alias(self) -> None:
        """Another buffer may be the same memory."""
        self._module._decorate(self._variable, Decoration.ALIASED)

    def _pointer(self, index: Id) -> Id:
        m = self._module
        pointer = m._declare(Op.TYPE_POINTER, StorageClass.STORAGE_BUFFER, self._element)
        return m._pure(Op.ACCESS_CHAIN, pointer, self._variable, m.constant(0), index)

    def load(self, index: Id) -> Id:
        """Zero-extended. It may be the value of an earlier load: not to be read after writing."""
        m = self._module
        word = m._pure(Op.LOAD, self._element, self._pointer(index))
        return word if self._bits == 32 else m._pure(Op.U_CONVERT, m.u32, word)

    def store(self, index: Id, word: Id) -> None:
        """The low bits of `word`."""
        m = self._module
        narrow = word if self._bits == 32 else m._pure(Op.U_CONVERT, self._element, word)
        m._effect(Op.STORE, self._pointer(index), narrow)


class Shared:
    """An array of 32-bit words that a workgroup shares."""

    def __init__(self, module: Module, variable: Id):
        self._module, self._variable = module, variable

    def _pointer(self, index: Id) -> Id:
        m = self._module
        return m._pure(
            Op.ACCESS_CHAIN, m._declare(Op.TYPE_POINTER, StorageClass.WORKGROUP, m.u32), self._variable, index
        )

    def load(self, index: Id) -> Id:
        m = self._module
        result = m._new()
        m._body.append(_words(Op.LOAD, m.u32, result, self._pointer(index)))
        m._types[result] = m.u32
        return result

    def store(self, index: Id, word: Id) -> None:
        self._module._effect(Op.STORE, self._pointer(index), word)


def _is_ordinary(word: int) -> bool:
    """Whether the float of these bits is neither a zero nor subnormal, infinite or NaN."""
    return 0 < word >> 23 & 0xFF < 0xFF


def _words(op: Op, *operands: int) -> list[int]:
    return [int(op), *map(int, operands)]


def _string(text: str) -> list[int]:
    data = text.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return list(struct.unpack(f"<{len(data) // 4}I", data))
