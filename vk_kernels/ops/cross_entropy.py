"""The output layer and its loss in one operation, so that an implementation need not hold the logits."""

import jax
import jax.numpy as jnp

IGNORED = -1  # a target that counts for nothing


def linear_cross_entropy(x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(x @ w)[target] for each row, in f32.

    Args:
      x: (N, D) f32 or bf16.
      w: (D, V), same dtype as x.
      targets: int32 (N,), in [0, V), or negative (`IGNORED`) for a row whose loss and gradient are 0.

    Returns:
      f32 (N,).
    """
    logits = jnp.einsum("nd,dv->nv", x, w, preferred_element_type=jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(targets < 0, 0.0, log_normalizer - target_logit)
