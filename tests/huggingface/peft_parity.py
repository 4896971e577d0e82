"""Our side of scripts/peft.sh: exports adapters, what they stand beside and both merged, with the logits of each."""

import functools
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from untrained_run import write_adapter_run

from gpt_jax.checkpoint import restore_adapters, restore_parameters
from gpt_jax.export import export
from gpt_jax.model.gpt import GPT, ModelConfig, make_model
from gpt_jax.runs.find import find_run
from gpt_jax.runs.info import read_config

SHAPE = {"model__soft_cap": 0.0, "model__num_layers": 2, "model__embed_dim": 32, "model__num_heads": 2}
MODELS = {
    "tied": {"model__tie_head": True, "model__use_bias": True},
    "untied": {"model__tie_head": False, "lora__targets": ("qkv", "h_1/mlp_out", "*/projection"), "lora__rank": 8},
}


def logits(model: GPT, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits of every place, (B, T, vocab_size): each is that after the last token of a text cut short there."""
    last = functools.partial(model.apply, {"params": params}, method="next_token_logits")
    places = [np.full(len(tokens), place, np.int32) for place in range(tokens.shape[1])]
    return np.stack([np.asarray(jax.jit(last)(tokens, place)) for place in places], axis=1)


def main(work: Path) -> None:
    for name, options in MODELS.items():
        run = write_adapter_run(work / "runs" / name, **SHAPE | options)
        for kind, source in {"merged": run, "base": run / "base"}.items():
            export(find_run(str(source)), str(work / name / kind), dtype="float32", most=10**9, force=False)
        export(find_run(str(run)), str(work / name / "adapter"), dtype="float32", most=10**9, force=False, adapter=True)
        config = ConfigDict(read_config(run))
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, 9)).astype(np.int32)
        plain = GPT(ModelConfig.from_config(config.model))
        merged, base = restore_parameters(run)[0], restore_parameters(run / "base")[0]
        (adapters, _), _ = restore_adapters(run)
        beside = {group: _together(x, adapters.get(group, {})) for group, x in base.items()}
        found = {
            "base": logits(plain, base, tokens),
            "merged": logits(plain, merged, tokens),
            "adapter": logits(make_model(config), beside, tokens),
        }
        np.savez(work / name / "ours.npz", tokens=tokens, **found)
        apart = np.abs(found["merged"] - found["adapter"]).max()
        print(f"{name}: merged and unmerged differ by {apart:.1e} of logits up to {np.abs(found['merged']).max():.1f}")


def _together(base: dict, adapters: dict) -> dict:
    if not isinstance(base, dict):
        return base
    return {name: _together(x, adapters.get(name, {})) for name, x in base.items()} | {
        name: x for name, x in adapters.items() if name not in base
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
