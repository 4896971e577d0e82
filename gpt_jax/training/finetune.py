"""Keeps what a donor's parameters mean: the tokenizer that they were trained with, and their rows under another one.

Row i of the embedding is the token that the donor's tokenizer calls i. Under another tokenizer i is another text, so
a row goes where the same bytes went, and never where the same number is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.checkpoint import CHECKPOINTS, saved_steps
from gpt_jax.data.token_cache import NEW_TOKENIZER
from gpt_jax.data.tokenizer import load as load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.runs.info import read_info

FROM_DONOR = "from the donor"  # in run.json: where the run's tokenizer is from
_TOKENIZER = "tokenizer.json"
_VOCABULARY_AXIS = {"wte": 0, "head": 1}  # of the parameters that have a row or column a token


def run_of(path: str | Path) -> Path:
    """The folder of a run, which `path` is, or its `checkpoints`, or one of these."""
    path = Path(path).resolve()
    if path.name == CHECKPOINTS:
        return path.parent
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def tokenizer_to_keep(config: ConfigDict, workdir: Path) -> Path | None:
    """The tokenizer that a run must go on with where the config names none; None: it trains one.

    A run that took its donor's keeps it when it is resumed, with or without `init_from`.

    Raises:
      UserError: it is the donor's, which has none.
    """
    if config.data.tokenizer:
        return None
    if saved_steps(workdir / CHECKPOINTS):
        return workdir / _TOKENIZER if read_info(workdir).get("tokenizer") == FROM_DONOR else None
    if not config.init_from:
        return None
    file = run_of(config.init_from) / _TOKENIZER
    if not file.is_file():
        raise UserError(
            f"config.init_from={config.init_from}: {file} does not exist, so its words are not known: "
            f"give data.tokenizer=PATH if you have it, or data.tokenizer={NEW_TOKENIZER} to train another"
        )
    return file


def check_same_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError if a run that goes on would read its embeddings by another tokenizer than it was trained with.

    The data's fingerprint does not tell: one trained anew on the same source by another version may be another.
    """
    file = workdir / _TOKENIZER
    if file.is_file() and load_tokenizer(file).to_str() != tokenizer.to_str():
        raise UserError(
            f"the tokenizer made from the data is not the one that the run was trained with, {file}: go on with the "
            f"version of the program that began the run, or in a new --workdir with --config.init_from={workdir}; "
            "if the file was changed since, put it back, or remove it to have it written again"
        )


def map_token_rows(
    donor: dict[str, Any], fresh: Mapping[str, Any], config: ConfigDict, tokenizer: Tokenizer
) -> tuple[dict[str, Any], str]:
    """Moves the rows of a donor's embedding and head to where `tokenizer` has the same tokens.

    Args:
      donor: from `restore_parameters`.
      fresh: the model's own parameters; their rows stay where a token is new.

    Returns:
      The parameters, and a line about the rows; '' if they stay where they were.
    """
    file = run_of(config.init_from) / _TOKENIZER
    if file.is_file():
        known = load_tokenizer(file)
    elif config.data.tokenizer == NEW_TOKENIZER:
        kept = {name: value for name, value in donor.items() if name not in _VOCABULARY_AXIS}
        return kept, f"tokens: {file} does not exist and the tokenizer is new, so no row of a token is taken"
    else:
        return donor, f"tokens: {file} does not exist: {config.data.tokenizer} is taken to be the donor's tokenizer"
    if known.to_str() == tokenizer.to_str() and all(
        donor[name].shape == fresh[name].shape for name in _VOCABULARY_AXIS if name in donor and name in fresh
    ):
        return donor, ""
    ids = known.get_vocab()
    pairs = np.array([(new, ids[text]) for text, new in tokenizer.get_vocab().items() if text in ids]).reshape(-1, 2)
    moved = dict(donor)
    for name, axis in _VOCABULARY_AXIS.items():
        if name in donor and name in fresh and donor[name].shape[1 - axis] == fresh[name].shape[1 - axis]:
            new, old = pairs[pairs[:, 1] < donor[name].shape[axis]].T
            rows = np.moveaxis(np.array(fresh[name]), axis, 0)
            rows[new] = np.moveaxis(donor[name], axis, 0)[old]
            moved[name] = np.moveaxis(rows, 0, axis)
    size = tokenizer.get_vocab_size()
    return moved, (
        f"tokens: {len(pairs):,} of {size:,} are the donor's too and take its rows, {size - len(pairs):,} are new"
    )
