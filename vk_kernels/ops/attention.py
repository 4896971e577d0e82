"""Causal self-attention with a soft cap and dropout on the weights."""

import math

import jax
import jax.numpy as jnp

from vk_kernels.ops.dropout import dropout_mask, dropout_scale, dropout_threshold

MASKED = -1e30  # a score that softmax turns into 0; finite, so that no inf - inf can arise


def soft_cap(scores: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(scores / cap), or the scores as they are for None. Source: Gemma 2 (2024), section 2."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attention_scores(q: jax.Array, k: jax.Array, *, scale: float, cap: float | None) -> jax.Array:
    """Scores before the mask, f32 (B, H, T, T), of q and k, each (B, T, H, D)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    return soft_cap(scores * scale, cap)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rng: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    stream: int = 0,
) -> jax.Array:
    """dropout(softmax(causal(soft_cap(scale * q k^T)))) v, with f32 scores and softmax.

    Args:
      q, k, v: (B, T, H, D), one floating dtype.
      rng: uint32 (2,): seed and step of the dropout, or None for none. The mask's grid is (B * H, T, T).
      scale: of the scores; 1 / sqrt(D) if None.
      cap: soft cap of the scores, or None.
      dropout_rate, stream: as for `dropout`.

    Returns:
      (B, T, H, D) in q's dtype.

    Source: Vaswani et al., "Attention is all you need" (2017).
    """
    batch, length, heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = attention_scores(q, k, scale=scale, cap=cap)
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, MASKED), axis=-1)  # (B, H, T, T)
    if rng is not None and dropout_threshold(dropout_rate) > 0:
        mask = dropout_mask(rng, stream, dropout_rate, (batch * heads, length, length))
        weights = jnp.where(mask.reshape(weights.shape), weights * dropout_scale(dropout_rate), 0.0)
    return jnp.einsum(
        "bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    ).astype(q.dtype)
