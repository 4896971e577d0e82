"""The folder of a run whose model was never trained: what a command that answers needs, in a second."""

from pathlib import Path

import jax
from tiny_run import tiny

from gpt_jax.checkpoint import CHECKPOINTS, Checkpointer
from gpt_jax.data.tokenizer import save, train_tokenizer
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.runs.info import CONFIG_FILE, write_json


def write_untrained_run(folder: Path, steps: int = 2, **changes) -> Path:
    """Writes a run with so many checkpoints, of another seed each; the first has the lowest loss."""
    config = tiny(folder / "no corpus", **{"model__block_size": 32, **changes})
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_FILE, config.to_dict())
    save(train_tokenizer(["a question and an answer, another question"] * 3, 270), folder / "tokenizer.json")
    model = GPT(ModelConfig.from_config(config.model))
    with Checkpointer(folder / CHECKPOINTS, keep_last=steps, keep_every=None) as checkpointer:
        for step in range(1, steps + 1):
            params = jax.jit(init_params, static_argnums=(0, 1))(model, step)
            checkpointer.save(step, {"params": params}, {}, validation_loss=float(step))
    return folder
