"""Layer normalisation in plain JAX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vk_kernels.ops.dropout import dropout_forward_reference

EPSILON = 1e-5  # GPT-2's


def layer_norm_reference(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, statistics in f32.

    Args:
      x: (..., D) f32 or bf16.
      scale: (D,) f32.
      bias: (D,) f32.

    Returns:
      (..., D) in x's dtype.

    Source: Ba et al., "Layer normalization" (2016).
    """
    return layer_norm_forward_reference(x, scale, bias, epsilon=epsilon)[0]


def residual_layer_norm_reference(
    x: jax.Array,
    branch: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rng: jax.Array | None = None,
    *,
    dropout_rate: float = 0.0,
    site: int = 0,
    epsilon: float = EPSILON,
) -> tuple[jax.Array, jax.Array]:
    """total = x + dropout_forward_reference(branch), and the layer norm of total.

    Args:
      x, branch: (..., D), one dtype, f32 or bf16.
      scale, bias, epsilon: as for `layer_norm`.
      rng, dropout_rate, site: as for `dropout`.

    Returns:
      total and its norm, (..., D) each, in x's dtype.
    """
    return residual_layer_norm_forward_reference(
        x, branch, scale, bias, rng, dropout_rate=dropout_rate, site=site, epsilon=epsilon
    )[:2]


def layer_norm_forward_reference(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = EPSILON
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y, mean, rstd): `layer_norm`, and what its backward pass needs: f32, x's shape without the last axis."""
    y = x.astype(jnp.float32)
    mean = y.mean(axis=-1, keepdims=True)
    centred = y - mean
    rstd = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), x.shape) for p in (scale, bias))
    return (centred * rstd * scale + bias).astype(x.dtype), mean[..., 0], rstd[..., 0]


def layer_norm_rule(operands: Sequence[jax.Array], results: Sequence[jax.Array], **_) -> tuple[jax.Array | None, ...]:
    """The results of `layer_norm_forward_reference` that follow from others: see `make_primitive`."""
    x, scale, bias = operands
    mean, rstd = (jnp.broadcast_to(result[..., None], x.shape) for result in results[1:])
    scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), x.shape) for p in (scale, bias))
    return ((x.astype(jnp.float32) - mean) * rstd * scale + bias).astype(x.dtype), None, None


def residual_layer_norm_rule(
    operands: Sequence[jax.Array], results: Sequence[jax.Array], **_
) -> tuple[jax.Array | None, ...]:
    """The results of `residual_layer_norm_forward_reference` that follow from others: see `make_primitive`."""
    total, *of_total = results
    return None, *layer_norm_rule((total, *operands[2:4]), of_total)


def layer_norm_backward_reference(
    x: jax.Array, scale: jax.Array, mean: jax.Array, rstd: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dscale, dbias) of `layer_norm_forward_reference`; dx in x's dtype, the others (D,) f32."""
    dx, dscale, dbias = _backward_in_f32(x, scale, mean, rstd, dy)
    return dx.astype(x.dtype), dscale, dbias


def residual_layer_norm_forward_reference(
    x: jax.Array,
    branch: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rng: jax.Array | None = None,
    *,
    dropout_rate: float,
    site: int,
    epsilon: float = EPSILON,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(total, y, mean, rstd): `residual_layer_norm`, and mean and rstd of total."""
    dropped = dropout_forward_reference(branch.astype(jnp.float32), rng, rate=dropout_rate, site=site)
    total = (x.astype(jnp.float32) + dropped).astype(x.dtype)
    return total, *layer_norm_forward_reference(total, scale, bias, epsilon=epsilon)


def residual_layer_norm_backward_reference(
    total: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    rstd: jax.Array,
    dtotal: jax.Array,
    dy: jax.Array,
    rng: jax.Array | None = None,
    *,
    dropout_rate: float,
    site: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dx, dbranch, dscale, dbias), dtotal being the gradient of the first output and dy that of the second."""
    dx, dscale, dbias = _backward_in_f32(total, scale, mean, rstd, dy)
    dx = dx + dtotal.astype(jnp.float32)
    dbranch = dropout_forward_reference(dx, rng, rate=dropout_rate, site=site)
    return dx.astype(total.dtype), dbranch.astype(total.dtype), dscale, dbias


def _backward_in_f32(x, scale, mean, rstd, dy):
    mean, rstd = mean[..., None], rstd[..., None]
    normed = (x.astype(jnp.float32) - mean) * rstd
    dy = dy.astype(jnp.float32)
    dnormed = dy * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    along = (dnormed * normed).mean(axis=-1, keepdims=True)
    dx = rstd * (dnormed - dnormed.mean(axis=-1, keepdims=True) - normed * along)
    rows = tuple(range(x.ndim - 1))
    return dx, (dy * normed).sum(axis=rows), dy.sum(axis=rows)
