"""Dialogues and documents as a stream, from files and folders of many formats or a Hugging Face dataset.

Every reader is a generator that holds one dialogue at a time, so memory stays flat for a source far larger
than RAM. A file's format is known by its content. What is no dialogue is refused with the file and line, or
skipped by choice. Training and validation are split by `Dialogue.source`, never by line, so that validation text
is unseen: the five readings of one quote, or the speeches of one scene, all fall on the same side.
"""

import codecs
import hashlib
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt_jax.data import files
from gpt_jax.data.default_corpus import default_files, read_default_corpus
from gpt_jax.data.dialogue import ASSISTANT, END, TEXT, USER, Context, Dialogue, Part
from gpt_jax.data.hugging_face import NO_DATASETS, dataset_name, dataset_rows, load_dataset_or_refuse
from gpt_jax.data.json_files import is_one_after_another, json_lines, json_values
from gpt_jax.data.marked_text import MARKER, read_marked
from gpt_jax.data.names import is_hugging_face
from gpt_jax.data.plain_text import read_documents
from gpt_jax.data.reading import Reading
from gpt_jax.data.rows import read_row, single_rows
from gpt_jax.errors import UserError

HASHED_WHOLE = 2**30  # bytes: larger files are known by their path, size and time of change instead

_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_JSON = re.compile(rb"\s*(\[\s*)*\{\s*\"")  # how a file of rows begins
_TABLES = (".csv", ".tsv")
_PACKED_NAMES = (".gz", ".bz2", ".xz", ".zst")


def read_corpus(source: str, reading: Reading | None = None) -> Iterator[Dialogue]:
    """Streams the dialogues and documents of a source, in its own order.

    Args:
      source: one of
        'default': Stoic quotes with their interpretations, and the plays of Shakespeare;
        'hf:NAME[:SPLIT[:SUBSET]]': a Hugging Face dataset, streamed; SPLIT is 'train' unless given;
        a path of a file: rows of JSON, a line each or in a list or one after another; text with the markers
        `<|user|>`, `<|assistant|>` and `<|end_of_text|>`; or plain text;
        a path of a folder: all of its files, of any of these formats, in the order of their paths.
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
        return _counted(read_default_corpus(), "dialogue of the default corpus", source, reading)
    if is_hugging_face(source):
        return _rows(dataset_rows(source), "a dataset", reading)
    return _files(files.find_files(source), Path(source).expanduser().is_dir(), reading)


def check_source(source: str) -> None:
    """Raises UserError for a source that is not there or whose name means nothing; reads nothing of it."""
    if not source:
        raise UserError("config.data.source is empty: give a file, a folder, 'default' or 'hf:NAME'")
    if source == "default":
        default_files()
    elif is_hugging_face(source):
        dataset_name(source)
        if importlib.util.find_spec("datasets") is None:
            raise UserError(NO_DATASETS.format(source=source))
    else:
        for path in files.find_files(source):
            if not os.access(path, os.R_OK):
                raise UserError(f"data source {source!r} cannot be read: give this user the right to read {path}")


def render(dialogue: Dialogue) -> str:
    """The dialogue as marked text: marker, text, marker, text, ..., `<|end_of_text|>`, with nothing between.

    A document is its text and the end marker, which the part of one that goes on has not.

    Raises:
      UserError: a turn holds a marker as text, so that the result would read back as other turns, or is context.
    """
    if any(isinstance(turn, Context) for turn in dialogue.turns):
        raise UserError(f"dialogue {dialogue.source}: a turn is context, no target; marked text cannot say that")
    if any(MARKER.search(turn.text) for turn in dialogue.turns):
        raise UserError(f"dialogue {dialogue.source}: a turn holds a marker as text; marked text cannot say that")
    texts = (text if role == TEXT else f"<|{role}|>{text}" for role, text in dialogue.turns)
    return "".join(texts) + ("" if isinstance(dialogue, Part) else END)


def is_validation(source: str, fraction: float) -> bool:
    """Whether dialogues of `source` are validation data: a hash, so no other source changes the answer."""
    # An id may hold half of a surrogate pair: it is known by its bytes and never becomes text.
    digest = hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_dialogues(dialogues: Iterable[Dialogue], fraction: float) -> Iterator[tuple[bool, Dialogue]]:
    """Yields each dialogue behind whether it is validation data; see `is_validation`.

    A part of a document whose next part is in the other split ends there: it is whole, so that an end marker closes it.
    """
    before: tuple[bool, Dialogue] | None = None
    for dialogue in dialogues:
        split = is_validation(dialogue.source, fraction)
        if before:
            yield before if before[0] == split else (before[0], Dialogue(*before[1]))
        before = split, dialogue
    if before:
        yield before


def source_fingerprint(source: str) -> str:
    """A string that changes when what `read_corpus(source)` reads changes.

    Files are known by a hash of their content up to 1 GiB in all, and by path, size and time of change above
    (hashing them would cost minutes at each start); a Hugging Face dataset by the hash that its builder
    gives to the revision.

    Raises:
      UserError: as `read_corpus`.
    """
    if source == "default":
        quotes, plays = default_files()
        return files.hash_files([quotes, *plays])
    if is_hugging_face(source):
        name, split, subset = dataset_name(source)
        builder = load_dataset_or_refuse(source, "load_dataset_builder", name, subset)
        return f"{source} {split} {builder.config_id} {builder.hash}"
    paths = files.find_files(source)
    stats = [path.stat() for path in paths]
    if sum(stat.st_size for stat in stats) > HASHED_WHOLE:
        known = [f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(paths, stats, strict=True)]
    else:
        known = [f"{path.suffix} {files.hash_files([path])}" for path in paths]
    return known[0] if len(known) == 1 else hashlib.blake2b("\n".join(known).encode(), digest_size=16).hexdigest()


def source_size(source: str) -> int:
    """The bytes of a source's files as they lie on disk; 0 where that is not known."""
    if source == "default" or is_hugging_face(source):
        return 0
    return sum(path.stat().st_size for path in files.find_files(source))


# ---- files


def _files(paths: list[Path], in_folder: bool, reading: Reading) -> Iterator[Dialogue]:
    before: Dialogue | None = None
    for path in paths:
        try:
            for dialogue in _file(path, reading):
                if before:
                    yield before
                before = dialogue
        except UserError as error:
            if not in_folder or not reading.skips(error):
                raise
            before = before and Dialogue(*before)  # a part of a document whose rest cannot be read is its end
    if before:
        yield before


def _file(path: Path, reading: Reading) -> Iterator[Dialogue]:
    packing = files.packing_of(path)
    packed = f" in {packing}" if packing else ""
    kind = _kind(path)
    if kind == "rows":
        if is_one_after_another(path):
            yield from _rows(json_values(path), f"JSON{packed}", reading)
        else:
            yield from _rows(json_lines(path), f"JSON lines{packed}", reading)
    elif kind == "turns":
        marked = read_marked(files.text_chunks(path), lambda line: f"{path}:{line}", reading)
        yield from _counted(marked, f"dialogue in text with markers{packed}", str(path), reading)
    elif kind == "text":
        documents = read_documents(files.text_chunks(path), lambda line: f"{path}:{line}", reading)
        yield from _counted(documents, f"document (or part of a long one) in plain text{packed}", str(path), reading)
    else:
        reading.empty_files += 1


def _kind(path: Path) -> str:
    """'rows' of JSON, 'turns' with markers or plain 'text', by how the file begins; '' for an empty one."""
    with files.opened(path) as file:
        head = file.read(files.HEAD)
    head = head.removeprefix(codecs.BOM_UTF8)
    begins = head.lstrip()
    if not begins and len(head) < files.HEAD:
        return ""
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix not in _PACKED_NAMES), "")
    if suffix in _TABLES:
        raise UserError(f"{path} is a table: give its folder as hf:FOLDER, which the package datasets reads")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}:1: found byte {head[0]:#04x}: save it as UTF-8")
    if b"\0" in head:
        line = 1 + head[: head.index(b"\0")].count(b"\n")
        raise UserError(f"{path}:{line}: found byte 0x00, which no text has: save it as UTF-8, or take the file out")
    if _JSON.match(begins) or (suffix in _JSON_NAMES and not begins.startswith(b"<|")):
        return "rows"
    if begins.startswith(b"<|im_start|>"):
        raise UserError(
            f'{path} is ChatML, in which no dialogue has an end: write each as a row {{"text": "<|im_start|>..."}}'
        )
    return "turns" if USER.encode() in head or ASSISTANT.encode() in head else "text"


# ---- rows: JSON and Hugging Face datasets


def _text_row(text: str, where: str, source: str | None, reading: Reading) -> list[Dialogue]:
    """The dialogues or documents of a row's text, of which none is left out: a row is read whole or not at all."""

    def place(line: int) -> str:
        return f"{where}, line {line} of 'text'" if line > 1 else where

    strict = Reading()
    reader = read_marked if USER in text or ASSISTANT in text else read_documents
    dialogues = list(reader([text], place, strict, source))
    if not dialogues:
        raise UserError(f"{where}: 'text' is empty: fill it or remove the row")
    reading.parts += strict.parts
    return dialogues


def _rows(values: Iterable[tuple[str, Any]], container: str, reading: Reading) -> Iterator[Dialogue]:
    """The dialogues of values, (where, value) each. A value that is a UserError is a row that could not be read."""
    found = reading.of_a_row()
    for where, row in itertools.chain.from_iterable(single_rows(value, where) for where, value in values):
        try:
            if isinstance(row, UserError):
                raise row
            shape, dialogues = read_row(row, where, found, _text_row)
        except UserError as error:
            if not reading.skips(error):
                raise
            found = reading.of_a_row()
            continue
        reading.add(found)
        yield from _counted(dialogues, f"row of {shape} in {container}", where, reading)


def _counted(dialogues: Iterable[Dialogue], format_: str, where: str, reading: Reading) -> Iterator[Dialogue]:
    for dialogue in dialogues:
        reading.took(format_, where, dialogue)
        yield dialogue
