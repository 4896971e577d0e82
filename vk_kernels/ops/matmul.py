"""Matrix product with what usually follows it: bias, GELU, dropout, residual."""

import jax
import jax.numpy as jnp

from vk_kernels.ops.dropout import dropout
from vk_kernels.ops.gelu import gelu


def matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    residual: jax.Array | None = None,
    rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    stream: int = 0,
) -> jax.Array:
    """residual + dropout(activation(x @ w + bias)), accumulated in f32.

    Args:
      x: (..., K).
      w: (K, N), same dtype as x.
      bias: (N,) or None.
      activation: None or 'gelu'.
      residual: (..., N) or None.
      rng, dropout_rate, stream: as for `dropout`.

    Returns:
      (..., N) in x's dtype.

    Raises:
      ValueError: an unknown activation.
    """
    if activation not in (None, "gelu"):
        raise ValueError(f"activation must be None or 'gelu', found {activation!r}")
    y = jnp.einsum("...k,kn->...n", x, w, preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    y = y.astype(x.dtype)
    if activation == "gelu":
        y = gelu(y)
    y = dropout(y, rng, rate=dropout_rate, stream=stream)
    return y if residual is None else residual + y
