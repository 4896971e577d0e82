"""The reference run as a GPT-2 in every detail, so that `gpt_jax.export` writes it for transformers whole.

    python -m gpt_jax.main --config=configs/chat_gpt2.py

It differs from configs/chat.py by what the format of GPT-2 asks for (no soft cap of attention scores) and by what
GPT-2 has: biases and a tied head, 5,828,608 parameters. Expect a loss of 8.32 at step 1 and a validation loss of 8.32
before it; the full run was not measured.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    config = chat.get_config()
    config.name = "chat_gpt2"
    config.model.soft_cap = 0.0
    config.model.use_bias = True
    config.model.tie_head = True
    return config
