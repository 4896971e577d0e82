"""From a graph to instructions, one element at a time.

The value of a node at a place (its coordinates, which are ids) is asked for; its handler asks for the values of its
inputs at the places it needs, and so on down to the kernel's buffers. Each handler is a generator that yields what it
asks for, so that graphs of any depth need no recursion. An answer is kept for as long as it dominates what follows.

A primitive `shift`, whose result at i is its operand at i + 1, and 0 at the end:

    @handles("shift")
    def _shift(e, node, k, coords):
        following = e.m.op(Op.I_ADD, coords[0], e.m.constant(1))       # an instruction: gives an id
        inside = e.m.op(Op.U_LESS, following, e.m.constant(node.outputs[0].shape[0]))

        def within():                                                  # code, in a block of its own
            return [(yield node.inputs[0], (following,))]              # asks for the operand there

        zero = no_questions(lambda: [e.m.real(0)])                     # code that asks for nothing
        return (yield from e.m.branch(inside, within, zero))[0]
"""

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from vk_kernels.compiler.codegen.scalars import ELEMENTWISE, Scalars, threefry2x32
from vk_kernels.compiler.ir import Function, Graph, Literal, Node, Value
from vk_kernels.spirv.builder import Code, Id, Module, StorageBuffer
from vk_kernels.spirv.spec import Op

Coords = tuple[Id, ...]
ElementAt = tuple[Value | Literal, Sequence[Id]]
# Gives the value of output `k` of a node at `coords`.
Handler = Callable[["Emitter", Node, int, Coords], Generator[ElementAt, Id, Id]]

HANDLERS: dict[str, Handler] = {}


def handles(*ops: str) -> Callable[[Handler], Handler]:
    """Makes a function the handler of these primitives."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(ops, handler))
        return handler

    return register


def no_questions(function: Callable[..., Any]) -> Callable[..., Code]:
    """Makes code of a function that asks for no values: a generator that yields nothing."""

    @functools.wraps(function)
    def code(*args: Any) -> Code:
        return function(*args)
        yield

    return code


def shape_of(x: Value | Literal) -> tuple[int, ...]:
    return x.shape if isinstance(x, Value) else np.shape(x.value)


def dtype_of(x: Value | Literal) -> np.dtype:
    return x.dtype if isinstance(x, Value) else np.asarray(x.value).dtype


def size_of(x: Value | Literal) -> int:
    return math.prod(shape_of(x))


class Emitter:
    """Emits values of a graph into a module. `loads`: the buffers of the values that are in memory."""

    def __init__(self, module: Module, graph: Graph, loads: dict[Value, StorageBuffer]):
        self.m = module
        self.scalars = Scalars(module)
        self._loads = loads
        self._producers = {out: (node, k) for node in graph.nodes for k, out in enumerate(node.outputs)}
        self.reads: dict[Value, set[Id]] = {}  # where each buffer is read, as row-major indices

    def run(self, code: Code) -> Any:
        """Runs code to its end, answering what it asks for; gives what it returns."""
        stack: list[tuple[Code, Any]] = [(code, None)]
        answer = None
        while True:
            code, key = stack[-1]
            try:
                value, coords = code.send(answer)
            except StopIteration as end:
                stack.pop()
                answer = end.value
                if not stack:
                    return answer
                self.m.remember(key, answer)
                continue
            coords = self._canonical(value, coords)
            answer = self.m.recall((value, coords))
            if answer is None:
                stack.append((self._produce(value, coords), (value, coords)))

    def _canonical(self, value: Value | Literal, coords: Sequence[Id]) -> Coords:
        """A scalar operand goes with any place; the only place along an axis of length 1 is 0."""
        shape = shape_of(value)
        return tuple(self.m.constant(0) if n == 1 else c for n, c in zip(shape, coords if shape else (), strict=True))

    def _produce(self, value: Value | Literal, coords: Coords) -> Code:
        if isinstance(value, Literal):
            found = np.asarray(value.value)
            if found.size > 1 and (found != found.flat[0]).any():
                raise ValueError(f"a literal of shape {found.shape}: only scalars and arrays of one value are literals")
            return self.scalars.constant(found.flat[0], found.dtype)
        if value in self._loads:
            index = self.linear(coords, value.shape)
            self.reads.setdefault(value, set()).add(index)
            return self.scalars.from_word(self._loads[value].load(index), value.dtype)
        node, k = self._producers[value]
        if node.op in ELEMENTWISE:
            args = []
            for x in node.inputs:
                args.append((yield x, coords))
            dtypes = [dtype_of(x) for x in node.inputs]
            return self.scalars.apply(node.op, args, dtypes, value.dtype, node.params)
        return (yield from HANDLERS[node.op](self, node, k, coords))

    def remember(self, value: Value, coords: Sequence[Id], found: Id) -> None:
        """From here on `value` at `coords` is `found`."""
        self.m.remember((value, self._canonical(value, coords)), found)

    def applied(self, function: Function, numbers: Sequence[Id]) -> Code:
        """The result of a function of a node's parameters for some numbers."""
        graph = function.graph
        self._producers |= {out: (node, k) for node in graph.nodes for k, out in enumerate(node.outputs)}
        with self.m.scope():  # it may be asked for again, for others
            for value, number in zip(graph.inputs, numbers, strict=True):
                self.remember(value, (), number)
            return (yield graph.outputs[0], ())

    def all(self, conditions: Sequence[Id]) -> Id:
        """Whether all conditions hold."""
        found = self.m.boolean(True)
        for i, condition in enumerate(conditions):
            found = condition if i == 0 else self.m.op(Op.LOGICAL_AND, found, condition)
        return found

    # Places.

    def _dense(self, coords: Sequence[Id], shape: Sequence[int]) -> tuple[Coords, tuple[int, ...]]:
        """Without the axes of length 1."""
        kept = [(c, n) for c, n in zip(coords, shape, strict=True) if n != 1]
        return tuple(c for c, _ in kept), tuple(n for _, n in kept)

    def linear(self, coords: Sequence[Id], shape: Sequence[int]) -> Id:
        """The row-major index of a place."""
        m = self.m
        coords, shape = self._dense(coords, shape)
        found = m.recall(("linear", coords, shape))
        if found is not None:
            return found
        index = m.constant(0)
        for axis, c in enumerate(coords):
            stride = math.prod(shape[axis + 1 :])
            index = m.op(Op.I_ADD, index, m.op(Op.I_MUL, c, m.constant(stride)))
        m.remember(("place", index, shape), coords)
        return m.remember(("linear", coords, shape), index)

    def place(self, index: Id, shape: Sequence[int]) -> Coords:
        """The place of a row-major index."""
        m = self.m
        dense = tuple(n for n in shape if n != 1)
        coords = m.recall(("place", index, dense))
        if coords is None:
            found, rest = [], index
            for n in dense[:0:-1]:
                found.append(m.op(Op.U_MOD, rest, m.constant(n)))
                rest = m.op(Op.U_DIV, rest, m.constant(n))
            coords = (*((rest,) if dense else ()), *found[::-1])
            m.remember(("place", index, dense), coords)
            m.remember(("linear", coords, dense), index)
        left = iter(coords)
        return tuple(m.constant(0) if n == 1 else next(left) for n in shape)

    def reshaped(self, coords: Sequence[Id], source: Sequence[int], target: Sequence[int]) -> Coords:
        """The place in an array of shape `target` of what is at `coords` in shape `source`.

        Only runs of axes that are really merged or split go through a row-major index.
        """
        result: list[Id] = []
        i = j = 0
        while i < len(source) or j < len(target):
            i_end, j_end = i + (i < len(source)), j + (j < len(target))
            some = math.prod(source[i:i_end])
            other = math.prod(target[j:j_end])
            while some != other:
                if some < other:
                    some, i_end = some * source[i_end], i_end + 1
                else:
                    other, j_end = other * target[j_end], j_end + 1
            result += self.place(self.linear(coords[i:i_end], source[i:i_end]), target[j:j_end])
            i, j = i_end, j_end
        return tuple(result)

    def index(self, value: Value | Literal, coords: Sequence[Id] = ()) -> Code:
        """An integer of the graph as a signed 32-bit index."""
        x = yield value, coords
        if dtype_of(value) == np.uint32:  # beyond the signed range is out of bounds of any axis
            x = self.m.select(self.m.op(Op.S_LESS, x, self.m.constant(0)), self.m.constant(0x7FFFFFFF), x)
        return x


@handles("threefry2x32")
def _threefry(e: Emitter, node: Node, k: int, coords: Coords) -> Code:
    words = []
    for x in node.inputs:
        words.append((yield x, coords))
    results = threefry2x32(e.m, *words)
    e.remember(node.outputs[1 - k], coords, results[1 - k])
    return results[k]
