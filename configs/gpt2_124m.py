"""GPT-2 small as published (124 M parameters, tied head, biases), in bf16, on your own text.

    python -m gpt_jax.main --config=configs/gpt2_124m.py --config.data.source=hf:NAME

The model has 124,439,808 parameters. It wants a GPU and a far larger corpus than the default one.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    config = chat.get_config()
    config.name = "gpt2_124m"
    config.num_steps = 100_000
    config.batch_size = 64
    config.accumulate_steps = 4

    config.model.vocab_size = 50_257
    config.model.block_size = 1024
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.embed_dim = 768
    config.model.dropout_rate = 0.0
    config.model.soft_cap = 0.0
    config.model.use_bias = True
    config.model.tie_head = True
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 6e-4
    config.optimizer.min_learning_rate = 6e-5
    config.optimizer.warmup_steps = 2000
    config.optimizer.b2 = 0.95

    config.eval.every = 1000
    config.sample.every = 1000
    config.checkpoint.every = 1000
    return config
