"""The model with a cache: a text's keys and values are kept, so that each new token costs one row of every product.

Pure functions of weights made once (`decoding_weights`), in the layout that decoding reads: a matrix of the model's
dtype, transposed, (N, K), so that a product of few rows reads each output's weights as one line of memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.model.gpt import ModelConfig
from gpt_jax.model.lora import LINEAR_LAYERS, merge_adapters
from vk_kernels import ops

Weights = dict[str, Any]
Cache = tuple[jax.Array, ...]  # of each layer: keys and values, (B, block, 2, H, D) in the model's dtype


def decoding_weights(params: Any, config: ModelConfig) -> Weights:
    """The parameters as decoding reads them, adapters merged; embeddings and norms as they are."""
    dtype = jnp.dtype(config.dtype)
    if config.lora is not None:
        params = merge_adapters(params, config.lora.scale)

    def linear(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        matrix = {"matrix": layer["kernel"].T.astype(dtype)}  # (N, K)
        return {**matrix, "bias": layer["bias"].astype(dtype)} if config.use_bias else matrix

    def block(layer: dict[str, Any]) -> dict[str, Any]:
        return {name: linear(x) if name in LINEAR_LAYERS else x for name, x in layer.items()}

    output = params["wte"] if config.tie_head else params["head"].T
    return {
        "wte": params["wte"],
        "wpe": params["wpe"],
        "layers": [block(params[f"h_{layer}"]) for layer in range(config.num_layers)],
        "ln_f": params["ln_f"],
        "head": output.astype(dtype),  # (vocab_size, embed_dim)
    }


def empty_cache(config: ModelConfig, texts: int) -> Cache:
    """A cache for so many texts."""
    shape = (texts, config.block_size, 2, config.num_heads, config.embed_dim // config.num_heads)
    return tuple(jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in range(config.num_layers))


def prefill(weights: Weights, tokens: jax.Array, cache: Cache, slot: jax.Array, config: ModelConfig) -> Cache:
    """The cache with the keys and values of a text's first tokens, int32 (T,), in a slot, int32 ()."""
    shape = (len(tokens), 3, config.num_heads, config.embed_dim // config.num_heads)
    x = _embed(weights, tokens, jnp.arange(len(tokens), dtype=jnp.int32), config)
    branch, filled = None, []
    for layer, kept in zip(weights["layers"], cache, strict=True):
        x, qkv = _norm_linear(x, branch, layer["ln_1"], layer["qkv"], config)
        qkv = qkv.reshape(shape)
        filled.append(ops.fill_cache(qkv, kept, slot))
        attended = ops.packed_attention(qkv[None], cap=config.soft_cap)
        x, branch = _rest_of_layer(x, attended.reshape(x.shape), layer, config)
    return tuple(filled)


def decode_step(
    weights: Weights, tokens: jax.Array, positions: jax.Array, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """One token of each text.

    Args:
      tokens, positions: int32 (B,): each text's token, and its place in it, below block_size.
      cache: of what stands before.

    Returns:
      The logits of the next token, (B, vocab_size) in the model's dtype, and the cache with this one.
    """
    shape = (len(tokens), 3, config.num_heads, config.embed_dim // config.num_heads)
    x = _embed(weights, tokens, positions, config)
    branch, new = None, []
    for layer, kept in zip(weights["layers"], cache, strict=True):
        x, qkv = _norm_linear(x, branch, layer["ln_1"], layer["qkv"], config)
        qkv = qkv.reshape(shape)
        attended, kept = ops.decode_attention(qkv, kept, positions, cap=config.soft_cap)
        new.append(kept)
        x, branch = _rest_of_layer(x, attended.reshape(x.shape), layer, config)
    _, logits = _norm_linear(x, branch, weights["ln_f"], {"matrix": weights["head"]}, config)
    return logits, tuple(new)


def _embed(weights: Weights, tokens: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """(..., embed_dim) in the model's dtype."""
    token, position = (weights[name].at[i].get(mode="clip") for name, i in (("wte", tokens), ("wpe", positions)))
    return (token + jnp.broadcast_to(position, token.shape)).astype(jnp.dtype(config.dtype))


def _linear(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
    return ops.matmul(x, layer["matrix"], layer.get("bias"), transposed=True)


def _norm_linear(
    x: jax.Array,
    branch: jax.Array | None,
    norm: dict[str, jax.Array],
    layer: dict[str, jax.Array],
    config: ModelConfig,
    activation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x + branch, and the linear layer that reads the norm of that."""
    operands = norm["scale"], norm["bias"], layer["matrix"], layer.get("bias")
    return ops.norm_matmul(x, branch, *operands, activation=activation, epsilon=config.norm_epsilon)


def _rest_of_layer(
    x: jax.Array, attended: jax.Array, layer: Weights, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """All of a layer that comes after attention: x, and the branch that is to be added to it."""
    x, y = _norm_linear(x, _linear(attended, layer["projection"]), layer["ln_2"], layer["mlp_in"], config, "gelu")
    return x, _linear(y, layer["mlp_out"])
