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

from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.data.token_cache import NEW_TOKENIZER
from gpt_jax.data.tokenizer import load as load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.runs.info import read_info
from gpt_jax.storage.checkpoint_files import CHECKPOINTS, saved_steps
from gpt_jax.training.donor import find_donor, tokenizer_of
from gpt_jax.training.trainable import trained_parameters

FROM_DONOR = "from the donor"  # in run.json: where the run's tokenizer is from
_VOCABULARY_AXIS = {"wte": 0, "head": 1}  # of the parameters that have a row or column a token


def tokenizer_to_keep(config: ConfigDict, workdir: Path) -> Tokenizer | Path | None:
    """The tokenizer that a run must go on with where the config names none, or its file; None: it trains one.

    A run that took its donor's keeps it when it is resumed, with or without `init_from`.

    Raises:
      UserError: it is the donor's, which has none.
    """
    if config.data.tokenizer:
        return None
    if saved_steps(workdir / CHECKPOINTS):
        return workdir / TOKENIZER_FILE if read_info(workdir).get("tokenizer") == FROM_DONOR else None
    if not config.init_from:
        return None
    kept = find_donor(config.init_from).tokenizer
    if isinstance(kept, Path) and not kept.is_file():
        raise UserError(
            f"config.init_from={config.init_from}: {kept} does not exist, so its words are not known: "
            f"give data.tokenizer=PATH if you have it, or data.tokenizer={NEW_TOKENIZER} to train another"
        )
    return kept


def check_same_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError if a run that goes on would read its embeddings by another tokenizer than it was trained with.

    The data's fingerprint does not tell: one trained anew on the same source by another version may be another.
    """
    file = workdir / TOKENIZER_FILE
    if file.is_file() and load_tokenizer(file).to_str() != tokenizer.to_str():
        raise UserError(
            f"the tokenizer made from the data is not the one that the run was trained with, {file}: go on with the "
            f"version of the program that began the run, or in a new --workdir with --config.init_from={workdir}; "
            "if the file was changed since, put it back, or remove it to have it written again"
        )


def check_new_tokens(config: ConfigDict, of_donor: Tokenizer | Path, params: Mapping[str, Any]) -> None:
    """Raises UserError where tokens that the donor does not know would have rows that nothing trains.

    Args:
      of_donor: its tokenizer, or the file of it, which may be missing.
      params: the model's own parameters, or their shapes.
    """
    file, is_trained = config.data.tokenizer, trained_parameters(config)
    still = [name for name in _VOCABULARY_AXIS if name in params and not is_trained(name)]
    if not file or not still:
        return
    told, known = "tokens", tokenizer_of(of_donor)
    if file != NEW_TOKENIZER:
        # A bare checkpoint is taken at the user's word: it is the donor's.
        new = set() if known is None else load_tokenizer(file).get_vocab().keys() - known.get_vocab().keys()
        if not new:
            return
        told = f"{len(new):,} tokens"
    way_out = "leave data.tokenizer empty"
    if known is None:
        way_out = f"its own, {of_donor}, does not exist: give it as data.tokenizer=PATH"
    why = "adapters (config.lora.rank) leave" if config.lora.rank else "config.optimizer.frozen leaves"
    raise UserError(
        f"config.data.tokenizer is {file}, with {told} that are not the donor's, and {why} {' and '.join(still)} as "
        f"begun, so that their rows would never be trained: {way_out}, or have these trained"
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
    of_donor = find_donor(config.init_from, config.data.tokenizer).tokenizer
    known = tokenizer_of(of_donor)
    if known is None and config.data.tokenizer == NEW_TOKENIZER:
        kept = {name: value for name, value in donor.items() if name not in _VOCABULARY_AXIS}
        return kept, f"tokens: {of_donor} does not exist and the tokenizer is new, so no row of a token is taken"
    if known is None:
        return donor, f"tokens: {of_donor} does not exist: {config.data.tokenizer} is taken to be the donor's tokenizer"
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


def fit_positions(donor: dict[str, Any], fresh: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Takes as many positions as both models have from the donor: of a longer one the first.

    Args:
      donor, fresh: as for `map_token_rows`.

    Returns:
      The parameters, and a line about the positions; '' if both have as many.
    """
    name = "wpe"
    shapes = [np.shape(parameters.get(name)) for parameters in (donor, fresh)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1] or shapes[0] == shapes[1]:
        return donor, ""
    (there, _), (here, _) = shapes
    rows = np.array(fresh[name])
    rows[:there] = donor[name][:here]
    new = f", {here - there} are new" if here > there else ""
    return {**donor, name: rows}, f"positions: {min(there, here)} of {here} are the first of the donor's {there}{new}"
