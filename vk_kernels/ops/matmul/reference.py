"""Matrix product, and its gradient, in plain JAX."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vk_kernels.ops.dropout import dropout_forward_reference
from vk_kernels.ops.gelu import gelu_backward_reference, gelu_forward_reference

ACTIVATIONS = (None, "gelu")


def matmul_reference(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    residual: jax.Array | None = None,
    rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    site: int = 0,
    transposed: bool = False,
) -> jax.Array:
    """residual + dropout_forward_reference(activation(x @ w + bias)), accumulated in f32.

    Args:
      x: (..., K).
      w: (K, N), or if `transposed` (N, K), same dtype as x.
      bias: (N,) or None.
      activation: None or 'gelu'.
      residual: (..., N) or None.
      rng, dropout_rate, site: as for `dropout`.

    Returns:
      (..., N) in x's dtype.

    Raises:
      ValueError: an unknown activation.
    """
    if rng is None:
        dropout_rate = 0.0
    return matmul_forward_reference(
        *(x, w, *(operand for operand in (bias, residual, rng) if operand is not None)),
        activation=activation,
        has_bias=bias is not None,
        has_residual=residual is not None,
        dropout_rate=dropout_rate,
        site=site,
        transposed=transposed,
    )[0]


def matmul_forward_reference(
    x: jax.Array,
    w: jax.Array,
    *optional: jax.Array,
    activation: str | None,
    has_bias: bool,
    has_residual: bool,
    dropout_rate: float,
    site: int,
    transposed: bool = False,
) -> tuple[jax.Array, ...]:
    """(y,) of `matmul`, or, with an activation, (y, its input), which the backward pass needs; both in x's dtype.

    optional: bias if has_bias, residual if has_residual, rng if there is dropout.
    """
    check_activation(activation)
    rest = iter(optional)
    bias = next(rest) if has_bias else None
    residual = next(rest) if has_residual else None
    rng = next(rest, None)
    formula = "...k,nk->...n" if transposed else "...k,kn->...n"
    y = jnp.einsum(formula, x, w, preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    y = pre_activation = y.astype(x.dtype)
    if activation == "gelu":
        y = gelu_forward_reference(y)
    y = dropout_forward_reference(y, rng, rate=dropout_rate, site=site)
    y = y if residual is None else residual + y
    return (y,) if activation is None else (y, pre_activation)


def matmul_rule(
    operands: Sequence[jax.Array],
    results: Sequence[jax.Array],
    *,
    activation: str | None,
    has_residual: bool,
    dropout_rate: float,
    **_,
) -> tuple[jax.Array | None, ...]:
    """The results of `matmul_forward_reference` that follow from others: see `make_primitive`."""
    if activation is None:
        return (None,)
    return (None if has_residual or dropout_rate else gelu_forward_reference(results[1]), None)


def matmul_backward_reference(
    dy: jax.Array,
    x: jax.Array,
    w: jax.Array,
    *optional: jax.Array,
    activation: str | None,
    has_bias: bool,
    dropout_rate: float,
    site: int,
    input_activation: str | None = None,
    transposed: bool = False,
) -> tuple[jax.Array, ...]:
    """(dx, dw), and with has_bias dbias (N,), in x's dtype. The gradient of the residual is dy itself.

    optional: the activation's input if there is one, rng if there is dropout. input_activation: x is this of the last
    of them, whose gradient dx is then.
    """
    check_activation(activation)
    check_activation(input_activation)
    rest = iter(optional[:-1] if input_activation else optional)
    pre_activation = None if activation is None else next(rest)
    dy = dropout_forward_reference(dy.astype(jnp.float32), next(rest, None), rate=dropout_rate, site=site)
    if activation == "gelu":
        dy = gelu_backward_reference(pre_activation.astype(jnp.float32), dy)
    dsums = dy.astype(x.dtype).reshape(math.prod(x.shape[:-1]), dy.shape[-1])
    rows = x.reshape(dsums.shape[0], x.shape[-1])
    dx = jnp.einsum("mn,nk->mk" if transposed else "mn,kn->mk", dsums, w, preferred_element_type=jnp.float32)
    if input_activation == "gelu":
        dx = gelu_backward_reference(optional[-1].astype(jnp.float32).reshape(dx.shape), dx)
    dw = jnp.einsum("mk,mn->nk" if transposed else "mk,mn->kn", rows, dsums, preferred_element_type=jnp.float32)
    gradients = (dx.reshape(x.shape).astype(x.dtype), dw.astype(w.dtype))
    return (*gradients, dsums.astype(jnp.float32).sum(axis=0).astype(x.dtype)) if has_bias else gradients


def check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'gelu', found {activation!r}")
