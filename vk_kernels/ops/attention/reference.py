"""Attention in plain JAX. It holds all of the (T, T) scores, of which the kernels never hold more than a tile."""

import math
from typing import Any

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


def attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rng: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    site: int = 0,
) -> jax.Array:
    """dropout(softmax(causal(soft_cap(scale * q k^T)))) v, with f32 scores and softmax.

    Args:
      q, k, v: (B, T, H, D), one floating dtype.
      rng: as for `dropout`, or None for none. The mask's grid is (B * H, T, T).
      scale: of the scores; 1 / sqrt(D) if None.
      cap: soft cap of the scores, or None.
      dropout_rate, site: as for `dropout`.

    Returns:
      (B, T, H, D) in q's dtype.

    Source: Vaswani et al., "Attention is all you need" (2017).
    """
    return attention_forward_reference(q, k, v, rng, scale=scale, cap=cap, dropout_rate=dropout_rate, site=site)[0]


def attention_forward_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rng: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    site: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The result of `attention`, and the log of each query's sum of exp(score): f32 (B, H, T)."""
    scores = attention_scores(q, k, scale=scale_of(scale, q.shape[-1]), cap=cap)
    scores = jnp.where(_causal(q.shape[1]), scores, MASKED)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)  # (B, H, T, T)
    mask = _kept(rng, site, dropout_rate, weights.shape)
    if mask is not None:
        weights = jnp.where(mask, weights * dropout_scale(dropout_rate), 0.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype), lse


def attention_backward_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    rng: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    site: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, each (B, T, H, D) in its dtype, from that of out.

    out, lse: what `attention_forward_reference` gave for the other arguments; d_out: like out.

    Source: Dao et al., "FlashAttention" (2022), appendix B.
    """
    scale = scale_of(scale, q.shape[-1])
    scores = attention_scores(q, k, scale=scale, cap=None)
    slopes = 1.0
    if cap is not None:
        tanh = jnp.tanh(scores / cap)
        scores, slopes = cap * tanh, 1 - tanh * tanh
    causal = _causal(q.shape[1])
    weights = jnp.where(causal, jnp.exp(jnp.where(causal, scores, MASKED) - lse[..., None]), 0.0)
    d_weights = jnp.einsum("bqhd,bkhd->bhqk", d_out, v, preferred_element_type=jnp.float32)
    dropped = weights
    mask = _kept(rng, site, dropout_rate, weights.shape)
    if mask is not None:
        dropped = jnp.where(mask, weights * dropout_scale(dropout_rate), 0.0)
        d_weights = jnp.where(mask, d_weights * dropout_scale(dropout_rate), 0.0)
    dots = jnp.einsum("bqhd,bqhd->bhq", out, d_out, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - dots[..., None]) * slopes * scale).astype(q.dtype)

    def times(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32).astype(y.dtype)

    dq = times("bhqk,bkhd->bqhd", d_scores, k)
    dk = times("bhqk,bqhd->bkhd", d_scores, q)
    dv = times("bhqk,bqhd->bkhd", dropped.astype(d_out.dtype), d_out)
    return dq, dk, dv


def default_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim); 1 for heads of no columns."""
    return 1 / math.sqrt(max(head_dim, 1))


def scale_of(scale: float | None, head_dim: int) -> float:
    return default_scale(head_dim) if scale is None else scale


def _causal(length: int) -> jax.Array:
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def _kept(rng: jax.Array | None, site: int, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """Which weights dropout keeps, bool (B, H, T, T); None where it keeps all."""
    if rng is None or dropout_threshold(rate) == 0:
        return None
    return dropout_mask(rng, site, rate, shape)


def packed_attention_reference(
    qkv: jax.Array,
    rng: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    site: int = 0,
) -> jax.Array:
    """`attention` of q, k and v, which are qkv[:, :, 0], qkv[:, :, 1] and qkv[:, :, 2].

    Args:
      qkv: (B, T, 3, H, D), a floating dtype.
      rng, scale, cap, dropout_rate, site: as for `attention`.

    Returns:
      (B, T, H, D) in qkv's dtype.
    """
    parameters = {"scale": scale, "cap": cap, "dropout_rate": dropout_rate, "site": site}
    return packed_attention_forward_reference(qkv, rng, **parameters)[0]


def packed_attention_forward_reference(
    qkv: jax.Array, rng: jax.Array | None = None, **parameters: Any
) -> tuple[jax.Array, jax.Array]:
    """The result of `packed_attention`, and the log of each query's sum of exp(score): f32 (B, H, T)."""
    return attention_forward_reference(*jnp.moveaxis(qkv, 2, 0), rng, **parameters)


def packed_attention_backward_reference(
    qkv: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    rng: jax.Array | None = None,
    **parameters: Any,
) -> jax.Array:
    """The gradient of qkv, in its dtype; see `attention_backward_reference`."""
    gradients = attention_backward_reference(*jnp.moveaxis(qkv, 2, 0), out, lse, d_out, rng, **parameters)
    return jnp.stack(gradients, axis=2)
