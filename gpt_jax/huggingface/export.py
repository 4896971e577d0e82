"""Writes a run as a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers read."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.data.tokenizer import marker_ids
from gpt_jax.data.tokenizer import save as save_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.huggingface.gpt2 import config_of, tensors_of
from gpt_jax.huggingface.model_card import Exported, model_card
from gpt_jax.huggingface.tensors import DTYPES, INDEX, MODEL_CONFIG, WEIGHTS, write_tensors
from gpt_jax.huggingface.tokenizer import TOKENIZER_CONFIG, tokenizer_config
from gpt_jax.model.gpt import ModelConfig
from gpt_jax.storage.files import writing

README = "README.md"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class ModelFiles:
    """The names of the files of a model of transformers, by which `in` tells one from what is no such file."""

    _names = (MODEL_CONFIG, "generation_config.json", TOKENIZER_FILE, TOKENIZER_CONFIG, README, WEIGHTS, INDEX)

    def __contains__(self, name: object) -> bool:
        return name in self._names or (isinstance(name, str) and _PART.fullmatch(name) is not None)


MODEL_FILES = ModelFiles()


def parse_size(text: str) -> int:
    """The bytes of a size such as 5GB, 200MB or 1000.

    Raises:
      UserError: it is no size above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper(), re.ASCII)
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1 or size >= 2**63:
        raise UserError(f"--max_shard_size must be a size such as 5GB or 200MB, found {text!a}")
    return size


def check_exportable(config: ConfigDict) -> None:
    """Raises UserError for a model that GPT-2's format cannot say."""
    config_of(ModelConfig.from_config(config.model), 0, "float32")


def write_model(folder: Path, exported: Exported, *, dtype: str, most: int) -> None:
    """Writes all files of a model.

    Args:
      folder: an empty one.
      dtype: of the weights, one of `DTYPES`.
      most: bytes of a file of weights; a single tensor may be larger.

    Raises:
      UserError: GPT-2's format cannot say it, or a parameter is too large for the dtype.
      StorageError: the disk did not take it.
    """
    model = ModelConfig.from_config(exported.config.model)
    user, assistant, end = marker_ids(exported.tokenizer)
    description = config_of(model, end, dtype)
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in tensors_of(exported.params, model).items()}
    write_tensors(folder, tensors, most)
    files = {
        MODEL_CONFIG: description,
        "generation_config.json": generation_config(exported.config.sample, model.block_size, (end, user, assistant)),
        TOKENIZER_CONFIG: tokenizer_config(model.block_size),
    }
    for name, content in files.items():
        _write(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    with writing(folder / TOKENIZER_FILE):
        save_tokenizer(exported.tokenizer, folder / TOKENIZER_FILE)
    _write(folder / README, model_card(exported, dtype))


def generation_config(sample: ConfigDict, block_size: int, ends: tuple[int, int, int]) -> dict[str, Any]:
    """Settings of `generate`: those of the run's samples, but the penalties of presence and frequency, unknown there.

    Args:
      ends: the end of text, and the other markers, which end an answer too.
    """
    temperature = sample.temperature
    return {
        "bos_token_id": ends[0],
        "eos_token_id": list(ends),
        "pad_token_id": ends[0],
        "max_length": block_size,  # without it 20 tokens are made
        "do_sample": temperature > 0,
        **({"temperature": temperature, "top_k": sample.top_k} if temperature > 0 else {}),
        **({"top_p": sample.get("top_p", 1.0), "min_p": sample.get("min_p", 0.0)} if temperature > 0 else {}),
        "repetition_penalty": sample.get("repetition_penalty", 1.0),
    }


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(DTYPES[dtype])
    if not np.isfinite(cast).all():
        raise UserError(f"{name} has numbers that {dtype} cannot hold: export in bfloat16 or float32")
    return cast


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.write_text(text, encoding="utf-8")
