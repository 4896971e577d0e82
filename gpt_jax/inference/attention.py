"""The attention of a trained model to a sentence, head by head, for the notebook that draws it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gpt_jax.data.tokenizer import encode, vocabulary_bytes
from gpt_jax.errors import UserError
from gpt_jax.inference.load_model import load_for_sampling
from gpt_jax.model.gpt import GPT, ModelConfig, attention_log_weights


def attention_weights(
    workdir: str | Path, text: str, checkpoint: str | Path | None = None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Runs a sentence through a run's best checkpoint, or another one.

    Returns:
      The T tokens of the sentence, and by layer the weights, f32 (H, T, T): row by row what a token attends to.

    Raises:
      UserError: there is no such run or checkpoint, or the sentence does not fit the model.
    """
    config, params, tokenizer, _ = load_for_sampling(Path(workdir), None if checkpoint is None else Path(checkpoint))
    model = GPT(ModelConfig.from_config(config.model))
    ids = encode(tokenizer, text)
    if not 0 < len(ids) <= config.model.block_size:
        raise UserError(f"the sentence has {len(ids)} tokens, the model sees 1 to {config.model.block_size}")
    _, kept = model.apply(
        {"params": params},
        jnp.asarray([ids], jnp.int32),
        capture_intermediates=lambda module, _: module.name == "qkv",
        mutable=["intermediates"],
    )
    weights = {}
    for layer, modules in kept["intermediates"].items():
        [qkv] = modules["qkv"]["__call__"]
        qkv = qkv.reshape(1, len(ids), 3, model.config.num_heads, -1)
        _, logarithms, _ = attention_log_weights(qkv[:, :, 0], qkv[:, :, 1], model.config.soft_cap)
        weights[layer] = np.exp(np.asarray(logarithms[0], np.float32))
    vocabulary = vocabulary_bytes(tokenizer, tokenizer.get_vocab_size())
    return [vocabulary[i].decode(errors="replace") for i in ids], weights
