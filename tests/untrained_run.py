"""The folder of a run whose model was never trained: what a command that answers needs, in a second."""

from pathlib import Path

import jax
import numpy as np
from tiny_run import tiny

from gpt_jax.checkpoint import ADAPTS, BASE, CHECKPOINTS, Checkpointer, save_base
from gpt_jax.data.tokenizer import save, train_tokenizer
from gpt_jax.model.gpt import GPT, ModelConfig, init_params, make_model
from gpt_jax.model.lora import LoraConfig, is_adapter
from gpt_jax.runs.info import CONFIG_FILE, write_json
from gpt_jax.training.trainable import partition


def write_untrained_run(folder: Path, steps: int = 2, **changes) -> Path:
    """Writes a run with so many checkpoints, of another seed each; the first has the lowest loss."""
    config = tiny(folder / "no corpus", **{"model__block_size": 32, **changes})
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_FILE, config.to_dict())
    save(train_tokenizer(["a question and an answer, another question"] * 3, 270), folder / "tokenizer.json")
    model, init = GPT(ModelConfig.from_config(config.model)), jax.jit(init_params, static_argnums=0)
    with Checkpointer(folder / CHECKPOINTS, keep_last=steps, keep_every=None) as checkpointer:
        for step in range(1, steps + 1):
            params = init(model, step)
            checkpointer.save(step, {"params": params}, {}, validation_loss=float(step))
    return folder


def write_adapter_run(folder: Path, **changes) -> Path:
    """Writes a run of adapters that are random numbers, with one checkpoint and what they stand beside."""
    changes = {"model__block_size": 32, "lora__rank": 4, "lora__alpha": 6.0, "init_from": "a donor", **changes}
    config = tiny(folder / "no corpus", **changes)
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_FILE, config.to_dict())
    save(train_tokenizer(["a question and an answer, another question"] * 3, 270), folder / "tokenizer.json")
    shapes = jax.eval_shape(lambda: init_params(make_model(config), 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    adapters, base = partition(params, is_adapter)
    position = {ADAPTS: {BASE: save_base(folder, base), "scale": LoraConfig.from_config(config).scale}}
    with Checkpointer(folder / CHECKPOINTS, keep_last=1, keep_every=None) as checkpointer:
        checkpointer.save(1, {"params": adapters}, position)
    return folder
