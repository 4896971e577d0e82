"""Fifty steps of a tiny model, dropout on, by the kernels under jax.jit and by XLA."""

import collections
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from configs import chat_tiny
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.training.steps import init_state, train_step
from vk_kernels import ops
from vk_kernels.bridge.custom_call import counts

pytestmark = [needs_vulkan, pytest.mark.timeout(300)]

STEPS, REPEATED = 50, 5  # of a run, and of a second one
LAYERS = 2


def tiny_config():
    config = chat_tiny.get_config()
    config.batch_size = 4
    config.model.update(vocab_size=80, block_size=24, num_layers=LAYERS, num_heads=2, embed_dim=48, dropout_rate=0.1)
    config.optimizer.update(warmup_steps=5, decay_steps=STEPS)
    return config


CONFIG = tiny_config()


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Walks of small strides through the vocabulary, which a model can learn, with some targets masked."""
    random = np.random.default_rng(step)
    shape = CONFIG.batch_size, CONFIG.model.block_size + 1
    walk = (random.integers(0, 80, (shape[0], 1)) + random.integers(0, 4, shape).cumsum(axis=1)) % 80
    targets = np.where(random.random((shape[0], shape[1] - 1)) < 0.1, ops.IGNORED, walk[:, 1:])
    return {"inputs": walk[:, :-1].astype(np.int32), "targets": targets.astype(np.int32)}


class Outcome(NamedTuple):
    losses: np.ndarray  # (steps,)
    params: dict  # after REPEATED steps
    kernels: dict[str, int]  # how often each ran


MODEL, OPTIMIZER = GPT(ModelConfig.from_config(CONFIG.model)), make_optimizer(CONFIG)
STEP = jax.jit(
    functools.partial(
        train_step,
        model=MODEL,
        optimizer=OPTIMIZER,
        schedule=learning_rate_schedule(CONFIG),
        seed=CONFIG.seed,
    ),
    donate_argnums=0,
)


def train(implementation: str, steps: int = STEPS) -> Outcome:
    state = jax.jit(lambda: init_state(init_params(MODEL, CONFIG.seed), OPTIMIZER))()
    before, losses, params = collections.Counter(counts()), [], {}
    with use(implementation):
        for i in range(steps):
            state, metrics = STEP(state, batch_of(i))
            losses.append(metrics["loss"])
            if i + 1 == REPEATED:
                params = jax.tree.map(np.array, state.params)
    return Outcome(np.array(losses), params, dict(collections.Counter(counts()) - before))


def use(implementation: str):
    return vk_kernels.use(implementation, device=SELECTOR if implementation == "vulkan" else None)


@pytest.fixture(scope="module")
def on_vulkan() -> Outcome:
    return train("vulkan")


@pytest.fixture(scope="module")
def on_xla() -> Outcome:
    return train("xla")


def test_losses_agree_with_xla_at_every_step(on_vulkan, on_xla):
    np.testing.assert_allclose(on_vulkan.losses, on_xla.losses, rtol=1e-4)
    assert on_xla.losses[-10:].mean() < 0.7 * on_xla.losses[0]  # it learns: the steps are no walk on the spot


def test_the_kernels_did_it(on_vulkan, on_xla):
    """Each operation in each step, forward and backward; XLA's run has none."""
    assert not on_xla.kernels
    by_step = {"embedding": 1, "embedding_backward": 1, "cross_entropy_loss": 1}
    by_step |= dict.fromkeys(("layer_norm", "layer_norm_backward"), 1)
    by_step = {f"{name}.f32": count for name, count in by_step.items()}
    by_step |= dict.fromkeys(("layer_norm.residual_f32", "layer_norm_backward.residual_f32"), 2 * LAYERS)
    assert {name: on_vulkan.kernels.get(name, 0) / STEPS for name in by_step} == by_step
    for kernel in ("attention_forward", "attention_dkv", "attention_dq"):  # in the variant that suits the device
        assert sum(n for name, n in on_vulkan.kernels.items() if name.startswith(f"{kernel}.f32")) == STEPS * LAYERS
    products = sum(count for name, count in on_vulkan.kernels.items() if name.startswith("matmul"))
    assert products >= STEPS * 3 * (4 * LAYERS + 1)  # each is one forward and two backward


def test_a_second_run_is_the_same_bit_for_bit(on_vulkan):
    again = train("vulkan", REPEATED)
    assert again.losses.tobytes() == on_vulkan.losses[:REPEATED].tobytes()
    jax.tree.map(np.testing.assert_array_equal, again.params, on_vulkan.params)
    assert {name: count / REPEATED for name, count in again.kernels.items()} == {
        name: count / STEPS for name, count in on_vulkan.kernels.items()
    }


def test_dropout_masks_are_those_of_xla():
    """Masks of every place in every layer, in some of the steps, at the shapes of the run."""
    tokens, width = CONFIG.batch_size * CONFIG.model.block_size, CONFIG.model.embed_dim
    length, heads = CONFIG.model.block_size, CONFIG.model.num_heads
    identity = np.broadcast_to(np.eye(length, dtype=np.float32)[:, None], (CONFIG.batch_size, length, heads, length))

    def masks(rng):
        drawn = []
        for layer in range(LAYERS):
            attention, projection, mlp = (
                {"rng": rng, "dropout_rate": CONFIG.model.dropout_rate, "site": 3 * layer + site} for site in range(3)
            )
            zeros = np.zeros_like(identity)
            drawn.append(ops.attention(zeros, zeros, identity, **attention) != 0)
            for place in (projection, mlp):
                ones, scale = np.ones((tokens, width), np.float32), np.ones(width, np.float32)
                drawn.append(ops.residual_layer_norm(0 * ones, ones, scale, scale, **place)[0] != 0)
        return drawn

    for step in (0, 1, STEPS - 1):
        rng = np.array([CONFIG.seed, step], np.uint32)
        found, expected = [], []
        for implementation, masks_of in (("vulkan", found), ("xla", expected)):
            with use(implementation):
                masks_of += map(np.asarray, jax.jit(masks)(rng))
        assert 0.85 < np.mean([mask.mean() for mask in expected[1::3]]) < 0.95
        jax.tree.map(np.testing.assert_array_equal, found, expected)
