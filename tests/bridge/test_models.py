"""Small models of flax and optax as anyone writes them, trained a few steps under vk_kernels.jit and under jax.jit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from profiles import NIGHT, night
from run_graph import normal
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels

pytestmark = [needs_vulkan, night]

STEPS = 5


class MLP(nn.Module):
    """A classifier: loss of logits."""

    @nn.compact
    def __call__(self, batch, rng):
        x = batch["x"]
        for width in (16, 12):
            x = nn.relu(nn.Dense(width)(x))
        x = nn.Dropout(0.2, deterministic=False)(x, rng=rng)
        logits = nn.Dense(5)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


class Recurrent(nn.Module):
    """Predicts the sum of a sequence."""

    cell: type[nn.Module]

    @nn.compact
    def __call__(self, batch, rng):
        hidden = nn.RNN(self.cell(8))(batch["sequence"])
        return jnp.mean((nn.Dense(1)(hidden)[:, -1, 0] - batch["sequence"].sum((1, 2))) ** 2)


class Block(nn.Module):
    """A language model of one transformer block."""

    @nn.compact
    def __call__(self, batch, rng):
        tokens = batch["tokens"]
        x = nn.Embed(11, 12)(tokens) + self.param("positions", nn.initializers.normal(0.02), (1, tokens.shape[1], 12))
        mask = nn.make_causal_mask(tokens)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, use_bias=False)(y, mask=mask)
        x = x + nn.Dense(12)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x))))
        logits = nn.Dense(11)(nn.RMSNorm()(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


class VAE(nn.Module):
    """Reconstructs binary images through a Gaussian of four numbers."""

    @nn.compact
    def __call__(self, batch, rng):
        x = (batch["x"] > 0).astype(jnp.float32)
        h = nn.relu(nn.Dense(14)(x))
        mean, log_variance = nn.Dense(4)(h), nn.Dense(4)(h)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(rng, mean.shape)
        logits = nn.Dense(x.shape[-1])(nn.silu(nn.Dense(14)(z)))
        divergence = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), axis=-1)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, x).sum(-1) + divergence)


class Normalized(nn.Module):
    """A model with group norm, pooling, and a mean over places."""

    @nn.compact
    def __call__(self, batch, rng):
        x = nn.Dense(8)(batch["image"])
        x = nn.max_pool(nn.GroupNorm(num_groups=4)(nn.swish(x)), (2, 2), strides=(2, 2))
        x = nn.avg_pool(nn.Dense(8, dtype=jnp.float32)(x), (2, 2))
        return optax.huber_loss(nn.Dense(1)(x.mean((1, 2)))[:, 0], batch["x"][:2, 0]).mean()


def make_batch(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    return {
        "x": normal(6, 7, seed=i),
        "label": rng.integers(0, 5, 6).astype(np.int32),
        "sequence": normal(6, 2, 3, seed=i),
        "tokens": rng.integers(0, 11, (3, 9)).astype(np.int32),
        "image": normal(2, 6, 6, 3, seed=i),
    }


class Example(NamedTuple):
    model: nn.Module
    optimizer: Callable[[], optax.GradientTransformation]
    learning_rate: float


EXAMPLES = {
    "mlp, sgd with momentum": Example(MLP(), lambda: optax.sgd(0.05, momentum=0.9, nesterov=True), 0.05),
    "mlp, adafactor": Example(MLP(), lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8), 1e-2),
    "lstm, adam": Example(Recurrent(nn.OptimizedLSTMCell), lambda: optax.adam(1e-2), 1e-2),
    "gru, rmsprop": Example(Recurrent(nn.GRUCell), lambda: optax.rmsprop(1e-2, momentum=0.5), 1e-2),
    "transformer block, adamw with a schedule": Example(
        Block(),
        lambda: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 9))
        ),
        1e-2,
    ),
    "vae, lion": Example(VAE(), lambda: optax.lion(1e-3), 1e-3),
    "pooling and group norm, accumulated sgd": Example(
        Normalized(), lambda: optax.MultiSteps(optax.sgd(0.05), every_k_schedule=2), 0.05
    ),
}

QUICK = ("mlp, sgd with momentum", "gru, rmsprop", "vae, lion", "pooling and group norm, accumulated sgd")  # to compile


def train_step(state: TrainState, batch: dict[str, Any], key: Any) -> tuple[TrainState, jax.Array]:
    def loss_fn(params):
        return state.apply_fn({"params": params}, batch, jax.random.fold_in(key, state.step))

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


def run(step: Callable, state: TrainState) -> tuple[Any, list[float]]:
    losses = []
    for i in range(STEPS):
        state, loss = step(state, make_batch(i), jax.random.key(7))
        losses.append(float(loss))
    return jax.tree.map(np.asarray, state), losses


def make_params(model: nn.Module) -> Any:
    """Drawn by numpy: XLA takes seconds to compile flax's initializers."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), make_batch(0), jax.random.key(1))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [normal(*x.shape, seed=i) / 2 for i, x in enumerate(leaves)])


@pytest.mark.parametrize("name", [name for name in EXAMPLES if NIGHT or name in QUICK])
def test_a_model_trains_as_under_xla(name):
    model, optimizer, learning_rate = EXAMPLES[name]
    state = TrainState.create(apply_fn=model.apply, params=make_params(model), tx=optimizer())
    expected, losses = run(jax.jit(train_step), state)
    found, found_losses = run(vk_kernels.jit(train_step, donate_argnums=0, device=SELECTOR), state)
    np.testing.assert_allclose(found_losses, losses, rtol=2e-5)
    assert losses[-1] != losses[0]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    moved = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), state.params, found.params)
    assert max(jax.tree.leaves(moved)) > learning_rate / 10
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=learning_rate / 1000)


def test_parameters_are_initialized_from_the_same_bits():
    args = jax.random.key(0), make_batch(0), jax.random.key(1)
    found, expected = vk_kernels.jit(MLP().init, device=SELECTOR)(*args), jax.jit(MLP().init)(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=1e-6)
