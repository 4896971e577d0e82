"""The rows of a Hugging Face dataset, streamed (extra `hf`)."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from gpt_jax.data.names import HUGGING_FACE
from gpt_jax.errors import UserError


def dataset_name(source: str) -> tuple[str, str, str | None]:
    name, split, subset, *rest = [*source.removeprefix(HUGGING_FACE).split(":"), "", ""]
    if not name or any(rest):
        raise UserError(f"data source {source!r}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:SUBSET")
    return name, split or "train", subset or None


NO_DATASETS = "data source {source!r} needs the package datasets: pip install 'gpt-jax-vulkan[hf]'"


def load_dataset_or_refuse(source: str, function: str, *args: Any, **kwargs: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(NO_DATASETS.format(source=source)) from None
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it raises is said in one line
    try:
        return getattr(datasets, function)(*args, **kwargs)
    except (OSError, ValueError) as error:  # unknown name, split or subset, or no network
        raise UserError(f"data source {source!r}: {' '.join(str(error).split())}") from error


def dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, split, subset = dataset_name(source)
    rows = iter(load_dataset_or_refuse(source, "load_dataset", name, subset, split=split, streaming=True))
    for number in itertools.count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever the readers of its many file formats raise
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise UserError(f"{source} row {number} or one after it cannot be read: {reason}") from error
        yield f"{source} row {number}", row
