"""GPT-2 as a functional Flax (linen) module, with its soft cap, dropout and statistics of attention by head.

Source: Radford et al., "Language models are unsupervised multitask learners" (2019), and its published code.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt_jax.model import lora
from gpt_jax.model.lora import LINEAR_LAYERS, LoraConfig
from vk_kernels import ops
from vk_kernels.ops.philox import site_at

ATTENTION_SITE, PROJECTION_SITE, MLP_SITE = range(3)  # where dropout acts; with the layer, what its bits follow from
DIAGNOSTICS = "diagnostics"  # the collection that attention statistics are sown into, when it is mutable

initializer = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of the model. Matrix products run in `dtype`; parameters are always f32."""

    vocab_size: int
    block_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    mlp_dim: int = 0  # width of a block's MLP; 0: 4 embed_dim
    norm_epsilon: float = 1e-5  # of layer norms, added to the variance
    dropout_rate: float = 0.0
    soft_cap: float | None = None  # of attention scores; None: off
    use_bias: bool = False  # in linear layers; layer norms always have one
    tie_head: bool = False  # the output layer is the token embedding
    dtype: str = "float32"  # or bfloat16
    remat: bool = False  # recompute each layer in the backward pass instead of keeping its activations
    first_text: int = 0  # number in the whole batch of the first text of this device, by which dropout draws its bits
    lora: LoraConfig | None = None  # adapters beside the linear layers; None: there are none

    @classmethod
    def from_config(cls, config: ConfigDict) -> "ModelConfig":
        """Makes it from `config.model`, whose soft_cap of 0 means off."""
        fields = dict(config)
        return cls(**fields | {"soft_cap": fields.get("soft_cap") or None})

    @property
    def mlp_width(self) -> int:
        """Width of a block's MLP."""
        return self.mlp_dim or 4 * self.embed_dim

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The top-level groups of parameters, in the order of the forward pass."""
        blocks = (f"h_{layer}" for layer in range(self.num_layers))
        return ("wte", "wpe", *blocks, "ln_f", *(() if self.tie_head else ("head",)))

    @property
    def residual_init_scale(self) -> float:
        """GPT-2 shrinks the matrices that write to the residual stream by the square root of their number."""
        return 1 / math.sqrt(2 * self.num_layers)


class Linear(nn.Module):
    """A matrix product and what follows it; parameters `kernel` (K, N) and, if asked, `bias` (N,).

    Where the config has adapters for it, also `lora_a` (K, rank) and `lora_b` (rank, N).
    """

    features: int
    config: ModelConfig
    layer: int  # number of the block
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, rng: jax.Array | None, activation: str | None = None) -> jax.Array:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        init = nn.initializers.normal(0.02 * self.init_scale)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        bias = None
        if config.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if config.lora is None or not config.lora.is_adapted(self.layer, self.name):
            return ops.matmul(x, kernel.astype(dtype), bias, activation=activation)
        y = ops.matmul(x, kernel.astype(dtype), bias, residual=self._adapter(x, rng))
        return y if activation is None else ops.gelu(y)

    def _adapter(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """(alpha / rank) dropout(x) A B, in x's dtype."""
        config = self.config
        rank = config.lora.rank
        a = self.param(lora.A, lora.init_a, (x.shape[-1], rank), jnp.float32)
        b = self.param(lora.B, nn.initializers.zeros, (rank, self.features), jnp.float32)
        site = 3 * config.num_layers + len(LINEAR_LAYERS) * self.layer + LINEAR_LAYERS.index(self.name)
        site = site_at(site, config.first_text * x.shape[1])
        x = ops.dropout(x, rng, rate=config.lora.dropout, site=site)
        return ops.matmul(ops.matmul(x, a.astype(x.dtype)), (config.lora.scale * b).astype(x.dtype))


class LayerNorm(nn.Module):
    """Layer norm over the last axis; parameters `scale` and `bias`, (D,) f32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, branch: jax.Array | None = None, **dropout) -> tuple[jax.Array, jax.Array]:
        """total = x + dropout(branch), or x where there is no branch yet; and the norm of total."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        if branch is None:
            return x, ops.layer_norm(x, scale, bias, epsilon=self.epsilon)
        return ops.residual_layer_norm(x, branch, scale, bias, epsilon=self.epsilon, **dropout)


def dropout_at(site: int, layer: int, config: ModelConfig, rng: jax.Array | None, rows: int) -> dict[str, Any]:
    """The arguments of an operation that drops out. rows: of its grid, that one text has."""
    number = site_at(3 * layer + site, config.first_text * rows)
    return {"rng": rng, "dropout_rate": config.dropout_rate, "site": number}


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    A branch is added to x by the layer norm that comes next, in the same kernel: the MLP's by that of the next layer.
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x: jax.Array, branch: jax.Array | None, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """x and the branch that is to be added to it, (B, T, D) each; None in the first layer."""
        config = self.config
        batch, length, width = x.shape
        heads = config.num_heads

        before = {} if branch is None else dropout_at(MLP_SITE, self.layer - 1, config, rng, length)
        x, y = LayerNorm(config.norm_epsilon, name="ln_1")(x, branch, **before)
        qkv = Linear(3 * width, config, self.layer, name="qkv")(y, rng)
        qkv = qkv.reshape(batch, length, 3, heads, width // heads)
        if self.is_mutable_collection(DIAGNOSTICS):
            self._sow_statistics(qkv[:, :, 0], qkv[:, :, 1])
        dropout = functools.partial(dropout_at, layer=self.layer, config=config, rng=rng)
        y = ops.packed_attention(qkv, cap=config.soft_cap, **dropout(ATTENTION_SITE, rows=heads))
        y = y.reshape(batch, length, width)
        branch = Linear(width, config, self.layer, config.residual_init_scale, name="projection")(y, rng)
        x, y = LayerNorm(config.norm_epsilon, name="ln_2")(x, branch, **dropout(PROJECTION_SITE, rows=length))
        y = Linear(config.mlp_width, config, self.layer, name="mlp_in")(y, rng, activation="gelu")
        return x, Linear(width, config, self.layer, config.residual_init_scale, name="mlp_out")(y, rng)

    def _sow_statistics(self, q: jax.Array, k: jax.Array) -> None:
        """Largest score before the soft cap, and mean entropy in nats of the attention weights; f32 (H,) each."""
        largest, log_weights, causal = attention_log_weights(q, k, self.config.soft_cap)
        entropy = -jnp.where(causal, jnp.exp(log_weights) * log_weights, 0.0).sum(axis=-1).mean(axis=(0, 2))
        self.sow(DIAGNOSTICS, "attention_max", largest)
        self.sow(DIAGNOSTICS, "attention_entropy", entropy)


def attention_log_weights(q: jax.Array, k: jax.Array, soft_cap: float | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of queries and keys, (B, T, H, D) each, as the model computes it but with all weights stored.

    Returns:
      The largest score of each head before the soft cap, (H,); the logarithms of the weights, (B, H, T, T), f32; and
      which of these a token sees, bool (1, 1, T, T).
    """
    length, head_dim = q.shape[1], q.shape[3]
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    scores = ops.attention_scores(q, k, scale=1 / math.sqrt(head_dim), cap=None)  # (B, H, T, T)
    largest = jnp.where(causal, scores, -jnp.inf).max(axis=(0, 2, 3))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return largest, jax.nn.log_softmax(jnp.where(causal, scores, -jnp.inf), axis=-1), causal


class GPT(nn.Module):
    """A decoder-only transformer."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.wte = self.param("wte", initializer, (config.vocab_size, config.embed_dim), jnp.float32)
        self.wpe = self.param("wpe", initializer, (config.block_size, config.embed_dim), jnp.float32)
        block = nn.remat(Block) if config.remat else Block
        self.h = [block(config, layer) for layer in range(config.num_layers)]
        self.ln_f = LayerNorm(config.norm_epsilon)
        if not config.tie_head:
            self.head = self.param("head", initializer, (config.embed_dim, config.vocab_size), jnp.float32)

    def __call__(self, tokens: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Final hidden states.

        Args:
          tokens: int32 (B, T), T at most block_size.
          rng: uint32 (2,): seed and step for dropout. None: no dropout.

        Returns:
          (B, T, embed_dim) in the config's dtype.
        """
        dtype = jnp.dtype(self.config.dtype)
        x = ops.embedding(self.wte, tokens) + self.wpe[None, : tokens.shape[1]]
        x, branch = x.astype(dtype), None
        for block in self.h:
            x, branch = block(x, branch, rng)
        dropout = dropout_at(MLP_SITE, len(self.h) - 1, self.config, rng, tokens.shape[1])
        return self.ln_f(x, branch, **dropout)[1]

    def output_matrix(self) -> jax.Array:
        """(embed_dim, vocab_size) in the config's dtype; if tied, (vocab_size, embed_dim)."""
        matrix = self.wte if self.config.tie_head else self.head
        return matrix.astype(jnp.dtype(self.config.dtype))

    def losses(self, tokens: jax.Array, targets: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Cross entropy in nats of each target, f32 (B, T); 0 where a target is `ops.IGNORED`."""
        hidden = self(tokens, rng)
        flat = hidden.reshape(-1, hidden.shape[-1])
        operands = flat, self.output_matrix(), targets.reshape(-1)
        return ops.linear_cross_entropy(*operands, transposed=self.config.tie_head).reshape(targets.shape)

    def next_token_logits(self, tokens: jax.Array, last: jax.Array) -> jax.Array:
        """Logits, f32 (B, vocab_size), of the token after position `last`, int32 (B,), of tokens, (B, T)."""
        hidden = self(tokens)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        matrix = self.output_matrix()
        return ops.matmul(hidden, matrix.T if self.config.tie_head else matrix).astype(jnp.float32)


def make_model(config: ConfigDict, first_text: int = 0) -> GPT:
    """The model that a run trains: `config.model`, with the adapters of `config.lora`.

    first_text: number in the whole batch of the first text that this device has.
    """
    more = {"lora": LoraConfig.from_config(config), "first_text": first_text}
    return GPT(dataclasses.replace(ModelConfig.from_config(config.model), **more))


def init_params(model: GPT, seed: int) -> Any:
    """Fresh f32 parameters, a pure function of the seed."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    method = type(model).losses  # touches every parameter, the output layer's too
    return model.init(jax.random.key(seed), tokens, tokens, method=method)["params"]
