"""Fits weights through `tanh` by gradient descent: each step, gradient and update, is one submission to the GPU.

    python examples/own_function.py

VK_KERNELS_DEVICE=cpu runs it on a software driver.
"""

import jax
import jax.numpy as jnp

import vk_kernels


@vk_kernels.jit
def step(w, x, y):
    loss, slope = jax.value_and_grad(lambda w: jnp.mean((jnp.tanh(x @ w) - y) ** 2))(w)
    return w - slope, loss


x = jax.random.normal(jax.random.key(0), (1024, 4))
w, y = jnp.zeros(4), jnp.tanh(x @ jnp.array([1.0, -0.5, 0.25, 0.0]))
for _ in range(200):
    w, loss = step(w, x, y)
print(type(w).__name__, w.round(3), loss < 1e-6)
print(step.lower(w, x, y).as_text().splitlines()[0])
