"""Dialogues as a stream, from the default corpus, a marked text file, JSON or a Hugging Face dataset.

Every reader is a generator that holds one dialogue at a time, so memory stays flat for a source far larger
than RAM. What is no dialogue is refused with the file and line, or skipped by choice. Training and validation
are split by `Dialogue.source`, never by line, so that validation text is unseen: the five readings of one quote,
or the speeches of one scene, all fall on the same side.
"""

import hashlib
import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

from gpt_jax.data.default_corpus import default_files, read_default_corpus
from gpt_jax.data.dialogue import END, Context, Dialogue
from gpt_jax.data.files import existing_file, hash_files, text_chunks
from gpt_jax.data.hugging_face import NO_DATASETS, dataset_name, dataset_rows, load_dataset_or_refuse
from gpt_jax.data.json_files import json_file
from gpt_jax.data.marked_text import MARKER, read_marked
from gpt_jax.data.reading import Reading
from gpt_jax.data.rows import read_row, single_rows
from gpt_jax.errors import UserError

HASHED_WHOLE = 2**30  # bytes: a larger file is known by its path, size and time of change instead


def read_corpus(source: str, reading: Reading | None = None) -> Iterator[Dialogue]:
    """Streams the dialogues of a source, in its own order.

    Args:
      source: one of
        'default': Stoic quotes with their interpretations, and the plays of Shakespeare;
        'hf:NAME[:SPLIT[:SUBSET]]': a Hugging Face dataset, streamed; SPLIT is 'train' unless given;
        a path ending in .jsonl, .ndjson or .json: an object or a list of messages a line, or a list of them;
        any other path: text with the markers `<|user|>`, `<|assistant|>` and `<|end_of_text|>`.
      reading: what to do about tool calls and bad rows; takes what was found. None: the default choices.

    The formats of a row are in docs/data.md. A system text is put before the first user turn. Markers that
    stand inside messages are plain text: the tokenizer never turns text into a marker, so they cannot forge a
    turn. The source of a dialogue is its row's `id`, or else a digest of its text, so copies of one dialogue
    stay on one side of the split.

    Raises:
      UserError: the source is missing or malformed; names the file, the line and what was found there.
    """
    reading = reading or Reading()
    if source == "default":
        return read_default_corpus()
    if source.startswith("hf:"):
        return _rows(dataset_rows(source), reading)
    path = existing_file(source)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return _rows(json_file(path), reading)
    return read_marked(text_chunks(path), lambda line: f"{path}:{line}", reading)


def check_source(source: str) -> None:
    """Raises UserError for a source that is not there or whose name means nothing; reads nothing of it."""
    if not source:
        raise UserError("config.data.source is empty: give a file, 'default' or 'hf:NAME'")
    if source == "default":
        default_files()
    elif source.startswith("hf:"):
        dataset_name(source)
        if importlib.util.find_spec("datasets") is None:
            raise UserError(NO_DATASETS.format(source=source))
    elif not os.access(path := existing_file(source), os.R_OK):
        raise UserError(f"data source {source!r} cannot be read: give this user the right to read {path}")


def render(dialogue: Dialogue) -> str:
    """The dialogue as marked text: marker, text, marker, text, ..., `<|end_of_text|>`, with nothing between.

    Raises:
      UserError: a turn holds a marker as text, so that the result would read back as other turns, or is context.
    """
    if any(isinstance(turn, Context) for turn in dialogue.turns):
        raise UserError(f"dialogue {dialogue.source}: a turn is context, no target; marked text cannot say that")
    if any(MARKER.search(turn.text) for turn in dialogue.turns):
        raise UserError(f"dialogue {dialogue.source}: a turn holds a marker as text; marked text cannot say that")
    return "".join(f"<|{role}|>{text}" for role, text in dialogue.turns) + END


def is_validation(source: str, fraction: float) -> bool:
    """Whether dialogues of `source` are validation data: a hash, so no other source changes the answer."""
    # An id may hold half of a surrogate pair: it is known by its bytes and never becomes text.
    digest = hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def source_fingerprint(source: str) -> str:
    """A string that changes when what `read_corpus(source)` reads changes.

    Files are known by a hash of their content up to 1 GiB, and by path, size and time of change above
    (hashing them would cost minutes at each start); a Hugging Face dataset by the hash that its builder
    gives to the revision.

    Raises:
      UserError: as `read_corpus`.
    """
    if source == "default":
        quotes, plays = default_files()
        return hash_files([quotes, *plays])
    if source.startswith("hf:"):
        name, split, subset = dataset_name(source)
        builder = load_dataset_or_refuse(source, "load_dataset_builder", name, subset)
        return f"{source} {split} {builder.config_id} {builder.hash}"
    path = existing_file(source)
    stat = path.stat()
    if stat.st_size > HASHED_WHOLE:
        return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return f"{path.suffix} {hash_files([path])}"


def _marked_row(text: str, where: str, source: str | None) -> Iterator[Dialogue]:
    def place(line: int) -> str:
        return f"{where}, line {line} of 'text'" if line > 1 else where

    return read_marked([text], place, Reading(), source)


def _rows(values: Iterable[tuple[str, Any]], reading: Reading) -> Iterator[Dialogue]:
    """The dialogues of values, (where, value) each. A value that is a UserError is a row that could not be read."""
    for where, row in itertools.chain.from_iterable(single_rows(value, where) for where, value in values):
        try:
            if isinstance(row, UserError):
                raise row
            dialogues = list(read_row(row, where, reading, _marked_row))
        except UserError as error:
            if not reading.skips(error):
                raise
            continue
        yield from dialogues
