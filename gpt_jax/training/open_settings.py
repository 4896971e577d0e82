"""Fills in what a config leaves open, from the run that is resumed or the donor; refuses what may not change.

A setting of `config.model` that has no value (None) is the donor's. It knows nothing of JAX, so that a mistake costs no
start of it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax.config import check, check_names, leaves, with_defaults
from gpt_jax.data.names import is_hugging_face
from gpt_jax.data.token_cache import NEW_TOKENIZER
from gpt_jax.data.tokenizer import load as load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.runs.info import read_config
from gpt_jax.storage.checkpoint_files import CHECKPOINTS, saved_steps
from gpt_jax.training.donor import Donor, find_donor, tokenizer_of

_FREE = ("dropout_rate", "dtype", "remat")  # settings of a model that its parameters go with whatever they are
_CHOSEN = (*_FREE, "soft_cap", "vocab_size", "block_size")  # settings that may be others than the donor's
_OF_THE_STATE = ("optimizer.frozen", "lora.rank", "lora.alpha", "lora.targets")  # they say what a checkpoint holds
_OF_THE_LOSS = ("data.targets", "data.weights")  # they say what a loss means: `best` and patience compare all of a run


def fill_in(config: ConfigDict, workdir: Path | None) -> ConfigDict:
    """A copy of a config with all that it leaves open; the folder or the donor is looked at, and nothing is written.

    Args:
      config: one with all settings; those of the model may be None.
      workdir: the run's folder, made or not; None: a new one.

    Raises:
      UserError: a value is impossible by itself, there is no such donor, a setting is not what the run or the donor has
        and must be, or has no value.
    """
    for name, value in check_names(config).items():
        if value is not None or not name.startswith("model."):
            check(name, value)
    filled = config.copy_and_resolve_references().unlock()
    saved = with_defaults(read_config(workdir)) if workdir is not None and saved_steps(workdir / CHECKPOINTS) else {}
    if saved:
        _go_on(filled, saved, workdir)
    elif filled.init_from:
        donor = find_donor(filled.init_from, filled.data.tokenizer)
        filled.init_from = donor.name
        _begin(filled, donor)
    for name, value in filled.model.items():
        if value is None:
            raise UserError(
                f"config.model.{name} has no value: it comes from the donor, so give --config.init_from=RUN or hf:NAME"
            )
    return filled.lock()


def reads_hugging_face(config: ConfigDict, workdir: Path | None) -> bool:
    """Whether `fill_in` reads a model of Hugging Face: a run that goes on reads no donor."""
    goes_on = workdir is not None and bool(saved_steps(workdir / CHECKPOINTS))
    return not goes_on and is_hugging_face(config.init_from)


def follow_num_steps(config: ConfigDict, workdir: Path, given: Mapping[str, Any]) -> None:
    """Lets the schedule of a run end with it, as it did before, where only `num_steps` is changed.

    Args:
      config: that of the run, with what the command line changes in it.
      given: what that is, by name.
    """
    saved = with_defaults(read_config(workdir))
    if "optimizer.decay_steps" not in given and config.optimizer.decay_steps == saved["num_steps"] != config.num_steps:
        config.optimizer.decay_steps = config.num_steps


def _go_on(config: ConfigDict, saved: Mapping[str, Any], workdir: Path) -> None:
    """Takes what is open, and the donor, from the run's own config; refuses what its checkpoints do not go with."""
    began_with = saved["init_from"] or ""
    if config.init_from not in (None, "", began_with):
        more = f", and began with {began_with}" if began_with else ""
        told = f"config.init_from={config.init_from} is not read: the run in {workdir} goes on from its own checkpoint"
        print(f"warning: {told}{more}", file=sys.stderr)
    config.init_from = began_with
    for name, value in config.model.items():
        if value is None:
            config.model[name] = saved[f"model.{name}"]
    fixed = [f"model.{name}" for name in config.model if name not in _FREE]
    fixed += _OF_THE_STATE
    fixed += [name for name in _OF_THE_LOSS if name != "data.weights" or not config.data.validation]
    values = dict(leaves(config))
    for name in fixed:
        if saved[name] is not None and _meaning(name, values[name]) != _meaning(name, saved[name]):
            raise UserError(
                f"the run in {workdir} does not fit this config: {name} was {_plain(saved[name])}, now "
                f"{_plain(values[name])}: give the first, or another --workdir with --config.init_from={workdir}"
            )


def _begin(config: ConfigDict, donor: Donor) -> None:
    """Takes what is open from the donor; refuses values that its parameters do not go with."""
    model, known = config.model, donor.model
    if known and model.embed_dim in (None, known["embed_dim"]) and model.num_heads not in (None, known["num_heads"]):
        raise UserError(
            f"config.model.num_heads is {model.num_heads}, and {known['num_heads']} in {donor.name}, whose parameters "
            f"mean other heads then: give --config.model.num_heads={known['num_heads']}"
        )
    is_open = [name for name, value in model.items() if value is None]
    if not is_open:
        return  # a model of its own, which takes what fits
    if not known:
        raise UserError(
            f"config.init_from={donor.name}: no config.json says what model it is: give config.model.{is_open[0]} and "
            "all others, for example those of configs/chat.py"
        )
    for name, value in model.items():
        if value is None:
            model[name] = _open_size(config, donor) if name == "vocab_size" else known[name]
        elif name not in _CHOSEN and value != known[name]:
            raise UserError(
                f"config.model.{name} is {value}, and {known[name]} in the donor {donor.name}: leave it out; a model "
                "of another shape takes what fits by a config with all of config.model, such as configs/chat.py"
            )
    if model.block_size > known["block_size"]:
        raise UserError(
            f"config.model.block_size is {model.block_size}, and the donor {donor.name} has {known['block_size']} "
            "positions: it can be shorter, not longer"
        )


def _open_size(config: ConfigDict, donor: Donor) -> int:
    """The vocabulary that a config without one means: the donor's, or as large as another tokenizer that it names."""
    file = config.data.tokenizer
    if file in ("", NEW_TOKENIZER):
        return donor.model["vocab_size"]
    given = load_tokenizer(file)
    of_donor = tokenizer_of(donor.tokenizer)
    if of_donor is not None and of_donor.to_str() == given.to_str():
        return donor.model["vocab_size"]
    return given.get_vocab_size()


def _meaning(name: str, value: Any) -> Any:
    """A value such that those of one meaning are equal: of weights the shares, of equal ones nothing."""
    if name != "data.weights":
        return _plain(value)
    return [] if len(set(value)) <= 1 else [round(weight / sum(value), 9) for weight in value]


def _plain(value: Any) -> Any:
    """A value as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value
