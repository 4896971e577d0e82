"""Products of a user's own function (`x @ w`, `einsum`, their gradients) by the kernels of `gemm`.

The axes of an operand are of three kinds: b, the batch, of both operands and the result; k, which products are added up
along; f, free, of one operand and the result. Those of a kind that lie side by side are one, and then a word says how
the operand lies, as a matrix or a batch of them: `fk`, `kf`, `bfk`, `bkf`, `fbk` or `kbf`. What lies otherwise is
brought into order first, by a generated kernel that reads it once; but free axes before those along k may be a batch
of this operand alone, as of many w for one x.

The result is (b, f of the left, f of the right). Where its only reader transposes it, the product is made as that has
it: the other way round in the gradient of x @ w, or with the batch between, `fbf`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vk_kernels.compiler.ir import Node, Operand, Value
from vk_kernels.compiler.op_call import CallSite, encode_call
from vk_kernels.compiler.op_registry import KernelOp, register_op
from vk_kernels.ops.matmul.few_rows import FewRows, plan_few_rows
from vk_kernels.ops.matmul.gemm import BF16, F32, Matrix, plan_gemm
from vk_kernels.ops.planning import planner
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan
from vk_kernels.runtime.kernel import manifest

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


class _Generated(NamedTuple):
    """Speed of generated products, and how long one takes that is worth a dispatch of its own instead; seconds.

    What takes less is no slower as it is: the work on its operands and other products are part of the same dispatch.
    """

    step: float  # along k, which a thread goes alone
    multiplication: float  # of a product that fills the device
    least: float


_CPU, _GPU = _Generated(0, 2e-9, 5e-4), _Generated(5e-8, 4e-13, 5e-6)  # lavapipe, an H200

_LEAST_OF_BATCH = 16 * 16  # elements of each matrix of a batch: of smaller ones most of a tile would be empty
_LEAST_USES = 16  # of each element of an operand that is brought into order, which takes as long as to read it twice

_OP = "matrix_product"


class _Axis(NamedTuple):
    """An axis of more than one element. number: its place among the operand's or the result's axes of its kind."""

    kind: str
    number: int
    size: int


class _Side(NamedTuple):
    """An operand: a value, its axes (also those of one element) and its word, '' where it has none."""

    value: Operand
    axes: tuple[_Axis, ...]

    @property
    def word(self) -> str:
        kinds, last = "", None
        for axis in self.axes:
            if axis.size > 1:
                kinds += axis.kind if last is None or axis.kind != last.kind or axis.number < last.number else ""
                last = axis
        if len(set(kinds)) < len(kinds) or (kinds.endswith("b") and kinds != "b"):
            return ""
        if "f" not in kinds:
            kinds = kinds.replace("k", "fk") if "k" in kinds else f"{kinds}f"
        return kinds if "k" in kinds else kinds.replace("f", "kf")

    def size(self, kind: str) -> int:
        return math.prod(axis.size for axis in self.axes if axis.kind == kind)

    def with_own_batch(self) -> "_Side | None":
        """The operand with its free axes before those along k as a batch; None where that gives it no word."""
        first = next((i for i, axis in enumerate(self.axes) if axis.kind == "k" and axis.size > 1), 0)
        before = (axis._replace(kind="b") if axis.kind == "f" else axis for axis in self.axes[:first])
        side = _Side(self.value, (*before, *self.axes[first:]))
        kinds = [axis.kind for axis in sorted(side.axes, key=lambda axis: axis.number) if axis.kind != "k"]
        return side if side.word and kinds == sorted(kinds) else None  # the result has the batch first, too

    def transposed(self, permutation: Sequence[int], of: Operand) -> "_Side":
        """The array that this one is the transpose of."""
        axes = dict(zip(permutation, self.axes, strict=True))
        return _Side(of, tuple(axes[i] for i in range(len(axes))))


def select_product(
    info: "DeviceInfo", node: Node, makers: Mapping[Value, Node], single: Mapping[Value, Node]
) -> list[Node] | None:
    """The nodes of a dot_general, its only reader among them where that is made with it; None: it is generated."""
    if not _suits(info, node):
        return None
    left, right, order = _with_own_batch(*min(_readings(node, makers), key=_bytes_to_order))
    batch = max(left.size("b"), right.size("b"))
    rows, columns = left.size("f"), right.size("f")
    if batch > 1 and rows * columns < _LEAST_OF_BATCH:
        return None
    if (not left.word and columns < _LEAST_USES) or (not right.word and rows < _LEAST_USES):
        return None
    result, order = _result(node, single, left, right, order)
    if order in ("brl", "rbl") or (order == "blr" and right.size("f") == 1):  # one row is made faster than one column
        left, right = right, left
    nodes: list[Node] = []
    left, right = (_ordered(side, kinds, node, nodes) for side, kinds in ((left, "bfk"), (right, "bkf")))
    operands = [_reshaped(side.value, [side.size(kind) for kind in side.word], node, nodes) for side in (left, right)]
    rows, columns = left.size("f"), right.size("f")
    shape = (rows, batch, columns) if order[1] == "b" else (*((batch,) if batch > 1 else ()), rows, columns)
    made = result if result.shape == shape else Value(shape, result.dtype)
    params = {"left": left.word, "right": right.word, "result": "fbf" if order[1] == "b" else "bff"[-len(shape) :]}
    call = encode_call(_OP, params, CallSite()).encode()
    product = Node(_OP, tuple(operands), (made,), params, node.source, node.scope, call)
    nodes += [product] if made is result else [product, _reshape(made, result, node)]
    return nodes if _runs(info, product) else None


def _suits(info: "DeviceInfo", node: Node) -> bool:
    """Whether there are kernels for operands of these types, and the product is worth one."""
    (x, y), out = node.inputs, node.outputs[0]
    if not isinstance(x, Value) or not isinstance(y, Value) or out.size == 0:
        return False
    if x.dtype != y.dtype or x.dtype not in (F32, BF16) or out.dtype not in (F32, x.dtype):
        return False
    k = math.prod(x.shape[axis] for axis in node.params["dimension_numbers"][0][0])
    # What a generated kernel makes as it goes, like a matrix of ones and zeros, is stored here.
    most = info.limits.storage_buffer_range
    return takes_long(info, k, k * out.size) and max(x.nbytes, y.nbytes, out.nbytes) <= most


def takes_long(info: "DeviceInfo", k: int, multiplications: int) -> bool:
    """Whether a generated kernel would take longer for a product than one of its own in a dispatch of its own."""
    speed = _CPU if info.kind == "cpu" else _GPU
    return k * speed.step + multiplications * speed.multiplication >= speed.least


def _readings(node: Node, makers: Mapping[Value, Node]) -> Iterator[tuple[_Side, _Side]]:
    """The operands as they may be read: their axes along k in the order of either of them, and before transposes."""
    contracted, batch = node.params["dimension_numbers"]
    for order in dict.fromkeys(tuple(sorted(range(len(axes)), key=axes.__getitem__)) for axes in contracted):
        sides = []
        for x, along, shared in zip(node.inputs, contracted, batch, strict=True):
            free = iter(range(len(x.shape)))
            axes = []
            for i, size in enumerate(x.shape):
                if i in along:
                    axes.append(_Axis("k", order.index(along.index(i)), size))
                elif i in shared:
                    axes.append(_Axis("b", shared.index(i), size))
                else:
                    axes.append(_Axis("f", next(free), size))
            sides.append(_best_source(_Side(x, tuple(axes)), makers))
        yield sides[0], sides[1]


def _best_source(side: _Side, makers: Mapping[Value, Node]) -> _Side:
    """The first of an operand and the arrays that it is transposed from that has a word; if none has, the first."""
    sources = [side]
    while (maker := makers.get(sources[-1].value)) is not None and maker.op == "transpose":
        sources.append(sources[-1].transposed(maker.params["permutation"], maker.inputs[0]))
    return next((source for source in reversed(sources) if source.word), sources[-1])


def _bytes_to_order(sides: tuple[_Side, _Side]) -> int:
    return sum(0 if side.word else side.value.nbytes for side in sides)


def _with_own_batch(left: _Side, right: _Side) -> tuple[_Side, _Side, str]:
    """The operands, and the order of the result's axes: the batch b, and the free ones l of the left and r."""
    if left.size("b") == 1 and bool(left.word) != bool(right.word):
        if not left.word and (found := left.with_own_batch()):
            return found, right, "blr"
        if not right.word and (found := right.with_own_batch()):
            return left, found, "lbr"
    return left, right, "blr"


def _result(node: Node, single: Mapping[Value, Node], left: _Side, right: _Side, order: str) -> tuple[Value, str]:
    """The value that the product gives, its only reader's where that is made as easily, and the order of its axes."""
    result = node.outputs[0]
    reader = single.get(result)
    if reader is not None and reader.op == "transpose":
        found = _order_of_result(reader.params["permutation"], left, right, order)
        if found is not None:
            return reader.outputs[0], found
    return result, order


def _order_of_result(permutation: Sequence[int], left: _Side, right: _Side, order: str) -> str | None:
    """The order of the axes of a transpose of the result, whose own is `order`; None: no product is made like that."""
    shared = max(left, right, key=lambda side: side.size("b"))
    groups = {
        letter: sorted((letter, axis) for axis in side.axes if axis.kind == kind)
        for letter, side, kind in (("b", shared, "b"), ("l", left, "f"), ("r", right, "f"))
    }
    axes = [axis for letter in order for axis in groups[letter]]
    found = [axes[i] for i in permutation if axes[i][1].size > 1]
    for possible in ("blr", "brl", "lbr", "rbl"):
        if found == [axis for letter in possible for axis in groups[letter] if axis[1].size > 1]:
            return possible
    return None


def _ordered(side: _Side, kinds: str, node: Node, nodes: list[Node]) -> _Side:
    """An operand that has a word; adds the transpose that it takes."""
    if side.word:
        return side
    order = sorted(range(len(side.axes)), key=lambda i: (kinds.index(side.axes[i].kind), side.axes[i].number))
    axes = tuple(side.axes[i] for i in order)
    value = Value(tuple(axis.size for axis in axes), side.value.dtype)
    params = {"permutation": tuple(order)}
    nodes.append(Node("transpose", (side.value,), (value,), params, node.source, node.scope))
    return _Side(value, axes)


def _reshaped(x: Operand, shape: Sequence[int], node: Node, nodes: list[Node]) -> Operand:
    if x.shape == tuple(shape):
        return x
    value = Value(tuple(shape), x.dtype)
    nodes.append(_reshape(x, value, node))
    return value


def _reshape(x: Operand, result: Value, node: Node) -> Node:
    return Node("reshape", (x,), (result,), {"new_sizes": result.shape, "dimensions": None}, node.source, node.scope)


def _runs(info: "DeviceInfo", node: Node) -> bool:
    """Whether a device has what the kernels of a product take."""
    plan = plan_product(info, [x.spec for x in node.inputs], [x.spec for x in node.outputs], **node.params)
    names = (f"{dispatch.kernel}.{dispatch.variant}" for dispatch in plan.dispatches)
    has_features = all(set(manifest()[name]["features"]) <= info.features.names for name in names)
    return has_features and max(plan.scratch, default=0) <= info.limits.storage_buffer_range


@planner
def plan_product(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    left: str,
    right: str,
    result: str,
    variant: str | None = None,
) -> Plan:
    """inputs: the operands; outputs: their product. All lie as the words `left`, `right` and `result` say.

    variant: of `plan_gemm`, which also says what is raised.
    """
    x, y = inputs
    if (left, right, result) == ("fk", "fk", "ff") and outputs[0].dtype == x.dtype and variant in (None, "plain"):
        plan = plan_few_rows(info, x, y, FewRows(0, 1, 2, None, None, None, False))
        if plan is not None:
            return plan
    return plan_gemm(
        info,
        _matrix(0, x, left),
        _matrix(1, y, right),
        _matrix(2, outputs[0], result),
        transpose_a=left.endswith("f"),
        transpose_b=right.endswith("k"),
        batch=outputs[0].shape[result.index("b")] if "b" in result else 1,
        scratch=3,
        variant=variant,
    )


def _matrix(operand: int, array: ArraySpec, word: str) -> Matrix:
    """An array as the matrices of its last axis and of the other one that is no batch; without a batch, one for all."""
    strides = [math.prod(array.shape[i + 1 :]) for i in range(len(word))]
    rows, columns = (i for i, kind in enumerate(word) if kind != "b")
    batch_stride = strides[word.index("b")] if "b" in word else 0
    sizes = array.shape[rows], array.shape[columns]
    return Matrix(operand, array.dtype, *sizes, strides[rows], batch_stride=batch_stride)


def _flops(node: Node) -> int:
    return 2 * node.outputs[0].size * node.inputs[0].shape[node.params["left"].index("k")]


register_op(_OP, KernelOp(plan_product, flops=_flops))
