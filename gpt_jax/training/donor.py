"""The model that a run starts from, `config.init_from`: a run's, or `hf:NAME`, a GPT-2 of Hugging Face.

Small files are read when it is looked for, and the parameters when they are asked for.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpt_jax.config import with_defaults
from gpt_jax.data.names import HUGGING_FACE, TOKENIZER_FILE, is_hugging_face
from gpt_jax.data.tokenizer import load as load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.runs.find import find_run
from gpt_jax.runs.info import CONFIG_FILE, read_config


@dataclass(frozen=True)
class Donor:
    """A model to start from.

    name: what `config.init_from` keeps, which means the same tomorrow; `latest` does not. model: its values of
    `config.model` by name, none where they are not known. tokenizer: that of its words, or the file of it, which may be
    missing. read_parameters: gives them as a nested dict of numpy arrays, and a line that says whose they are.
    checkpoint: that they are of; None: another file.
    """

    name: str
    model: Mapping[str, Any]
    tokenizer: Tokenizer | Path
    read_parameters: Callable[[], tuple[dict[str, Any], str]]
    checkpoint: Path | None = None


def find_donor(name: str, tokenizer: str = "") -> Donor:
    """The donor that `config.init_from` names; tokenizer: `config.data.tokenizer`.

    Raises:
      UserError: there is none, or its config cannot be read.
    """
    if is_hugging_face(name):
        return _of_hugging_face(name, tokenizer)
    try:
        found = find_run(name)
    except UserError as error:
        raise UserError(f"config.init_from={name}: {error}; {HUGGING_FACE}NAME is a model of Hugging Face") from None
    return Donor(
        name=str(found.checkpoint),
        model=model_of(found.workdir),
        tokenizer=found.workdir / TOKENIZER_FILE,
        read_parameters=functools.partial(_read_checkpoint, found.checkpoint),
        checkpoint=found.checkpoint,
    )


def tokenizer_of(donor: Tokenizer | Path) -> Tokenizer | None:
    """The tokenizer that `Donor.tokenizer` is, or is the file of; None where that file is missing."""
    if not isinstance(donor, Path):
        return donor
    return load_tokenizer(donor) if donor.is_file() else None


def model_of(workdir: Path) -> dict[str, Any]:
    """The values of `config.model` of a run; none if its folder has no config."""
    saved = read_config(workdir)
    if not saved:
        return {}
    model = {name: value for name, value in with_defaults(saved).items() if name.startswith("model.")}
    if missing := [name for name, value in model.items() if value is None]:
        raise UserError(f"{workdir / CONFIG_FILE} lacks {missing[0]}: put back a good copy")
    return {name.removeprefix("model."): value for name, value in model.items()}


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], str]:
    from gpt_jax.checkpoint import restore_parameters

    return restore_parameters(path)


def _of_hugging_face(name: str, tokenizer: str) -> Donor:
    read = _read_hugging_face(name, with_its_words=not tokenizer)
    return Donor(
        name=name,
        model={"dtype": "float32", "remat": False, **read.model},
        tokenizer=read.tokenizer or read.folder / TOKENIZER_FILE,
        read_parameters=lambda: (dict(read.params), "\n".join((read.description, *read.notes))),
    )


@functools.lru_cache(maxsize=1)  # a start asks several times
def _read_hugging_face(name: str, *, with_its_words: bool) -> Any:
    from gpt_jax.huggingface.donor import read_donor, with_markers

    read = read_donor(name)
    return with_markers(read) if with_its_words else read


def forget_donor() -> None:
    """Gives up the memory of the donor that was read last."""
    _read_hugging_face.cache_clear()
