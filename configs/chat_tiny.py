"""A chat model in a few minutes on a laptop's processor: the whole road from corpus to samples.

python -m gpt_jax.main --config=configs/chat_tiny.py
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    config = chat.get_config()
    config.name = "chat_tiny"
    config.num_steps = 1500
    config.batch_size = 8

    config.model.vocab_size = 2000
    config.model.block_size = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.dropout_rate = 0.05

    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 2e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 1500

    config.eval.every = 250
    config.sample.every = 500
    config.checkpoint.every = 500
    config.checkpoint.keep_every = 0
    config.log.every = 50
    config.log.diagnostics_every = 250
    return config
