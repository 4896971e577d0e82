"""Plans of output layer and loss: logits are made for a chunk of tokens at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vk_kernels.compiler.ir import Node
from vk_kernels.ops.matmul.gemm import (
    F32,
    NOTHING,
    Epilogue,
    Matrix,
    SoftmaxGradient,
    choose_variant,
    matrix,
    plan_epilogue,
    plan_gemm,
)
from vk_kernels.ops.planning import ceil_divide, dispatch, dtype_suffix, operands_of, planner
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

# Logits are made for a chunk of tokens at a time, so that they are never all in memory: a quarter of the tokens, or as
# many as a cache holds, and no more than these bytes. Fewer, larger chunks keep the matrix products efficient: each
# adds to all of dw. Their gradients in bf16 are in chunks for many tokens alone: the sum of dw over chunks would take
# an array in f32.
_CHUNKS, _CHUNK_BYTES = 4, 256 << 20

_BF16_CHUNKS, _BF16_CHUNK_BYTES = 1, 512 << 20
_CACHED_BYTES = 32 << 20
_CHUNK_STEP = 128  # rows: whole tiles of the matrix products
_PADDING = 8  # elements: what the kernels read at a time

# Columns of a whole tile of cooperative matrices. A partial tile costs twice: columns are padded to whole tiles, unless
# that adds more than 1 / _MOST_PADDED of them.
_TILE_COLUMNS, _MOST_PADDED = 256, 32


@planner
def plan_linear_cross_entropy_forward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    transposed: bool = False,
    chunk_rows: int | None = None,
    variant: str | None = None,
) -> Plan:
    """inputs: x, w, targets (int32); outputs: losses, log normalizers.

    See `linear_cross_entropy_forward_reference`. chunk_rows: tokens whose logits are held at a time; variant: of
    `plan_gemm`.

    Raises:
      ValueError: no row of logits fits a buffer of the device; as `plan_gemm`.
    """
    (x, w, targets), (losses, log_normalizers), scratch = operands_of(inputs, outputs)
    builder = _PlanBuilder(scratch)
    head = _Head.of(info, inputs, (x, w), builder, transposed, chunk_rows, variant, F32)
    logits = head.own_logits(builder, F32)
    head.pad_weights(builder)
    for first, rows in head.chunks:
        head.multiply(builder, head.rows_of(x, first, rows), head.chunk_of_logits(logits, F32, rows))
        loss = dispatch(
            "cross_entropy_loss",
            "f32",
            rows,
            constants=head.constants(first, rows),
            logits=logits,
            targets=targets,
            log_normalizers=log_normalizers,
            losses=losses,
        )
        builder.add(Plan((loss,)))
    return builder.plan()


@planner
def plan_linear_cross_entropy_backward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    transposed: bool = False,
    chunk_rows: int | None = None,
    variant: str | None = None,
) -> Plan:
    """inputs: x, w, targets, log normalizers, dlosses; outputs: dx, dw. See `linear_cross_entropy_backward_reference`.

    Each chunk makes its logits again, which become their gradient before they are stored, and adds its part to dw, in
    f32.
    """
    (x, w, targets, log_normalizers, dlosses), (dx, dw), scratch = operands_of(inputs, outputs)
    builder = _PlanBuilder(scratch)
    dtype = inputs[x].dtype
    head = _Head.of(info, inputs, (x, w), builder, transposed, chunk_rows, variant, dtype)
    dlogits = head.own_logits(builder, dtype)
    gradients = _Gradients.of(head, builder, x, dx, matrix(dw, dtype, *inputs[w].shape), head.chunks)
    head.pad_weights(builder)
    for first, rows in head.chunks or [(0, 0)]:  # of no tokens, dw is 0
        part = head.chunk_of_logits(dlogits, dtype, rows)
        gradient = SoftmaxGradient(targets, log_normalizers, dlosses, first, head.vocab)
        head.multiply(builder, head.rows_of(x, first, rows), part, Epilogue(softmax_gradient=gradient))
        gradients.add(builder, part, first, rows)
    gradients.end(builder)
    return builder.plan()


@planner
def plan_linear_cross_entropy_both_passes(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    transposed: bool = False,
    chunk_rows: int | None = None,
    variant: str | None = None,
) -> Plan:
    """inputs: x, w, targets, dlosses; outputs: losses, log normalizers, dx, dw. See
    `linear_cross_entropy_both_passes_reference`.

    As the two plans above, but the logits become their gradient when their loss is known, and are not made again.
    """
    (x, w, targets, dlosses), (losses, log_normalizers, dx, dw), scratch = operands_of(inputs, outputs)
    builder = _PlanBuilder(scratch)
    dtype, kernel = inputs[x].dtype, f"gradient_{dtype_suffix(inputs[x])}"
    head = _Head.of(info, inputs, (x, w), builder, transposed, chunk_rows, variant, F32)
    logits = dlogits = head.own_logits(builder, F32)
    chunks = head.chunks  # of the gradients, which hold one or more of those of logits
    if dtype != F32:
        largest = _chunk_rows(info, inputs[x].shape[0], head.stride, dtype, chunk_rows)
        largest = max(1, largest // head.largest) * head.largest
        chunks = _chunks(inputs[x].shape[0], largest)
        dlogits = builder.own(dtype.itemsize * largest * head.stride)
    gradients = _Gradients.of(head, builder, x, dx, matrix(dw, dtype, *inputs[w].shape), chunks)
    head.pad_weights(builder)
    for first, rows in chunks or [(0, 0)]:
        for start, count in _chunks(rows, head.largest):
            chunk = head.chunk_of_logits(logits, F32, count)
            head.multiply(builder, head.rows_of(x, first + start, count), chunk)
            loss = dispatch(
                "cross_entropy_loss",
                kernel,
                count,
                constants=head.constants(first + start, count, start),
                logits=logits,  # and in their place the gradient, unless it has another
                targets=targets,
                log_normalizers=log_normalizers,
                losses=losses,
                dlosses=dlosses,
                **({} if dlogits == logits else {"gradient": dlogits}),
            )
            builder.add(Plan((loss,)))
        gradients.add(builder, head.chunk_of_logits(dlogits, dtype, rows), first, rows)
    gradients.end(builder)
    return builder.plan()


def _chunks(tokens: int, largest: int) -> list[tuple[int, int]]:
    """(first token, tokens) of each."""
    return [(first, min(largest, tokens - first)) for first in range(0, tokens, largest)]


class _PlanBuilder:
    """Plans one after another: operands from `scratch` on are buffers of our own, then what the plans share."""

    def __init__(self, scratch: int):
        self.free = scratch  # the first operand for the scratch of a plan
        self._own: list[int] = []
        self._dispatches: list[Dispatch] = []
        self._shared: list[int] = []

    def own(self, nbytes: int) -> int:
        """The operand of a new buffer of our own, before any plan is added."""
        self._own.append(nbytes)
        self.free += 1
        return self.free - 1

    def add(self, plan: Plan) -> None:
        self._dispatches += plan.dispatches
        longest = max(len(self._shared), len(plan.scratch))
        sizes = [(*nbytes, *[0] * (longest - len(nbytes))) for nbytes in (self._shared, plan.scratch)]
        self._shared = [max(pair) for pair in zip(*sizes, strict=True)]

    def plan(self) -> Plan:
        return Plan(tuple(self._dispatches), (*self._own, *self._shared)) if self._dispatches else Plan(())


@dataclass(frozen=True)
class _Head:
    """The output layer of one call, and its chunks of tokens."""

    info: "DeviceInfo"
    variant: str | None
    x: ArraySpec
    given: Matrix  # the weights
    weights: Matrix  # as the products read them
    transposed: bool
    vocab: int
    stride: int  # of logits
    largest: int  # chunk, in tokens

    @classmethod
    def of(
        cls,
        info: "DeviceInfo",
        inputs: Sequence[ArraySpec],
        operands: tuple[int, int],
        builder: _PlanBuilder,
        transposed: bool,
        chunk_rows: int | None,
        variant: str | None,
        logits_dtype: np.dtype,
    ) -> "_Head":
        """operands: x and w; logits_dtype: of the logits, or of their gradients."""
        x, w = (inputs[i] for i in operands)
        dtype_suffix(x)
        width, vocab = reversed(w.shape) if transposed else w.shape
        stride = ceil_divide(vocab, _PADDING) * _PADDING
        given = weights = matrix(operands[1], w.dtype, *w.shape)
        family = choose_variant(info, w.dtype, variant)
        if family != "plain":
            whole = ceil_divide(vocab, _TILE_COLUMNS) * _TILE_COLUMNS
            stride = whole if (whole - vocab) * _MOST_PADDED <= vocab else stride
            if stride > vocab:  # and they are four times slower where rows do not start at multiples of 16 bytes
                shape = (stride, width) if transposed else (width, stride)
                weights = matrix(builder.own(w.dtype.itemsize * width * stride), w.dtype, *shape)
        tokens = x.shape[0]
        if family == "coop2":
            logits_dtype = F32  # which has no softmax_gradient: it makes logits in f32 first
        largest = min(_chunk_rows(info, tokens, stride, logits_dtype, chunk_rows), max(tokens, 1))
        return cls(info, variant, x, given, weights, transposed, vocab, stride, largest)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        return _chunks(self.x.shape[0], self.largest)

    def own_logits(self, builder: _PlanBuilder, dtype: np.dtype) -> int:
        return builder.own(dtype.itemsize * self.largest * self.stride)

    @property
    def is_padded(self) -> bool:
        return self.weights is not self.given

    def pad_weights(self, builder: _PlanBuilder) -> None:
        if self.is_padded and self.chunks:
            given, padded = self.given, self.weights
            if self.transposed:  # by rows: all is one long row
                given, padded = (matrix(w.operand, w.dtype, 1, w.rows * w.columns) for w in (given, padded))
            builder.add(plan_epilogue(given, padded, NOTHING))

    def multiply(self, builder: _PlanBuilder, x: Matrix, out: Matrix, epilogue: Epilogue = NOTHING) -> None:
        """Logits of a chunk."""
        options = {"epilogue": epilogue, "scratch": builder.free, "variant": self.variant}
        builder.add(plan_gemm(self.info, x, self.weights, out, transpose_b=self.transposed, **options))

    def chunk_of_logits(self, operand: int, dtype: np.dtype, rows: int) -> Matrix:
        return Matrix(operand, dtype, rows, self.stride if self.is_padded else self.vocab, self.stride)

    def rows_of(self, operand: int, first: int, rows: int) -> Matrix:
        """Rows of x or of its gradient."""
        width = self.x.shape[1]
        return Matrix(operand, self.x.dtype, rows, width, width, offset=first * width)

    def constants(self, first: int, rows: int, first_gradient: int = 0) -> dict[str, int]:
        """Params of shaders/cross_entropy/cross_entropy.slang."""
        sizes = {"rows": rows, "columns": self.vocab, "stride": self.stride}
        return {**sizes, "first": first, "first_gradient": first_gradient}


@dataclass(frozen=True)
class _Gradients:
    """The products of the logits' gradient, chunk by chunk: dx, and what each adds to dw."""

    head: _Head
    x: int
    dx: int
    dw: Matrix
    total: Matrix  # where dw is summed up

    @classmethod
    def of(
        cls, head: _Head, builder: _PlanBuilder, x: int, dx: int, dw: Matrix, chunks: Sequence[tuple[int, int]]
    ) -> "_Gradients":
        """dw takes the sum over chunks itself where it has the dtype for it, and its rows are as long as those of w."""
        total, columns = dw, head.weights.columns
        summed = F32 if len(chunks) > 1 else dw.dtype
        if (summed, columns) != (dw.dtype, dw.columns):
            total = matrix(builder.own(summed.itemsize * dw.rows * columns), summed, dw.rows, columns)
        return cls(head, x, dx, dw, total)

    def add(self, builder: _PlanBuilder, part: Matrix, first: int, rows: int) -> None:
        """part: the gradient of the logits of `rows` tokens from the `first` on."""
        head, transposed = self.head, self.head.transposed
        x, dx = (head.rows_of(i, first, rows) for i in (self.x, self.dx))
        factors = (replace(part, columns=head.vocab), x) if transposed else (x, part)
        options = {"scratch": builder.free, "variant": head.variant}
        accumulate = Epilogue(accumulate=first > 0)
        builder.add(plan_gemm(head.info, *factors, self.total, epilogue=accumulate, transpose_a=True, **options))
        builder.add(plan_gemm(head.info, part, head.weights, dx, transpose_b=not transposed, **options))

    def end(self, builder: _PlanBuilder) -> None:
        if self.total is not self.dw:
            builder.add(plan_epilogue(replace(self.total, columns=self.dw.columns), self.dw, NOTHING))


def _chunk_rows(info: "DeviceInfo", tokens: int, vocab: int, logits_dtype: np.dtype, wanted: int | None) -> int:
    """Tokens whose logits are held at a time."""
    row_bytes = logits_dtype.itemsize * max(vocab, 1)
    limit = info.limits.storage_buffer_range // row_bytes
    if limit == 0:
        raise ValueError(
            f"a row of {vocab:,} logits does not fit a buffer of {info.limits.storage_buffer_range:,} bytes, the most "
            "that the device binds (maxStorageBufferRange)"
        )
    if wanted is not None:
        return min(wanted, limit)
    few, nbytes = (_CHUNKS, _CHUNK_BYTES) if logits_dtype == F32 else (_BF16_CHUNKS, _BF16_CHUNK_BYTES)
    largest = max(min(limit, nbytes // row_bytes), 1)
    even = ceil_divide(tokens, max(few, ceil_divide(tokens, largest)))
    most = min(largest, max(ceil_divide(even, _CHUNK_STEP) * _CHUNK_STEP, _CACHED_BYTES // row_bytes))
    for step in (_CHUNK_STEP, 8):  # cooperative matrices want chunks that start at multiples of 8
        if most > step:
            return most // step * step
    return most


def logits_flops(node: Node) -> int:
    """Floating-point operations of the logits of x (N, D), the first operand, and w of D x V elements, the second."""
    return 2 * node.inputs[0].shape[0] * node.inputs[1].size
