"""A chat model in a few minutes on a laptop's processor: the whole road from corpus to samples.

    python -m gpt_jax.main --config=configs/chat_tiny.py

Expect a validation loss of 8.32 at the start and about 4.3 at the end: words and phrases in the voice of the corpus,
not yet sense. It sees a third of the corpus once, so it has no dropout: that would only slow it down.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    config = chat.get_config()
    config.name = "chat_tiny"
    config.num_steps = 1200
    config.batch_size = 8

    config.model.block_size = 128
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.dropout_rate = 0.0

    config.optimizer.learning_rate = 4e-3
    config.optimizer.min_learning_rate = 4e-4
    config.optimizer.warmup_steps = 100

    config.eval.every = 300
    config.sample.every = 600
    config.checkpoint.every = 300
    config.checkpoint.keep_every = 0
    config.log.every = 50
    config.log.diagnostics_every = 300
    return config
