"""The model that a name on the command line stands for: a run's checkpoint, or a GPT-2 of transformers."""

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.data.names import is_hugging_face
from gpt_jax.errors import UserError
from gpt_jax.huggingface.donor import read_donor
from gpt_jax.inference.load_model import load_for_sampling
from gpt_jax.runs.find import find_run
from gpt_jax.runs.info import read_info


@dataclass(frozen=True)
class OpenedModel:
    """A model with its tokenizer, read from a disk and not yet on a device.

    name: as it was asked for. description: which checkpoint. config: settings as a run has them. end_of_text: the token
    by which its texts end, where its tokenizer has not the markers of a chat. data: what run.json counts of the run's
    validation data, empty if it does not say; None: the model has no data of its own.
    """

    name: str
    description: str
    config: ConfigDict
    params: Any
    tokenizer: Tokenizer
    end_of_text: str | None
    data: dict[str, int] | None


def open_model(name: str) -> OpenedModel:
    """Reads the model that a name stands for: 'hf:' and a folder of transformers, or else a run, see `find_run`.

    Nothing of its folder is written.

    Raises:
      UserError: there is none, or its files are damaged or do not belong together.
    """
    if is_hugging_face(name):
        return _of_transformers(name)
    found = find_run(name)
    config, params, tokenizer, description = load_for_sampling(*found)
    data = read_info(found.workdir).get("data", {}).get("validation", {})
    return OpenedModel(name, description, config, params, tokenizer, None, data)


def _of_transformers(name: str) -> OpenedModel:
    donor = read_donor(name)
    if donor.tokenizer is None:
        raise UserError(f"{donor.folder} has no tokenizer: put its tokenizer.json there")
    donor.tokenizer.encode_special_tokens = True  # what a text spells is text, as for the tokenizers of runs
    donor.tokenizer.no_padding()
    donor.tokenizer.no_truncation()
    model = {**donor.model, "dtype": "float32", "remat": False}
    settings = {"model": model, "backend": "auto", "matmul_precision": "highest", "data": {"targets": "all"}}
    description = "; ".join((donor.description, *donor.notes))
    return OpenedModel(
        name, description, ConfigDict(settings), donor.params, donor.tokenizer, donor.end_of_text, data=None
    )
