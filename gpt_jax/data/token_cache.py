"""The token cache: a corpus, tokenised, on disk.

The cache is a folder named by a fingerprint of the source, how it is read, the tokenizer, the split and
FORMAT_VERSION:
  train.tokens, validation.tokens        ids, uint16 or uint32 (above 65,536 ids), dialogue after dialogue
  train.assistant, validation.assistant  one byte a token: 1 where the assistant says it, 2 where no loss may count it
  tokenizer.json
  stats.json                             counts, notes about what was read, and the CRC-32 of every other file
It is built beside its place and renamed into it, so a killed run leaves no half cache. Every checksum is verified
when it is opened, at 2 GB/s a file.
"""

import contextlib
import dataclasses
import getpass
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from gpt_jax.data import corpus, tokenizer
from gpt_jax.data.dialogue import Dialogue
from gpt_jax.data.reading import Reading
from gpt_jax.errors import UserError
from gpt_jax.log import Log
from gpt_jax.storage.checksum import crc32_of_file, crc32_of_json
from gpt_jax.storage.files import StorageError, explain, replacing
from gpt_jax.storage.json_file import VERSION, read_object
from gpt_jax.storage.lock import wait_for_lock

# Raise it when the same source and tokenizer would give other tokens or files than before.
FORMAT_VERSION = 4

NEW_TOKENIZER = "new"  # in place of a tokenizer's path: trains one, where else the donor's would be taken
TOKENIZER_CHARACTERS = 500_000_000  # what a BPE is trained on at most: its word table must fit in memory

_BATCH_CHARACTERS = 1_000_000  # encoded at a time
_LOG_CHARACTERS = 100_000_000  # between two lines of progress
_ABANDONED = 3600  # seconds without a write after which a build is taken for dead
_FEW = 1000  # different sources are counted up to here
_SPLITS = ("train", "validation")
_ONCE_IN_HOW = {"skipped": 0, "skipped_first": [], "tools": 0, "context": 0, "unread": {}}  # in older fingerprints
_ARRAYS = tuple(f"{split}.{kind}" for split in _SPLITS for kind in ("tokens", "assistant"))
_TOKENIZER = "tokenizer.json"
_CHECKED = (*_ARRAYS, _TOKENIZER)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A stream of N tokens.

    Attributes:
      ids: (N,) uint16 or uint32.
      assistant: (N,) uint8: 1 where the assistant says the token: its text, and the marker that closes it; 2 in
        a turn that is context (OpenAI's weight 0), and in the marker that closes it; else 0.
    """

    ids: np.ndarray
    assistant: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus; the arrays are read-only memory maps of the cache.

    `stats` counts, for each of 'train' and 'validation': `dialogues`, `bytes` of UTF-8 text and `tokens`.
    """

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    fingerprint: str
    stats: dict[str, dict[str, int]]
    notes: tuple[str, ...] = ()  # what was read in another way than as turns that count


def prepare(
    data_config: Any,
    vocab_size: int,
    log: Log = logging.info,
    tokenizer_file: str | Path | None = None,
    expected: str | None = None,
) -> Corpus:
    """Tokenises a corpus, or opens the cache of an earlier call; memory stays flat however large it is.

    Args:
      data_config: a ConfigDict with `source` (see `corpus.read_corpus`), `validation_fraction`,
        `tokenizer` (path of a tokenizer.json; '' or NEW_TOKENIZER trains one on the training split),
        `cache_dir` ('' is gpt_jax in $XDG_CACHE_HOME or ~/.cache), and maybe `tool_calls` and `on_error` (see
        `reading.Reading`).
      vocab_size: the model's; the tokenizer has as many ids or fewer.
      log: takes a line about what is done.
      tokenizer_file: a tokenizer.json to use where `tokenizer` is ''.
      expected: the fingerprint that the data must have, of a run's checkpoint; None: any.

    Raises:
      UserError: the source or the tokenizer cannot be used, is not what is expected, a split is empty, or the cache
        cannot be written.
    """
    fraction = data_config.validation_fraction
    if not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction is {fraction}: it must lie between 0 and 1")
    given = _given_tokenizer(data_config.tokenizer or tokenizer_file, vocab_size)
    choices = {name: data_config[name] for name in ("tool_calls", "on_error") if name in data_config}
    split_and_ids = [fraction, given.to_str() if given else vocab_size]
    fingerprint, *older = _fingerprints(data_config.source, Reading(**choices), split_and_ids)
    if expected not in (None, fingerprint, *older):
        raise UserError(
            f"data source {data_config.source!r}, or how config.data has it read and split, is not what the run's "
            f"checkpoint was trained on (fingerprint {expected}, now {fingerprint}): put both back, or give a new "
            "--workdir with --config.init_from=RUN"
        )
    if expected in older:
        log("data: the checkpoint is of a version that read some rows in another way; the source is the same")
    root = _cache_root(data_config.cache_dir)
    folder = root / fingerprint
    prepared = _open_if_good(folder)
    if not isinstance(prepared, Corpus):
        with _writing_cache(root, data_config.source):
            root.mkdir(parents=True, exist_ok=True)
            with wait_for_lock(_build_lock(folder), log):  # whoever holds it builds the same
                prepared = _open_if_good(folder)
                if not isinstance(prepared, Corpus):
                    if prepared is not None:
                        log(f"warning: the token cache {folder} is damaged ({prepared}): building it again")
                        _remove_any(folder.rename(root / f"{fingerprint}.{uuid.uuid4().hex}.partial"))
                    return _prepare_anew(folder, data_config.source, choices, fraction, given, vocab_size, log)
    log(f"data: using the token cache {folder}")
    _log_facts(prepared, vocab_size, log)
    return prepared


def _given_tokenizer(file: str | Path | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a file; None where one is to be trained. Raises UserError for one of too many ids."""
    if not file or file == NEW_TOKENIZER:
        return None
    given = tokenizer.load(file)
    if given.get_vocab_size() > vocab_size:
        raise UserError(
            f"tokenizer {file} has {given.get_vocab_size()} ids but the model's vocab_size "
            f"is {vocab_size}: raise vocab_size"
        )
    return given


def _fingerprints(source: str, reading: Reading, split_and_ids: list[Any]) -> list[str]:
    """Names of a corpus that is read, split and encoded in one way: that of this version, and those of older ones."""
    content = corpus.source_fingerprint(source)
    how = {"tool_calls": reading.tool_calls, "on_error": reading.on_error}
    now = [FORMAT_VERSION, content, how, *split_and_ids]
    older = [[version, content, how | _ONCE_IN_HOW, *split_and_ids] for version in (3, 2)]
    return [_digest(parts) for parts in (now, *older, [1, content, *split_and_ids])]


def _prepare_anew(
    folder: Path,
    source: str,
    choices: dict[str, str],
    fraction: float,
    given: Tokenizer | None,
    vocab_size: int,
    log: Log,
) -> Corpus:
    log(f"data: preparing {source!r}")
    start = time.monotonic()
    _remove_abandoned(folder.parent, folder.name)
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir()
        _build(partial, source, choices, fraction, given, vocab_size, log)
        try:
            partial.rename(folder)
        except OSError:  # where there are no locks, another run has built the same in the meantime: it is as good
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    prepared = _open(folder)
    log(f"data: prepared in {time.monotonic() - start:.1f} s, cached in {folder}")
    _log_facts(prepared, vocab_size, log)
    return prepared


# ---- the cache


def _digest(identity: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def _cache_root(cache_dir: str) -> Path:
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_jax"


def _build_lock(folder: Path) -> Path:
    """A lock of this user's processes on this machine: it saves work. Builds on two machines do not harm each other."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    place = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"gpt_jax-{user}-{place}.lock"


@contextlib.contextmanager
def _writing_cache(root: Path, source: str) -> Iterator[None]:
    """Turns an OSError of a file that is not the source's into one line."""
    try:
        yield
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(root):
            raise
        failed = f"cannot write the token cache: {error.filename}"
        if not error.filename:  # a read or a write of an open file has no name
            failed = f"cannot read the data source {source!r} or write the token cache {root}"
        raise StorageError(f"{failed}: {explain(error)}, or set data.cache_dir") from error


def _remove_abandoned(root: Path, fingerprint: str) -> None:
    for partial in root.glob(f"{fingerprint}.*.partial"):
        changed = max(path.stat().st_mtime for path in [partial, *partial.glob("*")])
        if time.time() - changed > _ABANDONED:
            _remove_any(partial)


def _remove_any(path: Path) -> None:
    """Removes a folder, or the file that damage left in the place of one, as far as the disk lets it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


class _Output:
    """A new file that knows the CRC-32 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0

    def write(self, array: np.ndarray) -> None:
        written = array.tobytes()
        self.crc = zlib.crc32(written, self.crc)
        self.file.write(written)


def _build(
    folder: Path,
    source: str,
    choices: dict[str, str],
    fraction: float,
    given: Tokenizer | None,
    vocab_size: int,
    log: Log,
) -> None:
    texts = _training_texts(corpus.read_corpus(source, Reading(**choices)), fraction)
    trained = given or tokenizer.train_tokenizer(texts, vocab_size, log)
    dtype = np.dtype(np.uint16 if trained.get_vocab_size() <= 2**16 else np.uint32)
    stats = {split: {"dialogues": 0, "bytes": 0, "tokens": 0} for split in _SPLITS}
    reading, sources = Reading(**choices), set()
    with contextlib.ExitStack() as stack:
        outputs = {name: _Output(stack.enter_context((folder / name).open("wb"))) for name in _ARRAYS}
        characters = logged = 0
        for batch in _batches(corpus.read_corpus(source, reading)):
            for dialogue, (ids, said) in zip(batch, tokenizer.encode_dialogues(trained, batch), strict=True):
                if len(sources) <= _FEW:
                    sources.add(dialogue.source)
                split = _SPLITS[corpus.is_validation(dialogue.source, fraction)]
                outputs[f"{split}.tokens"].write(ids.astype(dtype))
                outputs[f"{split}.assistant"].write(said)
                stats[split]["dialogues"] += 1
                stats[split]["bytes"] += sum(len(turn.text.encode()) for turn in dialogue.turns)
                stats[split]["tokens"] += len(ids)
            characters += sum(_length(dialogue) for dialogue in batch)
            if characters - logged >= _LOG_CHARACTERS:
                logged = characters
                log(f"data: {characters:,} characters tokenised")
    _check_splits(stats, source, fraction, reading, sources)
    tokenizer.save(trained, folder / _TOKENIZER)
    checksums = {name: output.crc for name, output in outputs.items()}
    checksums[_TOKENIZER] = crc32_of_file(folder / _TOKENIZER)
    meta = {
        VERSION: FORMAT_VERSION,
        "dtype": dtype.name,
        "stats": stats,
        "notes": reading.notes(),
        "checksums": checksums,
    }
    meta["checksum"] = _checksum(meta)
    with replacing(folder / "stats.json") as file:
        json.dump(meta, file, indent=2)


def _checksum(meta: dict[str, Any]) -> int:
    """CRC-32 of what stats.json says, but of itself."""
    return crc32_of_json({name: meta[name] for name in meta if name != "checksum"})


def _training_texts(dialogues: Iterable[Dialogue], fraction: float) -> Iterator[str]:
    characters = 0
    for dialogue in dialogues:
        if corpus.is_validation(dialogue.source, fraction):
            continue
        for turn in dialogue.turns:
            yield turn.text
        characters += _length(dialogue)
        if characters > TOKENIZER_CHARACTERS:
            return


def _batches(dialogues: Iterable[Dialogue]) -> Iterator[list[Dialogue]]:
    batch, characters = [], 0
    for dialogue in dialogues:
        batch.append(dialogue)
        characters += _length(dialogue)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _length(dialogue: Dialogue) -> int:
    return sum(len(turn.text) for turn in dialogue.turns)


def _check_splits(
    stats: dict[str, dict[str, int]], source: str, fraction: float, reading: Reading, sources: set[str]
) -> None:
    train, validation = (stats[split]["dialogues"] for split in _SPLITS)
    if not train + validation:
        bad = f": {reading.skipped:,} were skipped, first {reading.skipped_first[0]}" if reading.skipped else ""
        raise UserError(f"data source {source!r} holds no dialogue{bad}")
    if train and validation:
        return
    empty, change = ("training", "lower") if not train else ("validation", "raise")
    if len(sources) == 1 < train + validation:
        [only] = sources
        raise UserError(
            f"data source {source!r}: all {train + validation} dialogues have one source, {only!r}, which is "
            f"never split, so the {empty} split is empty: give unrelated rows an 'id' of their own, or none"
        )
    few = f" of {len(sources)} sources" if len(sources) <= min(_FEW, train + validation - 1) else ""
    raise UserError(
        f"data source {source!r}: none of the {train + validation} dialogues{few} falls in the {empty} split "
        f"at data.validation_fraction={fraction}: {change} it, or give more data"
    )


def _open_if_good(folder: Path) -> Corpus | Exception | None:
    """The cache; or why it is damaged; or None if there is none."""
    if not folder.exists():
        return None
    try:
        return _open(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return error


def _open(folder: Path) -> Corpus:
    """Raises OSError, ValueError, KeyError or TypeError if the cache is not whole."""
    types = {"dtype": str, "stats": dict.fromkeys(_SPLITS, dict), "notes": list, "checksums": dict}
    meta = read_object(folder / "stats.json", FORMAT_VERSION, types)
    if meta["checksum"] != _checksum(meta):
        raise ValueError("stats.json fails its checksum")
    dtypes = {"tokens": np.dtype(meta["dtype"]), "assistant": np.dtype(np.uint8)}
    arrays = {
        name: _map(folder / name, dtypes[name.partition(".")[2]], meta["stats"][name.partition(".")[0]]["tokens"])
        for name in _ARRAYS
    }
    with ThreadPoolExecutor(len(_ARRAYS)) as pool:  # zlib lets go of the interpreter
        for name, crc in zip(_CHECKED, pool.map(lambda name: crc32_of_file(folder / name), _CHECKED), strict=True):
            if meta["checksums"][name] != crc:
                raise ValueError(f"{name} fails its checksum")
    splits = [Tokens(arrays[f"{split}.tokens"], arrays[f"{split}.assistant"]) for split in _SPLITS]
    loaded = tokenizer.load(folder / _TOKENIZER)
    return Corpus(*splits, loaded, folder.name, meta["stats"], tuple(meta["notes"]))


def _map(path: Path, dtype: np.dtype, count: int) -> np.memmap:
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path.name} has {size} bytes, not {expected}")
    return np.memmap(path, dtype, mode="r", shape=(count,))


def _log_facts(prepared: Corpus, vocab_size: int, log: Log) -> None:
    for note in prepared.notes:
        log(f"data: {note}")
    stats = prepared.stats
    log(
        f"data: {sum(stats[split]['dialogues'] for split in _SPLITS):,} dialogues, "
        f"{sum(stats[split]['bytes'] for split in _SPLITS) / 1e6:.1f} MB, "
        f"{len(prepared.train):,} training and {len(prepared.validation):,} validation tokens"
    )
    size = prepared.tokenizer.get_vocab_size()
    if size < vocab_size:
        log(f"data: the tokenizer has {size} ids, the model {vocab_size}: {vocab_size - size} stay unused")
