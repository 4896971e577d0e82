"""Reads what a run needs to answer: config, parameters and tokenizer."""

import functools
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.checkpoint import restore_parameters
from gpt_jax.config import check_saved
from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.data.tokenizer import load as load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.model.parameters import check_finite, check_parameters
from gpt_jax.runs.info import CONFIG_FILE, read_config


def load_for_sampling(workdir: Path, checkpoint: Path | None = None) -> tuple[ConfigDict, Any, Tokenizer, str]:
    """Config, parameters, tokenizer and a description of one checkpoint of a run; None: of its best.

    Raises:
      UserError: the folder is no run, has no good checkpoint, or its files do not belong together.
    """
    file = workdir / CONFIG_FILE
    saved = read_config(workdir)
    if not saved:
        raise UserError(f"{workdir} is no run folder: it has no {CONFIG_FILE}")
    check_saved(saved, file)
    config = ConfigDict(saved)
    tokenizer = load_tokenizer(workdir / TOKENIZER_FILE)
    vocabulary = tokenizer.get_vocab_size()
    if vocabulary > config.model.vocab_size:
        raise UserError(
            f"{workdir / 'tokenizer.json'} has {vocabulary} ids, and the model of {file} {config.model.vocab_size}: "
            "put back the tokenizer of the run"
        )
    params, description = restore_parameters(workdir if checkpoint is None else checkpoint)
    model = GPT(ModelConfig.from_config(config.model))
    check_parameters(params, jax.eval_shape(functools.partial(init_params, model, 0)), description)
    check_finite(params, description)
    return config, params, tokenizer, description
