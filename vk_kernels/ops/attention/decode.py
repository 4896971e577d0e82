"""Attention of one new token of each text over the keys and values of all before it, which are kept in a cache."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.compiler.ir import Node
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.attention.planner import MAX_HEAD_DIM
from vk_kernels.ops.attention.reference import MASKED, scale_of, soft_cap
from vk_kernels.ops.planning import (
    THREADS,
    ceil_divide,
    copy_dispatch,
    dispatch,
    dtype_suffix,
    has_teams,
    operands_of,
    planner,
    require_plain,
)
from vk_kernels.ops.public import check_arrays, public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan, Update
from vk_kernels.runtime.kernel import manifest

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_LANES = 8  # that share a key
_PART_KEYS = 1024  # a workgroup takes these no faster than two kernels in turn take more
_ENOUGH = 256  # workgroups that fill a large GPU


def decode_attention_reference(
    qkv: jax.Array,
    cache: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes each text's new key and value to its cache, and attends to all keys up to there. It has no gradient.

    Args:
      qkv: (B, 3, H, D), a floating dtype: query, key and value of one token of each text.
      cache: (B or more, T, 2, H, D), qkv's dtype: keys and values by place in the text; what lies past a text, or in
        rows beyond, is not read.
        Under `vk_kernels.jit` the new one takes its memory, if it is donated, or made there and not read any more.
      positions: int32 (B,): each token's place in its text; moved into 0 ... T - 1.
      scale: of the scores; 1 / sqrt(D) if None.
      cap: soft cap of the scores, or None.

    Returns:
      (B, H, D) in qkv's dtype: softmax(soft_cap(scale * q k^T)) v, with f32 scores and softmax; and the cache.
    """
    texts, length = len(qkv), cache.shape[1]
    positions = jnp.clip(positions, 0, length - 1)
    cache = jnp.asarray(cache).at[jnp.arange(texts, dtype=jnp.int32), positions].set(qkv[:, 1:])
    scores = jnp.einsum("bhd,bkhd->bhk", qkv[:, 0], cache[:texts, :, 0], preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale_of(scale, qkv.shape[-1]), cap)
    seen = jnp.arange(length, dtype=jnp.int32)[None] <= positions[:, None]  # (B, T)
    scores = jnp.where(seen[:, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(qkv.dtype)
    values = jnp.where(seen[:, :, None, None], cache[:texts, :, 1], 0)  # what lies past a text may be anything
    out = jnp.einsum("bhk,bkhd->bhd", weights, values, preferred_element_type=jnp.float32)
    return out.astype(qkv.dtype), cache


@planner
def plan_decode_attention(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    scale: float | None = None,
    cap: float | None = None,
    variant: str | None = None,
    parts: int | None = None,
) -> Plan:
    """inputs: qkv, cache, positions; outputs: out, cache. See `decode_attention_reference`.

    parts: demands how many workgroups share the keys of a head.
    """
    require_plain(variant)
    (qkv, past, positions), (out, cache), scratch = operands_of(inputs, outputs)
    rows, length, _, heads, head_dim = inputs[past].shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head dim of attention must be from 1 to {MAX_HEAD_DIM}, found {head_dim}")
    matrices = inputs[qkv].shape[0] * heads
    if not inputs[past].size:
        return Plan(())
    if parts is None:  # by the rows there are, so that a text has the same bits however many of them are in use
        parts = min(ceil_divide(length, _PART_KEYS), ceil_divide(_ENOUGH, rows * heads))
    part_keys = ceil_divide(length, parts)
    suffix = dtype_suffix(inputs[qkv])
    kind, at_once = _choose_kernel(info, suffix, head_dim)
    constants = {
        "heads": heads,
        "length": length,
        "head_dim": head_dim,
        "matrices": matrices,
        "parts": parts,
        "part_keys": part_keys,
        "scale": scale_of(scale, head_dim),
        "cap": cap or 0.0,
    }
    spec = {"ALIGNED": head_dim % at_once == 0, "SOFT_CAP": cap is not None, "PARTS": parts > 1}
    attend = dispatch(
        "decode_attention",
        kind,
        matrices * parts,
        constants=constants,
        spec=spec,
        qkv=qkv,
        positions=positions,
        past=cache,
        cache=cache,
        result=out if parts == 1 else None,
        partial=scratch if parts > 1 else None,
    )
    update = Update(past, cache - out, copy=0)
    copied = copy_dispatch(inputs[past], past, cache)
    if parts == 1:
        return Plan((copied, attend), updates=(update,))
    groups = ceil_divide(matrices * head_dim, THREADS)
    join = dispatch("decode_attention_join", suffix, groups, constants=constants, partial=scratch, result=out)
    return Plan((copied, attend, join), (4 * matrices * parts * (head_dim + 2),), (update,))


def _choose_kernel(info: "DeviceInfo", suffix: str, head_dim: int) -> tuple[str, int]:
    """The variant of the kernel for a dtype and a size of head, and how many elements it loads at once."""
    padded = next(size for size in (32, 64, MAX_HEAD_DIM) if head_dim <= size)
    kind = f"{suffix}_{padded}"
    if not has_teams(info, _LANES, manifest()[f"decode_attention.{kind}"]):
        kind += "_small"
    return kind, 8 if suffix == "bf16" and (padded >= 8 * _LANES or kind.endswith("small")) else 4


def _flops(node: Node) -> int:
    """Two products over all places of the caches, since the texts' lengths are known on the device alone."""
    qkv, cache, _ = node.inputs
    return 2 * qkv.shape[0] * math.prod(cache.shape[1:])


_decode_attention = make_primitive(
    "decode_attention",
    decode_attention_reference,
    KernelOp(plan_decode_attention, flops=_flops),
)


@public(decode_attention_reference)
def decode_attention(target, qkv, cache, positions, *, scale=None, cap=None):
    if qkv.ndim != 4 or qkv.shape[1] != 3 or cache.ndim != 5:
        raise ValueError(
            f"decode_attention: qkv must be (B, 3, H, D) and cache (B, T, 2, H, D), found {qkv.shape} and {cache.shape}"
        )
    texts, _, heads, head_dim = qkv.shape
    check_arrays(
        "decode_attention",
        cache=(cache, (max(len(cache), texts), cache.shape[1], 2, heads, head_dim), qkv.dtype),
        positions=(positions, (texts,), jnp.int32),
    )
    scoring = {"scale": scale_of(scale, head_dim), "cap": None if cap is None else float(cap)}
    return tuple(_decode_attention.bind(qkv, cache, positions, target=target, **scoring))
