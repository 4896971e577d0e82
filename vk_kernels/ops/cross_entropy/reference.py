"""Output layer and loss in plain JAX. It holds the logits."""

import jax
import jax.numpy as jnp

IGNORED = -1  # a target that counts for nothing


def linear_cross_entropy_reference(
    x: jax.Array, w: jax.Array, targets: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """-log softmax(x @ w)[target] for each row, in f32.

    Args:
      x: (N, D) f32 or bf16.
      w: (D, V), same dtype as x; `transposed`: (V, D), as the table of an embedding lies.
      targets: int32 (N,), in [0, V), or negative (`IGNORED`) for a row whose loss and gradient are 0. A target past V
        gives NaN.

    Returns:
      f32 (N,).
    """
    return linear_cross_entropy_forward_reference(x, w, targets, transposed=transposed)[0]


def _subscripts(transposed: bool) -> str:
    return "vd" if transposed else "dv"


def linear_cross_entropy_forward_reference(
    x: jax.Array, w: jax.Array, targets: jax.Array, *, transposed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(losses, log normalizers): `linear_cross_entropy`, and log sum exp of the logits, f32 (N,)."""
    logits = jnp.einsum(f"nd,{_subscripts(transposed)}->nv", x, w, preferred_element_type=jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(targets < 0, 0.0, log_normalizer - target_logit), log_normalizer


def linear_cross_entropy_backward_reference(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    log_normalizers: jax.Array,
    dlosses: jax.Array,
    *,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(dx, dw) in x's dtype, which the gradient of the logits is rounded to for the products. dlosses: f32 (N,)."""
    of_w = _subscripts(transposed)
    logits = jnp.einsum(f"nd,{of_w}->nv", x, w, preferred_element_type=jnp.float32)
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]
    dlogits = jnp.exp(logits - log_normalizers[:, None]) - hit.astype(jnp.float32)
    dlogits = jnp.where(targets[:, None] < 0, 0.0, dlogits * dlosses[:, None]).astype(x.dtype)
    dx = jnp.einsum(f"nv,{of_w}->nd", dlogits, w, preferred_element_type=jnp.float32)
    dw = jnp.einsum(f"nd,nv->{of_w}", x, dlogits, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def linear_cross_entropy_both_passes_reference(
    x: jax.Array, w: jax.Array, targets: jax.Array, dlosses: jax.Array, *, transposed: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(losses, log normalizers, dx, dw), for a `dlosses` that is known before the losses are."""
    found = linear_cross_entropy_forward_reference(x, w, targets, transposed=transposed)
    reads = x, w, targets, found[1], dlosses
    return *found, *linear_cross_entropy_backward_reference(*reads, transposed=transposed)
