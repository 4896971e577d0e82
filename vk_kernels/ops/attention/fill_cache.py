"""The keys and values of a text's first tokens, written to its slot of a cache."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.planning import (
    THREADS,
    aligned,
    ceil_divide,
    copy_dispatch,
    dispatch,
    dtype_suffix,
    operands_of,
    planner,
    require_plain,
)
from vk_kernels.ops.public import check_arrays, public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan, Update

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


def fill_cache_reference(qkv: jax.Array, cache: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache with the keys and values of one text's first tokens. It has no gradient.

    Args:
      qkv: (T, 3, H, D), a floating dtype: query, key and value of each token.
      cache: (B, block, 2, H, D), qkv's dtype, T at most block: as `decode_attention` takes it. Under `vk_kernels.jit`
        it is written where it lies, if it is donated, or made there and not read any more.
      slot: int32 (), the text's; moved into 0 ... B - 1.
    """
    return jax.lax.dynamic_update_slice(cache, qkv[None, :, 1:], (slot, 0, 0, 0, 0))


@planner
def plan_fill_cache(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: qkv, cache, slot; outputs: cache. See `fill_cache_reference`."""
    require_plain(variant)
    (qkv, past, slot), (cache,), _ = operands_of(inputs, outputs)
    if not inputs[past].size:
        return Plan(())
    copied = copy_dispatch(inputs[past], past, cache)
    update = Update(past, 0, copy=0)
    tokens, _, heads, head_dim = inputs[qkv].shape
    slots, length = inputs[past].shape[:2]
    width = 2 * heads * head_dim
    fill = dispatch(
        "fill_cache",
        dtype_suffix(inputs[qkv]),
        ceil_divide(tokens * width, 4 * THREADS),
        constants={"count": tokens * width, "width": width, "slots": slots, "slot_size": length * width},
        spec={"ALIGNED": aligned(heads * head_dim)},
        qkv=qkv,
        slot=slot,
        cache=cache,
    )
    return Plan((copied, fill), updates=(update,))


_fill_cache = make_primitive("fill_cache", fill_cache_reference, KernelOp(plan_fill_cache))


@public(fill_cache_reference)
def fill_cache(target, qkv, cache, slot):
    if qkv.ndim != 4 or qkv.shape[1] != 3 or cache.ndim != 5 or len(qkv) > cache.shape[1]:
        raise ValueError(
            "fill_cache: qkv must be (T, 3, H, D) and cache (B, block, 2, H, D), T at most block, "
            f"found {qkv.shape} and {cache.shape}"
        )
    slot = jnp.asarray(slot)
    check_arrays(
        "fill_cache",
        cache=(cache, (*cache.shape[:2], 2, *qkv.shape[2:]), qkv.dtype),
        slot=(slot, (), jnp.int32),
    )
    return _fill_cache.bind(qkv, cache, slot, target=target)[0]
