"""The model that a name on the command line stands for: a run's checkpoint."""

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.inference.load import load_for_sampling
from gpt_jax.runs.find import find_run
from gpt_jax.runs.info import read_info


@dataclass(frozen=True)
class OpenedModel:
    """A model with its tokenizer, read from a disk and not yet on a device.

    name: as it was asked for. description: which checkpoint. config: settings as a run has them. data: what run.json
    counts of the run's validation data, empty if it does not say; None: the model has no data of its own.
    """

    name: str
    description: str
    config: ConfigDict
    params: Any
    tokenizer: Tokenizer
    data: dict[str, int] | None


def open_model(name: str) -> OpenedModel:
    """Reads the model that a name stands for, see `find_run`. Nothing of its folder is written.

    Raises:
      UserError: there is none, or its files are damaged or do not belong together.
    """
    found = find_run(name)
    config, params, tokenizer, description = load_for_sampling(*found)
    data = read_info(found.workdir).get("data", {}).get("validation", {})
    return OpenedModel(name, description, config, params, tokenizer, data)
