"""The model with a cache, beside the model without one: logits at every place of texts of mixed lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_plan import assert_accurate
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.model.kv_cache import decode_step, decoding_weights, empty_cache, prefill

CONFIG = ModelConfig(
    vocab_size=37,
    block_size=20,
    num_layers=2,
    num_heads=2,
    embed_dim=24,
    mlp_dim=40,
    norm_epsilon=0.1,
    soft_cap=5.0,
)
OTHER = ModelConfig(
    vocab_size=37,
    block_size=20,
    num_layers=2,
    num_heads=1,
    embed_dim=24,
    use_bias=True,
    tie_head=True,
    dtype="bfloat16",
)
LENGTHS = (1, 7, 12)  # of the prompts, which go on until the block is full
INIT = jax.jit(init_params, static_argnums=(0, 1))


def cached_logits(params, tokens, *, config):
    """f32 (B, T, V) of every place; a text's first LENGTHS tokens are prefilled, the others decoded side by side."""
    weights = decoding_weights(params, config)
    cache = empty_cache(config, len(LENGTHS))
    for slot in range(len(LENGTHS)):
        cache = prefill(weights, tokens[slot, : max(LENGTHS)], cache, jnp.int32(slot), config)
    before = jnp.arange(config.block_size)[None] < jnp.array(LENGTHS)[:, None]
    before = before[:, :, None, None, None]
    # What lies past a text is not read.
    cache = tuple(jnp.where(jnp.broadcast_to(before, kept.shape), kept, jnp.nan).astype(kept.dtype) for kept in cache)

    def decode(cache, step):
        positions = jnp.minimum(jnp.array(LENGTHS) + step, config.block_size - 1)
        now = jnp.take_along_axis(tokens, positions[:, None], axis=1)[:, 0]
        logits, cache = decode_step(weights, now, positions, cache, config)
        return cache, logits

    _, found = jax.lax.scan(decode, cache, jnp.arange(config.block_size - min(LENGTHS)))
    return found.swapaxes(0, 1).astype(jnp.float32)


def at_the_places_decoded(logits):
    """The logits of (B, T, V) that `cached_logits` gives: rows whose text has ended repeat its last place."""
    block = logits.shape[1]
    places = np.minimum(np.array(LENGTHS)[:, None] + np.arange(block - min(LENGTHS)), block - 1)
    return np.take_along_axis(np.asarray(logits), places[:, :, None], axis=1)


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["f32", "bf16, bias, tied head"])
@pytest.mark.parametrize("backend", ["xla", pytest.param("vulkan", marks=needs_vulkan)])
def test_logits_with_a_cache_are_those_without(config, backend):
    model = GPT(config)
    params = jax.tree.map(lambda x: 3 * x, INIT(model, 0))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, config.block_size)).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def uncached(model, params):
        hidden = model.apply({"params": params}, tokens)
        head = params["wte"].T if config.tie_head else params["head"]
        return (hidden @ head.astype(hidden.dtype)).astype(jnp.promote_types(hidden.dtype, jnp.float32))

    plain = uncached(model, params)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        exact = uncached(GPT(ModelConfig(**{**config.__dict__, "dtype": "float64"})), wide)
    run = functools.partial(cached_logits, config=config)
    if backend == "vulkan":
        with vk_kernels.use("vulkan", device=SELECTOR):
            found = np.asarray(vk_kernels.jit(run)(params, tokens))
    else:
        found = jax.jit(run)(params, tokens)
    assert_accurate(found, at_the_places_decoded(plain), at_the_places_decoded(exact).astype(np.float64))
