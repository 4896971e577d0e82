"""A GPT-2 of transformers to start from: `config.init_from=hf:FOLDER`, or `hf:NAME` of the Hugging Face hub."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gpt_jax.data.dialogue import END, MARKERS
from gpt_jax.data.names import HUGGING_FACE
from gpt_jax.errors import UserError
from gpt_jax.huggingface.gpt2 import TYPES, is_buffer, model_of, notes_of, parameters_of, settings_of
from gpt_jax.huggingface.tensors import MODEL_CONFIG, read_tensors
from gpt_jax.huggingface.tokenizer import (
    end_of_text,
    has_other_chat_template,
    missing_markers,
    read_tokenizer,
    with_all_markers,
)
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.gpt import ModelConfig
from gpt_jax.model.parameters import check_finite
from gpt_jax.storage.checkpoint_files import CHECKPOINTS
from gpt_jax.storage.json_file import read_object

_VOCABULARY_AXIS = {"wte": 0, "head": 1}  # of the parameters that have a row or column a token
_WANTED = ("*.json", "*.safetensors", "merges.txt", "chat_template.jinja")  # of a model on the hub
_NO_HUB = (
    "{name}: there is no such folder, and models of the Hugging Face hub need the package huggingface_hub: "
    "install the `hf` extra (uv sync --extra hf)"
)


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel:
    """A GPT-2 as its folder has it, in our terms."""

    folder: Path
    params: dict[str, Any]  # our tree, of f32 numpy arrays
    model: Mapping[str, Any]  # values of `config.model`, but dtype and remat
    tokenizer: Tokenizer | None  # as it is there; None: there is none
    end_of_text: str | None  # the token by which its texts end; None: not known
    missing: tuple[str, ...]  # those of the chat's three markers that its tokenizer has not
    description: str  # one line
    notes: tuple[str, ...]  # lines about what of the folder has no counterpart here


def read_donor(name: str) -> HuggingFaceModel:
    """Reads a GPT-2 of transformers, with or without biases, a tied or an own head, in one file or several.

    Args:
      name: 'hf:' and a folder, or the name of a model on the hub; the 'hf:' may be missing.

    Raises:
      UserError: there is no such model, it is no GPT-2, it has an option that ours has not, or a file is damaged.
      StorageError: a file cannot be read.
    """
    folder = find_folder(name.removeprefix(HUGGING_FACE))
    file = folder / MODEL_CONFIG
    raw = read_object(file, known=None, types=TYPES)
    settings = settings_of(raw, file)
    model = model_of(settings, file)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None and (most := max(tokenizer.get_vocab().values(), default=0)) >= model["vocab_size"]:
        raise UserError(
            f"{folder}: its tokenizer has a token of number {most}, and its config.json a vocab_size of "
            f"{model['vocab_size']}: they do not belong together"
        )
    notes = notes_of(settings)
    if has_other_chat_template(folder):
        notes.append(f"its own chat template is not used: a chat is written with {', '.join(MARKERS)} here")
    tensors, kinds = read_tensors(folder, is_buffer)
    params = parameters_of(tensors, settings, ModelConfig.from_config(model), str(folder))
    check_finite(params, str(folder))
    count = sum(leaf.size for leaf in named_leaves(params).values())
    return HuggingFaceModel(
        folder=folder,
        params=params,
        model=model,
        tokenizer=tokenizer,
        end_of_text=end_of_text(folder, tokenizer, raw),
        missing=() if tokenizer is None else missing_markers(tokenizer),
        description=f"{folder}, a GPT-2 of transformers: {count:,} parameters, stored as {kinds}",
        notes=tuple(notes),
    )


def with_markers(donor: HuggingFaceModel) -> HuggingFaceModel:
    """The donor with a tokenizer that has the chat's three markers.

    What it lacked comes after its other tokens, and its vocabulary grows where there is no room. The row of the end of
    text is that of its own end of text; that of another marker is the mean of those of its word, such as `user`: where
    nothing trains them, they differ all the same.

    Raises:
      UserError: it has no tokenizer.
    """
    if donor.tokenizer is None:
        raise UserError(f"{donor.folder} has no tokenizer: put its tokenizer.json there")
    if not donor.missing:
        return donor
    tokenizer, added = with_all_markers(donor.tokenizer)
    numbers = {marker: tokenizer.token_to_id(marker) for marker in added}
    size = max(donor.model["vocab_size"], *(number + 1 for number in numbers.values()))
    known = sorted(set(donor.tokenizer.get_vocab().values()))  # for a tokenizer that cannot spell a word
    words = {
        marker: donor.tokenizer.encode(marker.strip("<|>"), add_special_tokens=False).ids or known for marker in added
    }
    end = None if donor.end_of_text is None else donor.tokenizer.token_to_id(donor.end_of_text)
    params = dict(donor.params)
    for name, axis in _VOCABULARY_AXIS.items():
        if name not in params:
            continue
        rows = np.moveaxis(params[name], axis, 0)
        grown = np.zeros((size, rows.shape[1]), np.float32)
        grown[: len(rows)] = rows
        for marker, number in numbers.items():
            copied = marker == END and end is not None
            grown[number] = rows[end] if copied else rows[words[marker]].mean(axis=0, dtype=np.float64)
        params[name] = np.ascontiguousarray(np.moveaxis(grown, 0, axis))
    note = f"its tokenizer lacks {', '.join(added)}: their rows begin as its own end of text, or as the words in them"
    return dataclasses.replace(
        donor,
        params=params,
        model={**donor.model, "vocab_size": size},
        tokenizer=tokenizer,
        missing=(),
        notes=(*donor.notes, note),
    )


def find_folder(name: str) -> Path:
    """The folder of a model: a local one, or the one that huggingface_hub keeps of a model of that name.

    Raises:
      UserError: there is none.
    """
    if not name:
        raise UserError(
            f"{HUGGING_FACE} names no model: give {HUGGING_FACE}FOLDER, or {HUGGING_FACE}NAME of the Hugging Face hub"
        )
    folder = Path(name).expanduser()
    if os.path.isdir(folder):
        if (folder / CHECKPOINTS).is_dir():
            raise UserError(
                f"{folder} is a run of this program, and no model of transformers: leave out {HUGGING_FACE}"
            )
        if not (folder / MODEL_CONFIG).is_file():
            raise UserError(f"{folder} is no model of transformers: it has no config.json")
        return folder
    if os.path.exists(folder) or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise UserError(f"{HUGGING_FACE}{name}: there is no folder {folder}")
    return _of_hub(name)


def _of_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(_NO_HUB.format(name=f"{HUGGING_FACE}{name}")) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # it and what it stands on have a dozen of them
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{HUGGING_FACE}{name}: there is no folder {name}, and the Hugging Face hub did not give a model of that "
            f"name: {cause}"
        ) from None
