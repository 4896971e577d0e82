"""Attention of one new token of each text over the keys and values of all before it, which are kept in a cache."""

import jax
import jax.numpy as jnp

from vk_kernels.ops.attention.reference import MASKED, scale_of, soft_cap


def decode_attention(
    qkv: jax.Array,
    cache: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes each text's new key and value to its cache, and attends to all keys up to there.

    Args:
      qkv: (B, 3, H, D), a floating dtype: query, key and value of one token of each text.
      cache: (B, T, 2, H, D), qkv's dtype: keys and values by place in the text; what lies past a text is not read.
      positions: int32 (B,): each token's place in its text; moved into 0 ... T - 1.
      scale: of the scores; 1 / sqrt(D) if None.
      cap: soft cap of the scores, or None.

    Returns:
      (B, H, D) in qkv's dtype: softmax(soft_cap(scale * q k^T)) v, with f32 scores and softmax; and the cache.
    """
    texts, length = cache.shape[:2]
    positions = jnp.clip(positions, 0, length - 1)
    cache = cache.at[jnp.arange(texts), positions].set(qkv[:, 1:])
    scores = jnp.einsum("bhd,bkhd->bhk", qkv[:, 0], cache[:, :, 0], preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale_of(scale, qkv.shape[-1]), cap)
    seen = jnp.arange(length)[None] <= positions[:, None]  # (B, T)
    scores = jnp.where(seen[:, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(qkv.dtype)
    values = jnp.where(seen[:, :, None, None], cache[:, :, 1], 0)  # what lies past a text may be anything
    out = jnp.einsum("bhk,bkhd->bhd", weights, values, preferred_element_type=jnp.float32)
    return out.astype(qkv.dtype), cache
