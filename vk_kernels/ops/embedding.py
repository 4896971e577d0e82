"""Table look-up, with a gradient that is the same bit for bit every time."""

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.ops.launch import MAX_GROUPS, THREADS, aligned, ceil_divide, dispatch, element, require_plain
from vk_kernels.runtime.dispatch_plan import Array, Dispatch, Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_DIGIT_BITS = 8  # of a pass of the sort
_DIGITS = 1 << _DIGIT_BITS
_ROWS, _COLUMNS = THREADS // 32, 4 * 32  # of the table, a workgroup of embedding_backward


def embedding(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of `table`, (V, D), at integer `ids`, (...): (..., D). An id outside [0, V) gives a row of NaN."""
    return jnp.take(table, _inside(ids, table.shape[0]), axis=0, mode="fill", fill_value=jnp.nan)


embedding_forward_reference = embedding


def embedding_backward_reference(ids: jax.Array, dy: jax.Array, *, table_rows: int) -> jax.Array:
    """Gradient of the table, (table_rows, D): the sum, in f32, of the rows of dy, (..., D), that hold each id.

    ids: int32 or uint32 (...). Rows with an id outside the table count for nothing. The result has dy's dtype.
    """
    rows = dy.reshape(ids.size, dy.shape[-1]).astype(jnp.float32)
    zeros = jnp.zeros((table_rows, dy.shape[-1]), jnp.float32)
    return zeros.at[_inside(ids, table_rows).reshape(-1)].add(rows, mode="drop").astype(dy.dtype)


def _inside(ids: jax.Array, rows: int) -> jax.Array:
    """ids, with `rows`, which is in no table, for the negative ones, that JAX would count from the end."""
    return jnp.where(ids < 0, jnp.asarray(rows, ids.dtype), ids)


def plan_embedding_forward(
    info: "DeviceInfo", inputs: Sequence[Array], outputs: Sequence[Array], *, variant: str | None = None
) -> Plan:
    """inputs: table, ids (int32 or uint32); outputs: rows. See `embedding`."""
    require_plain(variant)
    (table, ids), (rows,) = inputs, outputs
    _check_ids(ids)
    if rows.size == 0:
        return Plan(())
    table_rows, columns = table.shape
    push_constants = struct.pack("<III", ids.size, columns, table_rows)
    groups = ceil_divide(ids.size * ceil_divide(columns, 8), THREADS)
    spec = {"ALIGNED": aligned(columns)}
    return Plan((dispatch("embedding", element(table), (0, 1, 2), push_constants, groups, **spec),))


def plan_embedding_backward(
    info: "DeviceInfo",
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *,
    table_rows: int,
    variant: str | None = None,
) -> Plan:
    """inputs: ids, dy; outputs: dtable. See `embedding_backward_reference`.

    The positions of the tokens are sorted by id, stably, so that each row of the table finds its own in one run and
    adds them up in their order, without atomics on floats: one radix pass for each eight bits of an id.

    Raises:
      ValueError: a dtype without kernels, or more than 16 million tokens or rows.
    """
    require_plain(variant)
    (ids, dy), (dtable,) = inputs, outputs
    _check_ids(ids)
    if dtable.size == 0:
        return Plan(())
    tokens, columns = ids.size, dtable.shape[1]
    blocks = max(1, ceil_divide(tokens, THREADS))
    if max(tokens, table_rows + 1) > MAX_GROUPS * THREADS:
        raise ValueError(
            f"the gradient of an embedding takes {MAX_GROUPS * THREADS:,} tokens and rows at most, "
            f"found {tokens:,} and {table_rows:,}"
        )
    counts, starts, *orders = range(3, 7)  # scratch
    passes = ceil_divide(max(1, table_rows.bit_length()), _DIGIT_BITS)  # ids outside the table sort as table_rows
    order = 0  # the first pass reads none
    dispatches: list[Dispatch] = []
    for i in range(passes):
        push_constants = struct.pack("<IIII", tokens, table_rows, blocks, i * _DIGIT_BITS)
        target = orders[i % 2]
        for kernel, operands, groups in (
            ("count", (0, order, counts), blocks),
            ("scan", (0, order, counts), 1),
            ("scatter", (0, order, counts, target), blocks),
        ):
            dispatches.append(dispatch(f"embedding_sort_{kernel}", "", operands, push_constants, groups))
        order = target
    operands, groups = (0, order, counts, starts), ceil_divide(table_rows + 1, THREADS)
    dispatches.append(dispatch("embedding_sort_starts", "", operands, push_constants, groups))
    groups = ceil_divide(table_rows, _ROWS) * ceil_divide(columns, _COLUMNS)
    push_constants = struct.pack("<II", table_rows, columns)
    spec = {"ALIGNED": aligned(columns)}
    dispatches.append(
        dispatch("embedding_backward", element(dy), (1, order, starts, 2), push_constants, groups, **spec)
    )
    order_bytes = 4 * max(1, tokens)
    return Plan(tuple(dispatches), (4 * blocks * _DIGITS, 4 * (table_rows + 1), *[order_bytes] * min(passes, 2)))


def _check_ids(ids: Array) -> None:
    if ids.dtype not in (np.dtype(np.int32), np.dtype(np.uint32)):
        raise ValueError(f"ids must be int32 or uint32, found {ids}")
