"""The output layer and its loss in one operation, so that an implementation need not hold the logits."""

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.ops.gemm import F32, Epilogue, Matrix, matrix, plan_epilogue, plan_gemm
from vk_kernels.ops.launch import THREADS, ceil_divide, dispatch, element
from vk_kernels.plan import Array, Dispatch, Plan

if TYPE_CHECKING:
    from vk_kernels.device import DeviceInfo

IGNORED = -1  # a target that counts for nothing

# Logits are made for a chunk of tokens at a time: a quarter of them, so that they are never all in memory, and no more
# than these bytes. Fewer, larger chunks keep the matrix products efficient: each adds to all of dw.
_CHUNKS = 4
_CHUNK_BYTES = 256 << 20
_CHUNK_STEP = 128  # rows: whole tiles of the matrix products


def linear_cross_entropy(x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(x @ w)[target] for each row, in f32.

    Args:
      x: (N, D) f32 or bf16.
      w: (D, V), same dtype as x.
      targets: int32 (N,), in [0, V), or negative (`IGNORED`) for a row whose loss and gradient are 0. A target past V
        gives NaN.

    Returns:
      f32 (N,).
    """
    return linear_cross_entropy_forward_reference(x, w, targets)[0]


def linear_cross_entropy_forward_reference(
    x: jax.Array, w: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(losses, log normalizers): `linear_cross_entropy`, and log sum exp of the logits, f32 (N,)."""
    logits = jnp.einsum("nd,dv->nv", x, w, preferred_element_type=jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(targets < 0, 0.0, log_normalizer - target_logit), log_normalizer


def linear_cross_entropy_backward_reference(
    x: jax.Array, w: jax.Array, targets: jax.Array, log_normalizers: jax.Array, dlosses: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(dx, dw) in x's dtype, which the gradient of the logits is rounded to for the products. dlosses: f32 (N,)."""
    logits = jnp.einsum("nd,dv->nv", x, w, preferred_element_type=jnp.float32)
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]
    dlogits = jnp.exp(logits - log_normalizers[:, None]) - hit.astype(jnp.float32)
    dlogits = jnp.where(targets[:, None] < 0, 0.0, dlogits * dlosses[:, None]).astype(x.dtype)
    dx = jnp.einsum("nv,dv->nd", dlogits, w, preferred_element_type=jnp.float32)
    dw = jnp.einsum("nd,nv->dv", x, dlogits, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def plan_linear_cross_entropy_forward(
    info: "DeviceInfo",
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *,
    chunk_rows: int | None = None,
    variant: str | None = None,
) -> Plan:
    """inputs: x, w, targets (int32); outputs: losses, log normalizers.

    See `linear_cross_entropy_forward_reference`. chunk_rows: tokens whose logits are held at a time; variant: of
    `plan_gemm`.

    Raises:
      ValueError: no row of logits fits a buffer of the device; as `plan_gemm`.
    """
    x, w = inputs[:2]
    element(x)
    tokens, vocab = x.shape[0], w.shape[1]
    work, logits = _Work(scratch=5, own=1), 5
    most = _chunk_rows(info, tokens, vocab, chunk_rows)
    for first, rows in _chunks(tokens, most):
        work.add(_logits(info, x, w, first, rows, logits, work.free, variant))
        push_constants = struct.pack("<III", rows, vocab, first)
        operands = (logits, 2, 4, 3)
        work.add(Plan((dispatch("cross_entropy_loss", "f32", operands, push_constants, rows),)))
    return work.plan(4 * min(most, tokens) * vocab)


def plan_linear_cross_entropy_backward(
    info: "DeviceInfo",
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *,
    chunk_rows: int | None = None,
    variant: str | None = None,
) -> Plan:
    """inputs: x, w, targets, log normalizers, dlosses; outputs: dx, dw. See `linear_cross_entropy_backward_reference`.

    Each chunk makes its logits again, turns them into their gradient, in place in f32, and adds its part to dw, in f32.
    """
    x, w = inputs[:2]
    (tokens, width), vocab = x.shape, w.shape[1]
    dx, dw, logits, dlogits, sums = 5, 6, 7, 7, 8
    most = _chunk_rows(info, tokens, vocab, chunk_rows)
    kind = element(x)
    own = [4 * min(most, tokens) * vocab]
    if x.dtype != F32:
        dlogits, sums = 8, 9
        own += [x.dtype.itemsize * min(most, tokens) * vocab]
    # dw takes the sum over chunks itself where it is f32, or there is but one chunk.
    in_place = x.dtype == F32 or tokens <= most
    total = matrix(dw, w.dtype, width, vocab) if in_place else matrix(sums, F32, width, vocab)
    own += [] if in_place else [4 * width * vocab]
    work = _Work(scratch=7, own=len(own))
    for first, rows in _chunks(tokens, most) or [(0, 0)]:  # of no tokens, dw is 0
        work.add(_logits(info, x, w, first, rows, logits, work.free, variant))
        if rows:
            push_constants = struct.pack("<III", rows, vocab, first)
            operands, groups = (logits, 2, 3, 4, dlogits), rows * ceil_divide(vocab, THREADS)
            work.add(Plan((dispatch("cross_entropy_gradient", kind, operands, push_constants, groups),)))
        part = matrix(dlogits, x.dtype, rows, vocab)
        w_whole, dx_rows = matrix(1, w.dtype, width, vocab), _rows_of(dx, x, first, rows)
        free = work.free
        work.add(plan_gemm(info, part, w_whole, dx_rows, transpose_b=True, scratch=free, variant=variant))
        accumulate, x_rows = Epilogue(accumulate=first > 0), _rows_of(0, x, first, rows)
        work.add(
            plan_gemm(
                info,
                x_rows,
                part,
                total,
                transpose_a=True,
                epilogue=accumulate,
                scratch=free,
                variant=variant,
            )
        )
    if not in_place:
        work.add(plan_epilogue(total, matrix(dw, w.dtype, width, vocab), Epilogue()))
    return work.plan(*own)


class _Work:
    """Plans one after another: operands from `scratch` on are `own` buffers of ours, then what the plans share."""

    def __init__(self, scratch: int, own: int):
        self.free = scratch + own  # the first operand for the scratch of a plan
        self._dispatches: list[Dispatch] = []
        self._shared: list[int] = []

    def add(self, plan: Plan) -> None:
        self._dispatches += plan.dispatches
        longest = max(len(self._shared), len(plan.scratch))
        sizes = [(*nbytes, *[0] * (longest - len(nbytes))) for nbytes in (self._shared, plan.scratch)]
        self._shared = [max(pair) for pair in zip(*sizes, strict=True)]

    def plan(self, *own: int) -> Plan:
        return Plan(tuple(self._dispatches), (*own, *self._shared)) if self._dispatches else Plan(())


def _chunk_rows(info: "DeviceInfo", tokens: int, vocab: int, wanted: int | None) -> int:
    """How many tokens' logits are held at a time."""
    limit = info.limits.storage_buffer_range // (4 * max(vocab, 1))
    if limit == 0:
        raise ValueError(
            f"a row of {vocab:,} logits does not fit a buffer of {info.limits.storage_buffer_range:,} bytes, the most "
            "that the device binds (maxStorageBufferRange)"
        )
    if wanted is not None:
        return min(wanted, limit)
    quarter = ceil_divide(ceil_divide(tokens, _CHUNKS), _CHUNK_STEP) * _CHUNK_STEP
    most = min(limit, max(quarter, 1), max(_CHUNK_BYTES // (4 * max(vocab, 1)), 1))
    for step in (_CHUNK_STEP, 8):  # cooperative matrices want chunks that start at multiples of 8
        if most > step:
            return most // step * step
    return most


def _chunks(tokens: int, most: int) -> list[tuple[int, int]]:
    """(first, rows) of each chunk."""
    return [(first, min(most, tokens - first)) for first in range(0, tokens, most)]


def _rows_of(operand: int, x: Array, first: int, rows: int) -> Matrix:
    width = x.shape[1]
    return Matrix(operand, x.dtype, rows, width, width, offset=first * width)


def _logits(
    info: "DeviceInfo", x: Array, w: Array, first: int, rows: int, logits: int, free: int, variant: str | None
) -> Plan:
    """Logits of a chunk, f32 (rows, V)."""
    whole, out = matrix(1, w.dtype, *w.shape), matrix(logits, F32, rows, w.shape[1])
    return plan_gemm(info, _rows_of(0, x, first, rows), whole, out, scratch=free, variant=variant)
