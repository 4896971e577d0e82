"""Dialogues as a stream, from the default corpus, a marked text file, JSON or a Hugging Face dataset.

Every reader is a generator that holds one dialogue at a time, so memory stays flat for a source far larger
than RAM. What is no dialogue is refused with the file and line, or skipped by choice. Training and validation
are split by `Dialogue.source`, never by line, so that validation text is unseen: the five readings of one quote,
or the speeches of one scene, all fall on the same side.
"""

import codecs
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt_jax.data.default_corpus import default_files, read_default_corpus
from gpt_jax.data.dialogue import ASSISTANT, END, MARKERS, USER, Context, Dialogue, Turn, add_turn, finish
from gpt_jax.data.rows import Reading, read_row, single_rows
from gpt_jax.errors import UserError

MAX_DIALOGUE = 16 * 2**20  # characters (bytes for a line of JSON): what bounds the memory of a reader
HASHED_WHOLE = 2**30  # bytes: a larger file is known by its path, size and time of change instead

_MARKER = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")
_CHUNK = 2**20  # bytes


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
        return _rows(_hugging_face(source), reading)
    path = _existing_file(source)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return _rows(_json_file(path), reading)
    return _marked(_text_chunks(path), lambda line: f"{path}:{line}", reading)


def check_source(source: str) -> None:
    """Raises UserError for a source that is not there or whose name means nothing; reads nothing of it."""
    if not source:
        raise UserError("config.data.source is empty: give a file, 'default' or 'hf:NAME'")
    if source == "default":
        default_files()
    elif source.startswith("hf:"):
        _hugging_face_name(source)
        if importlib.util.find_spec("datasets") is None:
            raise UserError(_NO_DATASETS.format(source=source))
    elif not os.access(path := _existing_file(source), os.R_OK):
        raise UserError(f"data source {source!r} cannot be read: give this user the right to read {path}")


def render(dialogue: Dialogue) -> str:
    """The dialogue as marked text: marker, text, marker, text, ..., `<|end_of_text|>`, with nothing between.

    Raises:
      UserError: a turn holds a marker as text, so that the result would read back as other turns, or is context.
    """
    if any(isinstance(turn, Context) for turn in dialogue.turns):
        raise UserError(f"dialogue {dialogue.source}: a turn is context, no target; marked text cannot say that")
    if any(_MARKER.search(turn.text) for turn in dialogue.turns):
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
        return _hash_files([quotes, *plays])
    if source.startswith("hf:"):
        name, split, subset = _hugging_face_name(source)
        builder = _load_dataset(source, "load_dataset_builder", name, subset)
        return f"{source} {split} {builder.config_id} {builder.hash}"
    path = _existing_file(source)
    stat = path.stat()
    if stat.st_size > HASHED_WHOLE:
        return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return f"{path.suffix} {_hash_files([path])}"


# ---- marked text


def _text_chunks(path: Path) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield (text := _decode(decoder, chunk, path, line, final=False))
            line += text.count("\n")
        yield _decode(decoder, b"", path, line, final=True)


def _decode(decoder: Any, data: bytes, path: Path, line: int, final: bool) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise UserError(f"{path}:{line}: found byte {error.object[error.start]:#04x}: save it as UTF-8") from None


def _pieces(chunks: Iterable[str], where: Callable[[int], str]) -> Iterator[tuple[int, str, str]]:
    """Yields (line, marker, the text after it) for every marker, and first ('', what stands before any)."""
    line, marker, pending = 1, "", ""
    for chunk in chunks:
        parts = _MARKER.split(pending + chunk)  # text, marker, text, marker, ..., text
        for text, following in zip(parts[:-1:2], parts[1::2], strict=True):
            yield line, marker, text
            line += text.count("\n")
            marker = following
        pending = parts[-1]
        if len(pending) > MAX_DIALOGUE:
            raise UserError(f"{where(line)}: found no marker in {MAX_DIALOGUE:,} characters: {_HOW_MARKED}")
    yield line, marker, pending


_HOW_MARKED = f"write {USER}question{ASSISTANT}answer{END} (JSON lines must be named .jsonl)"


def _marked(
    chunks: Iterable[str], where: Callable[[int], str], reading: Reading, source: str | None = None
) -> Iterator[Dialogue]:
    turns: list[Turn] = []
    size, line, lost = 0, 1, False  # lost: inside a bad dialogue that is skipped
    for line, marker, text in _pieces(chunks, where):
        size += len(text)
        if size > MAX_DIALOGUE:
            raise UserError(f"{where(line)}: the dialogue is over {MAX_DIALOGUE:,} characters: is {END} missing?")
        dialogue = None
        try:
            if marker in (USER, ASSISTANT):
                if not lost:
                    add_turn(turns, Turn(marker[2:-2], text), where(line))
                continue
            if marker == END:
                closed, skipping = turns, lost
                turns, size, lost = [], 0, False
                dialogue = None if skipping else finish(closed, where(line), source)
            if text.strip():
                found = text.strip()[:40]
                raise UserError(f"{where(line)}: found {found!r} outside any dialogue: {_HOW_MARKED}")
        except UserError as error:
            if not reading.skips(error):
                raise
            turns, lost = [], marker in (USER, ASSISTANT)
        if dialogue:
            yield dialogue
    if turns:
        error = UserError(f"{where(line)}: the last dialogue is not closed: write {END} after it")
        if not reading.skips(error):
            raise error


# ---- rows: JSON and Hugging Face datasets


def _marked_row(text: str, where: str, source: str | None) -> Iterator[Dialogue]:
    def place(line: int) -> str:
        return f"{where}, line {line} of 'text'" if line > 1 else where

    return _marked([text], place, Reading(), source)


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


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of JSON lines, or of one that is a single list or objects one after another."""
    with path.open("rb") as file:
        first = b""
        while not first.strip() and (line := file.readline(MAX_DIALOGUE + 1)):
            first = line.removeprefix(codecs.BOM_UTF8)
    first = first.strip()
    if _LIST_OF_ROWS.match(first) or first in (b"[", b"{"):
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return _json_values(path)
    return _json_lines(path)


_LIST_OF_ROWS = re.compile(rb"\[\s*(\[\s*)?\{")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_DIALOGUE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_DIALOGUE:
                raise UserError(f"{where}: the line is over {MAX_DIALOGUE:,} bytes: one dialogue a line")
            decoder = codecs.getincrementaldecoder("utf-8-sig" if number == 1 else "utf-8")()
            try:
                text = _decode(decoder, line, path, number, final=True).strip()
                if text:
                    yield where, json.loads(text)
            except UserError as error:
                yield where, error
            except (ValueError, RecursionError) as error:
                hint = "; remove the comma after it" if text.endswith(",") else ""
                yield where, UserError(f"{where}: found {text[:40]!r}, not a JSON object: {error}{hint}")


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a list, or of a file that has one after another, each with the line that it begins in."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    text, at, line = "", 0, 1
    begun = in_list = closed = False
    for chunk in itertools.chain(_text_chunks(path), [None]):
        text, at = text[at:] + (chunk or ""), 0
        while True:
            start, at = at, between.match(text, at).end()
            line += text.count("\n", start, at)
            if at == len(text):
                break
            if closed:
                raise UserError(f"{path}:{line}: found {text[at : at + 40]!r} after the end of the list")
            if text[at] == "]" if in_list else text[at] == "[" and not begun:
                begun, in_list, closed, at = True, not in_list, in_list, at + 1
                continue
            begun = True
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                if chunk is not None and len(text) - at <= MAX_DIALOGUE:
                    break  # the rest of it is in the next chunk
                line += text.count("\n", at, getattr(error, "pos", at))
                raise UserError(f"{path}:{line}: not valid JSON: {getattr(error, 'msg', error)}") from None
            yield f"{path}:{line}", value
            line += text.count("\n", at, end)
            at = end
    if in_list:
        raise UserError(f"{path}:{line}: the list of rows is not closed: is the file cut?")


def _hugging_face_name(source: str) -> tuple[str, str, str | None]:
    name, split, subset, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise UserError(f"data source {source!r}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:SUBSET")
    return name, split or "train", subset or None


_NO_DATASETS = "data source {source!r} needs the package datasets: pip install 'gpt-jax-vulkan[hf]'"


def _load_dataset(source: str, function: str, *args: Any, **kwargs: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(_NO_DATASETS.format(source=source)) from None
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it raises is said in one line
    try:
        return getattr(datasets, function)(*args, **kwargs)
    except (OSError, ValueError) as error:  # unknown name, split or subset, or no network
        raise UserError(f"data source {source!r}: {' '.join(str(error).split())}") from error


def _hugging_face(source: str) -> Iterator[tuple[str, Any]]:
    name, split, subset = _hugging_face_name(source)
    rows = iter(_load_dataset(source, "load_dataset", name, subset, split=split, streaming=True))
    for number in itertools.count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever the readers of its many file formats raise
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise UserError(f"{source} row {number} or one after it cannot be read: {reason}") from error
        yield f"{source} row {number}", row


# ---- files


def _existing_file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"data source {source!r} {found}: give a file, 'default' or 'hf:NAME'")
    return path


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


# ---- the default corpus
