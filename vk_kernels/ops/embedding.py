"""Table look-up, with a gradient that is the same bit for bit every time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.planning import (
    MAX_GROUPS,
    THREADS,
    aligned,
    ceil_divide,
    dispatch,
    dtype_suffix,
    operands_of,
    planner,
    require_plain,
)
from vk_kernels.ops.public import public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_DIGIT_BITS = 8  # of a pass of the sort
_DIGITS = 1 << _DIGIT_BITS
_ROWS, _COLUMNS = THREADS // 32, 4 * 32  # of the table, a workgroup of embedding_backward


def embedding_forward_reference(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of `table`, (V, D), at integer `ids`, (...): (..., D). An id outside [0, V) gives a row of NaN."""
    return jnp.take(table, _inside(ids, table.shape[0]), axis=0, mode="fill", fill_value=jnp.nan)


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


@planner
def plan_embedding_forward(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: table, ids (int32 or uint32); outputs: rows. See `embedding`."""
    require_plain(variant)
    (table, ids), (rows,), _ = operands_of(inputs, outputs)
    _check_ids(inputs[ids])
    if outputs[0].size == 0:
        return Plan(())
    tokens, (table_rows, columns) = inputs[ids].size, inputs[table].shape
    run = dispatch(
        "embedding",
        dtype_suffix(inputs[table]),
        ceil_divide(tokens * ceil_divide(columns, 8), THREADS),
        constants={"tokens": tokens, "columns": columns, "table_rows": table_rows},
        spec={"ALIGNED": aligned(columns)},
        table=table,
        ids=ids,
        y=rows,
    )
    return Plan((run,))


@planner
def plan_embedding_backward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
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
    (ids, dy), (dtable,), scratch = operands_of(inputs, outputs)
    _check_ids(inputs[ids])
    if outputs[0].size == 0:
        return Plan(())
    tokens, columns = inputs[ids].size, outputs[0].shape[1]
    blocks = max(1, ceil_divide(tokens, THREADS))
    if max(tokens, table_rows + 1) > MAX_GROUPS * THREADS:
        raise ValueError(
            f"the gradient of an embedding takes {MAX_GROUPS * THREADS:,} tokens and rows at most, "
            f"found {tokens:,} and {table_rows:,}"
        )
    counts, starts, *orders = range(scratch, scratch + 4)
    passes = ceil_divide(max(1, table_rows.bit_length()), _DIGIT_BITS)  # ids outside the table sort as table_rows
    order = None  # the first pass reads none
    dispatches: list[Dispatch] = []

    def sort(kernel: str, groups: int, shift: int, **buffers: int | None) -> None:
        constants = {"tokens": tokens, "table_rows": table_rows, "blocks": blocks, "shift": shift}
        dispatches.append(dispatch(f"embedding_sort_{kernel}", "", groups, constants=constants, **buffers))

    for i in range(passes):
        shift, result = i * _DIGIT_BITS, orders[i % 2]
        sort("count", blocks, shift, ids=ids, order=order, counts=counts)
        sort("scan", 1, shift, counts=counts)
        sort("scatter", blocks, shift, ids=ids, order=order, counts=counts, result=result)
        order = result
    sort("starts", ceil_divide(table_rows + 1, THREADS), shift, ids=ids, order=order, result=starts)
    add = dispatch(
        "embedding_backward",
        dtype_suffix(inputs[dy]),
        ceil_divide(table_rows, _ROWS) * ceil_divide(columns, _COLUMNS),
        constants={"table_rows": table_rows, "columns": columns},
        spec={"ALIGNED": aligned(columns)},
        dy=dy,
        order=order,
        starts=starts,
        dtable=dtable,
    )
    order_bytes = 4 * max(1, tokens)
    return Plan((*dispatches, add), (4 * blocks * _DIGITS, 4 * (table_rows + 1), *[order_bytes] * min(passes, 2)))


def _check_ids(ids: ArraySpec) -> None:
    if ids.dtype not in (np.dtype(np.int32), np.dtype(np.uint32)):
        raise ValueError(f"ids must be int32 or uint32, found {ids}")


_embedding_backward = make_primitive(
    "embedding_backward", embedding_backward_reference, KernelOp(plan_embedding_backward)
)


def _embedding_gradients(target, operands, results, cotangents):
    table, ids = operands
    return *_embedding_backward.bind(ids, *cotangents, target=target, table_rows=table.shape[0]), None


_embedding_operation = make_differentiable(
    make_primitive(
        "embedding",
        embedding_forward_reference,
        KernelOp(plan_embedding_forward, batch_axes=lambda: (False, True)),
    ),
    _embedding_gradients,
)


@public(embedding_forward_reference)
def embedding(target, table, ids):
    if table.ndim != 2:
        raise ValueError(f"embedding: table must be (V, D), found {table.shape}")
    (rows,) = _embedding_operation(target, table, ids.reshape(-1))
    return rows.reshape(*ids.shape, table.shape[1])
