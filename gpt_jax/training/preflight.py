"""Finds what must fail before any work is done: it reads small files and shapes, and writes nothing."""

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.checkpoint import CHECKPOINTS, check_donor, check_newest
from gpt_jax.data import tokenizer
from gpt_jax.data.token_cache import NEW_TOKENIZER, check_sources
from gpt_jax.errors import UserError
from gpt_jax.model.lora import LoraConfig, check_targets
from gpt_jax.runs.folder import unwritable
from gpt_jax.runs.info import read_config, read_info
from gpt_jax.runs.tracker_services import check_service
from gpt_jax.runs.webhook import resolve as resolve_webhook
from gpt_jax.training.adapters import saved_part
from gpt_jax.training.donor import find_donor
from gpt_jax.training.finetune import check_new_tokens, tokenizer_to_keep
from gpt_jax.training.trainable import check_patterns

_TRAINED = (None, "", NEW_TOKENIZER)  # values that name no file


def check_start(config: ConfigDict, workdir: Path, abstract_state: Any) -> dict[str, Any] | None:
    """Checks what a run starts from: its folder, the files that the config names and the checkpoints it goes on from.

    Args:
      config: one that `validate` took.
      workdir: the run's folder, made or not.
      abstract_state: shapes and dtypes of the train state.

    Returns:
      The position in the folder's newest checkpoint; None if it has none.

    Raises:
      UserError: one of them cannot be used.
    """
    if lora := LoraConfig.from_config(config):
        check_targets(lora, config.model.num_layers)
    check_service(config.log.tracker)
    resolve_webhook(config.log.webhook)
    check_folder(workdir)
    read_info(workdir)
    read_config(workdir)
    check_sources(config.data)
    check_patterns(config, abstract_state.params)
    position = check_newest(workdir / CHECKPOINTS, saved_part(abstract_state, config))
    if position is None and config.init_from:
        donor = find_donor(config.init_from, config.data.tokenizer)
        try:
            if donor.checkpoint is not None:
                check_donor(donor.checkpoint, abstract_state.params)
        except UserError as error:
            raise UserError(f"config.init_from={config.init_from}: {error}") from None
        check_new_tokens(config, donor.tokenizer, abstract_state.params)
    check_tokenizer(config, tokenizer_to_keep(config, workdir))
    return position


def check_folder(workdir: Path) -> None:
    """Raises UserError if the folder cannot be made, or nothing can be written in it."""
    try:
        place = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    except OSError as error:  # a name too long for the system
        raise unwritable(workdir, error) from None
    if not place.is_dir():
        raise UserError(f"cannot write to the run folder: {place} is a file; choose another --workdir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the run folder: nothing can be made in {place}; choose another --workdir")


def check_tokenizer(config: ConfigDict, kept: Tokenizer | Path | None = None) -> None:
    """Raises UserError if the tokenizer cannot be read, or has no room in the model's vocabulary.

    kept: what `finetune.tokenizer_to_keep` says.
    """
    size, file = config.model.vocab_size, config.data.tokenizer or kept
    if not isinstance(file, Tokenizer) and file in _TRAINED:
        smallest = tokenizer.SMALLEST_VOCABULARY
        if size < smallest:
            raise UserError(
                f"config.model.vocab_size is {size}: a byte-level tokenizer needs {smallest} or more "
                f"({smallest - 3} bytes and 3 markers)"
            )
        return
    ids = tokenizer.load(file).get_vocab_size()
    if ids > size:
        name = "of the donor" if isinstance(file, Tokenizer) else file
        raise UserError(f"tokenizer {name} has {ids} ids but the model's vocab_size is {size}: raise vocab_size")
