"""GELU in the tanh form that GPT-2 uses."""

import math

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), computed in f32; any shape, same dtype out.

    Source: Hendrycks and Gimpel, "Gaussian error linear units" (2016), section 2.
    """
    y = x.astype(jnp.float32)
    inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)
    return (0.5 * y * (1 + jnp.tanh(inner))).astype(x.dtype)
