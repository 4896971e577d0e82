"""A run's model, or GPT-2 of Hugging Face, goes on learning from your own chats.

    python -m gpt_jax.main --config=configs/finetune.py --config.init_from=latest --config.data.source=my_chats.jsonl

Model, tokenizer and chat format are the donor's: `latest`, `best`, a run's folder, RUN@STEP, or `hf:gpt2`. Only what
the assistant says counts, a twentieth of the chats is kept for validation, and the run ends where that gets no better.

Expect, from the model of `configs/chat_tiny.py` on the 160 chats of `examples/household_chats.py`: validation loss on
these 5.48 at the start, 0.48 at the end. It forgets meanwhile: on the donor's own validation data from 4.39 to 5.40.
"""

from ml_collections import ConfigDict, config_dict

from configs import chat


def get_config() -> ConfigDict:
    config = chat.get_config()
    config.name = "finetune"
    config.num_steps = 200
    config.batch_size = 8

    for name, value in config.model.items():  # the donor's; a shorter block_size, dropout, dtype and remat can be given
        config.model[name] = config_dict.placeholder(type(value))

    config.optimizer.learning_rate = 3e-4
    config.optimizer.min_learning_rate = 3e-5
    config.optimizer.warmup_steps = 20

    config.data.targets = "assistant"

    config.eval.every = 20
    config.eval.patience = 3
    config.sample.every = 100
    config.checkpoint.every = 100
    config.checkpoint.keep_every = 0
    config.log.every = 10
    config.log.diagnostics_every = 0
    return config
