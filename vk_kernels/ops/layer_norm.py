"""Layer normalisation over the last axis."""

import jax
import jax.numpy as jnp

EPSILON = 1e-5  # GPT-2's


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, statistics in f32.

    Args:
      x: (..., D) f32 or bf16.
      scale: (D,) f32.
      bias: (D,) f32.

    Returns:
      (..., D) in x's dtype.

    Source: Ba et al., "Layer normalization" (2016).
    """
    y = x.astype(jnp.float32)
    centred = y - y.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), x.shape) for p in (scale, bias))
    return (normed * scale + bias).astype(x.dtype)
