"""Sorts and top_k, by ranks: an element's place in the result is how many others come before it."""

from dataclasses import dataclass

import numpy as np

from vk_kernels.compiler.codegen.emitter import Coords, Emitter, dtype_of, shape_of, size_of
from vk_kernels.compiler.codegen.geometry import THREADS
from vk_kernels.compiler.codegen.scalars import Scalars, kind
from vk_kernels.compiler.ir import Node, Operand
from vk_kernels.spirv.builder import Code, Id, StorageBuffer
from vk_kernels.spirv.spec import Op

RANKS = frozenset({"sort", "top_k"})


@dataclass
class RankSection:
    """A sort or a top_k: a thread an element, which counts those that come before its own, and stores it there.

    Stable, and n reads for each of n elements.
    """

    node: Node
    outputs: dict[int, StorageBuffer]  # by the number of the node's output

    @property
    def groups(self) -> int:
        return -(-size_of(self.node.inputs[0]) // THREADS)

    @property
    def is_top(self) -> bool:
        return self.node.op == "top_k"

    @property
    def axis(self) -> int:
        params, rank = self.node.params, len(shape_of(self.node.inputs[0]))
        return (params.get("axis", -1) if self.is_top else params["dimension"]) % rank

    @property
    def keys(self) -> tuple[Operand, ...]:
        """The operands that decide the order, the first one first."""
        return self.node.inputs[: 1 if self.is_top else self.node.params["num_keys"]]

    def emit(self, e: Emitter, group: Id) -> Code:
        m = e.m
        index = m.op(Op.I_ADD, m.op(Op.I_MUL, group, m.constant(THREADS)), m.thread)
        inside = m.op(Op.U_LESS, index, m.constant(size_of(self.node.inputs[0])))
        yield from m.branch(inside, lambda: self._put(e, index))

    def _put(self, e: Emitter, index: Id) -> Code:
        """Stores the element of a thread at its rank, if the result is that long."""
        m, place = e.m, e.place(index, shape_of(self.node.inputs[0]))
        rank = yield from self._rank(e, place)
        wanted = m.constant(self.node.outputs[0].shape[self.axis])
        yield from m.branch(m.op(Op.U_LESS, rank, wanted), lambda: self._store(e, place, rank))

    def _rank(self, e: Emitter, place: Coords) -> Code:
        """Counts the elements that come before one: those that are less, and equal ones that stand before it."""
        m = e.m
        own = []
        for x in self.keys:
            own.append((yield from self._key(e, x, place)))

        def count(i: Id, carried: list[Id]) -> Code:
            less, equal = m.boolean(False), m.boolean(True)  # by the keys so far
            for x, mine in zip(self.keys, own, strict=True):
                other = yield from self._key(e, x, _at(place, self.axis, i))
                first = m.op(Op.LOGICAL_AND, equal, m.op(Op.U_LESS, other, mine))
                less = m.op(Op.LOGICAL_OR, less, first)
                equal = m.op(Op.LOGICAL_AND, equal, m.op(Op.I_EQUAL, other, mine))
            earlier = m.op(Op.LOGICAL_AND, equal, m.op(Op.U_LESS, i, place[self.axis]))
            before = m.op(Op.LOGICAL_OR, less, earlier)
            return [m.op(Op.I_ADD, carried[0], m.select(before, m.constant(1), m.constant(0)))]

        zero, length = m.constant(0), m.constant(shape_of(self.node.inputs[0])[self.axis])
        (rank,) = yield from m.loop(zero, length, m.constant(1), [zero], count)
        return rank

    def _key(self, e: Emitter, x: Operand, place: Coords) -> Code:
        return sortable(e.scalars, (yield x, place), dtype_of(x), self.is_top)

    def _store(self, e: Emitter, place: Coords, rank: Id) -> Code:
        for k, buffer in self.outputs.items():
            if self.is_top and k == 1:
                word = place[self.axis]
            else:
                source = self.node.inputs[k]
                word = e.scalars.to_word((yield source, place), dtype_of(source))
            buffer.store(e.linear(_at(place, self.axis, rank), self.node.outputs[k].shape), word)


def _at(place: Coords, axis: int, c: Id) -> Coords:
    """A place, moved along an axis to `c`."""
    return (*place[:axis], c, *place[axis + 1 :])


def sortable(s: Scalars, x: Id, dtype: np.dtype, top: bool = False) -> Id:
    """An unsigned number that orders as `x` does in JAX's sort: NaN is the greatest, and the zeros are equal.

    top: as in its top_k, the other way round; and floats are in the order of their bits: -NaN, -inf, ..., -0, 0, ...
    """
    m = s.m
    match kind(dtype):
        case "float":
            bits = m.bits(x)
            if not top:
                bits = m.select(m.op(Op.F_EQUAL, x, m.real(0)), m.constant(0), bits)
                bits = m.select(s.math.is_nan(x), m.constant(0x7FC00000), bits)
            negative = m.op(Op.S_LESS, bits, m.constant(0))
            word = m.op(Op.XOR, bits, m.select(negative, m.constant(-1), m.constant(0x80000000)))
        case "signed":
            word = m.op(Op.XOR, x, m.constant(0x80000000))
        case _:
            word = s.to_word(x, dtype)
    return m.op(Op.NOT, word) if top else word
