"""The schedule, the decay mask and the clip."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import chat
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

CONFIG = chat.get_config()
SETTINGS = CONFIG.optimizer


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 3.054e-6),
        (10, 3.54e-6),
        (50, 5.70e-6),
        (100, 8.40e-6),
        (250, 1.65e-5),
        (500, 3.00e-5),
        (5000, 2.945e-5),
        (50_000, 3e-6),
        (60_000, 3e-6),
    ],
)
def test_schedule_of_the_reference_run(step, expected):
    assert float(learning_rate_schedule(CONFIG)(step - 1)) == pytest.approx(expected, rel=2e-4)


def test_decay_mask_is_the_matrices():
    config = chat.get_config().model
    config.update(num_layers=1, use_bias=True)
    mask = decay_mask(init_params(GPT(ModelConfig.from_config(config)), 0))
    names = named_leaves(mask)
    assert {name for name, on in names.items() if on} == {
        *("wte", "wpe", "head", "h_0/qkv/kernel", "h_0/projection/kernel", "h_0/mlp_in/kernel", "h_0/mlp_out/kernel")
    }
    assert {"h_0/qkv/bias", "h_0/ln_1/scale", "ln_f/bias"} <= set(names)


def adamw_in_float64(gradients, start, *, decay):
    """The textbook update: clip, Adam with bias correction, decoupled decay."""
    x, m, v = start.astype(np.float64), 0.0, 0.0
    schedule = learning_rate_schedule(CONFIG)
    for count, gradient in enumerate(gradients, start=1):
        gradient = gradient.astype(np.float64)
        gradient = gradient * min(1.0, SETTINGS.clip_norm / np.linalg.norm(gradient))
        m = SETTINGS.b1 * m + (1 - SETTINGS.b1) * gradient
        v = SETTINGS.b2 * v + (1 - SETTINGS.b2) * gradient**2
        step = m / (1 - SETTINGS.b1**count) / (np.sqrt(v / (1 - SETTINGS.b2**count)) + SETTINGS.epsilon)
        x = x - float(schedule(count - 1)) * (step + decay * x)
    return x


@pytest.mark.parametrize(
    ("matrices_only", "shape", "decayed"), [(True, (3, 4), 1), (True, (12,), 0), (False, (12,), 1)]
)
def test_updates_are_those_of_adamw(matrices_only, shape, decayed):
    config = chat.get_config()
    config.optimizer.decay_matrices_only = matrices_only
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    start, *gradients = rng.normal(size=(6, *shape)).astype(np.float32)
    gradients[1] *= 100  # clipped hard
    gradients[2] *= 1e-3  # not clipped
    params, moved = jnp.asarray(start), np.zeros(shape)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        moved += updates  # in float64: rounding to parameters near 1 would be a hundredth of it
        params = optax.apply_updates(params, updates)
    expected = adamw_in_float64(gradients, start, decay=SETTINGS.weight_decay * decayed)
    np.testing.assert_allclose(moved, expected - start, rtol=1e-4, atol=1e-10)
