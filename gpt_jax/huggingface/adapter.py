"""Adapters in the layout of the library `peft`, which loads them on top of the exported model that they stand beside.

GPT-2's linear layers are `Conv1D` there, whose matrices are (in, out) as ours are: `fan_in_fan_out`. Those of adapters
lie the other way round, as of any linear layer of torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gpt_jax.huggingface.gpt2 import BASE, LINEAR_NAMES
from gpt_jax.huggingface.tensors import save_tensors
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.lora import LINEAR_LAYERS, A, B, adapted_layers
from gpt_jax.storage.files import writing

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def adapter_tensors(adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a `peft` model: lora_A (rank, in) and lora_B (out, rank) of each adapted layer."""
    leaves = named_leaves(adapters)
    tensors = {}
    for layer in adapted_layers(leaves):
        for ours, theirs in ((A, "lora_A"), (B, "lora_B")):
            name = f"base_model.model.{BASE}{module_name(layer)}.{theirs}.weight"
            tensors[name] = leaves[f"{layer}/{ours}"].T
    return tensors


def module_name(layer: str) -> str:
    """GPT-2's name of a linear layer: `h.0.attn.c_attn` for `h_0/qkv`."""
    block, _, name = layer.partition("/")
    return f"{block.replace('_', '.')}.{LINEAR_NAMES[name]}"


def target_modules(layers: list[str], num_layers: int) -> list[str]:
    """The adapted layers as `peft` looks for them: by the end of a module's name, so as few as say which they are."""
    found: list[str] = []
    for name in LINEAR_LAYERS:
        adapted = [layer for layer in layers if layer.endswith(f"/{name}")]
        found += [LINEAR_NAMES[name]] if len(adapted) == num_layers else map(module_name, adapted)
    return found


def adapter_config(adapters: Mapping[str, Any], scale: float, config: ConfigDict) -> dict[str, Any]:
    """The adapter_config.json of adapters whose output is multiplied by `scale`; config: their run's."""
    leaves = named_leaves(adapters)
    layers = adapted_layers(leaves)
    rank = leaves[f"{layers[0]}/{A}"].shape[1]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # a donor gets the markers of a chat here: the base is an export of RUN/base
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": config.lora.dropout,
        "target_modules": target_modules(layers, config.model.num_layers),
        "fan_in_fan_out": True,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }


def write_adapter(folder: Path, adapters: Mapping[str, Any], scale: float, config: ConfigDict) -> None:
    """Writes both files of adapters into an empty folder.

    Raises:
      StorageError: the disk did not take it.
    """
    text = json.dumps(adapter_config(adapters, scale, config), indent=2) + "\n"
    with writing(folder / ADAPTER_CONFIG):
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    save_tensors(folder / ADAPTER_WEIGHTS, adapter_tensors(adapters))
