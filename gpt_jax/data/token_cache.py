"""The token cache: sources, tokenised, on disk.

A trained tokenizer and the tokens of a source each have a folder, named by a digest of all that it follows from: for a
tokenizer the sources, how they are read and split, and its size; for tokens the source, how it is read and split, and
the tokenizer itself, so that one from another run or file gives the same folder. FORMAT_VERSION is part of both.
A folder of tokens has, for each split:
  *.tokens     ids, uint16 or uint32 (above 65,536 ids), text after text
  *.assistant  one byte a token: 1 where the assistant says it, 2 where no loss may count it
  *.texts      a digest of each text, uint64
and tokenizer.json, and stats.json: counts, and lines about what was read.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gpt_jax.data import corpus, tokenizer
from gpt_jax.data.cache_folder import ChecksummedFile, map_array, open_or_build, read_facts, write_facts, writing_cache
from gpt_jax.data.dialogue import Dialogue
from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.data.reading import Reading
from gpt_jax.errors import UserError
from gpt_jax.log import Log
from gpt_jax.storage.checksum import crc32_of_file

# Raise it when the same source and tokenizer would give other tokens or files than before.
FORMAT_VERSION = 6

NEW_TOKENIZER = "new"  # in place of a tokenizer's path: trains one, where else the donor's would be taken
TOKENIZER_CHARACTERS = 500_000_000  # what a BPE is trained on at most: its word table must fit in memory

_BATCH_CHARACTERS = 1_000_000  # encoded at a time
_LOG_CHARACTERS = 100_000_000  # between two lines of progress
_FEW = 1000  # different sources are counted up to here
_COMPARED = 2**16  # texts compared at a time
_SPLITS = ("train", "validation")
_ONCE_IN_HOW = {"skipped": 0, "skipped_first": [], "tools": 0, "context": 0, "unread": {}}  # in older fingerprints
_ARRAYS = tuple(f"{split}.{kind}" for split in _SPLITS for kind in ("tokens", "assistant", "texts"))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A stream of N tokens of one source.

    Attributes:
      ids: (N,) uint16 or uint32.
      assistant: (N,) uint8: 1 where the assistant says the token: its text, and the marker that closes it; 2 in
        a turn that is context (OpenAI's weight 0), and in the marker that closes it; else 0.
      name: the source.
      weight: its share of what a model is shown, among the streams of its split.
    """

    ids: np.ndarray
    assistant: np.ndarray
    name: str = ""
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus, of one source or of several; the arrays are read-only memory maps of the cache.

    `stats` counts, for each of 'train' and 'validation': `dialogues`, `bytes` of UTF-8 text and `tokens`; `by_source`
    does so for each source of several.
    """

    train: tuple[Tokens, ...]
    validation: tuple[Tokens, ...]
    tokenizer: Tokenizer
    fingerprint: str
    stats: dict[str, dict[str, int]]
    by_source: dict[str, dict[str, dict[str, int]]]


@dataclasses.dataclass(frozen=True)
class _Request:
    """All that a corpus follows from.

    fraction: share of the sources of a source that are validation data; not used where `validation`, a source, is.
    how: choices of `Reading`. given: None trains a tokenizer of `vocab_size` ids.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]  # sum to 1
    validation: str
    fraction: float
    how: dict[str, str]
    given: Tokenizer | None
    vocab_size: int

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """The fingerprint of each source."""
        return {source: corpus.source_fingerprint(source) for source in filter(None, (*self.sources, self.validation))}

    @property
    def title(self) -> str:
        return " and ".join(map(repr, self.contents))

    def fingerprints(self) -> list[str]:
        """Names of the corpus: that of this version, and those of older ones."""
        contents = [self.contents[source] for source in self.sources]
        content: Any = contents[0] if len(contents) == 1 else contents
        split: Any = ["validation", self.contents[self.validation]] if self.validation else self.fraction
        rest = [split, self.given.to_str() if self.given else self.vocab_size]
        how = self.how
        older = [
            *([version, content, how] for version in (5, 4)),
            *([version, content, how | _ONCE_IN_HOW] for version in (3, 2)),
            [1, content],
        ]
        return [_digest([*first, *rest]) for first in ([FORMAT_VERSION, content, how], *older)]


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """All that the tokens of one source follow from. fraction: 0 has all for training, 1 all for validation."""

    source: str
    content: str  # what the source is known by
    fraction: float
    how: dict[str, str]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, request: _Request, source: str, fraction: float, chosen: Tokenizer) -> "_Recipe":
        return cls(source, request.contents[source], fraction, request.how, chosen)

    def fingerprint(self) -> str:
        return _digest([FORMAT_VERSION, self.content, self.how, self.fraction, self.tokenizer.to_str()])


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An opened folder of tokens; `arrays` by name. source: as it was called when it was read, which lines name."""

    arrays: dict[str, np.ndarray]
    stats: dict[str, dict[str, int]]
    taken: list[str]
    notes: list[str]
    source: str

    def called(self, source: str) -> "_Entry":
        """The same content under another name: places in lines, which begin with it, begin with that."""
        if self.source in ("", source):
            return self
        before, now = (str(Path(name).expanduser()) for name in (self.source, source))
        place = re.compile(rf"^(  |read .*?; the first, ){re.escape(before)}(?=[:/])")
        taken, notes = (
            [place.sub(lambda found: found[1] + now, line) for line in lines] for lines in (self.taken, self.notes)
        )
        return dataclasses.replace(self, taken=taken, notes=notes, source=source)


def prepare(
    data_config: Any,
    vocab_size: int,
    log: Log = logging.info,
    tokenizer_file: str | Path | None = None,
    expected: str | None = None,
) -> Corpus:
    """Tokenises a corpus, or opens the cache of an earlier call; memory stays flat however large it is.

    Args:
      data_config: a ConfigDict with `source` (see `corpus.read_corpus`) or, in its place, `mixture` and `weights`,
        `validation_fraction` or `validation`, a source of its own,
        `tokenizer` (path of a tokenizer.json; '' or NEW_TOKENIZER trains one on the training split),
        `cache_dir` ('' is gpt_jax in $XDG_CACHE_HOME or ~/.cache), and maybe `tool_calls` and `on_error` (see
        `reading.Reading`).
      vocab_size: the model's; the tokenizer has as many ids or fewer.
      log: takes a line about what is done.
      tokenizer_file: a tokenizer.json to use where `tokenizer` is ''.
      expected: the fingerprint that the data must have, of a run's checkpoint; None: any.

    Raises:
      UserError: a source or the tokenizer cannot be used, is not what is expected, a split is empty, or the cache
        cannot be written.
    """
    request = _request(data_config, vocab_size, tokenizer_file)
    fingerprint, *older = request.fingerprints()
    if expected not in (None, fingerprint, *older):
        raise UserError(
            f"data source {request.title}, or how config.data has it read and split, is not what the run's "
            f"checkpoint was trained on (fingerprint {expected}, now {fingerprint}): put both back, or give a new "
            "--workdir with --config.init_from=RUN"
        )
    if expected in older:
        log("data: the checkpoint is of a version that read some rows in another way; the source is the same")
    root = _cache_root(data_config.cache_dir)
    with writing_cache(root, " and ".join(request.contents)), _tokenizer_of(request, root, log) as chosen:
        fraction = 0.0 if request.validation else request.fraction
        train = {
            source: _tokens(_Recipe.of(request, source, fraction, chosen), root, log) for source in request.sources
        }
        validation = train
        if request.validation:
            own = _Recipe.of(request, request.validation, 1.0, chosen)
            validation = {request.validation: _tokens(own, root, log)}
    prepared = _corpus(request, train, validation, chosen, fingerprint)
    _log_facts(prepared, train | validation, vocab_size, log)
    _warn_of_repeats(train, validation, log)
    return prepared


def sources_of(data_config: Any) -> tuple[str, ...]:
    """The sources that a model is trained on."""
    return tuple(data_config.get("mixture") or ()) or (data_config.source,)


def check_sources(data_config: Any) -> None:
    """Raises UserError for a source, one to validate on too, that is not there; reads nothing of it."""
    for source in (*sources_of(data_config), *filter(None, [data_config.validation])):
        corpus.check_source(source)


def _request(data_config: Any, vocab_size: int, tokenizer_file: str | Path | None) -> _Request:
    fraction = data_config.validation_fraction
    if not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction is {fraction}: it must lie between 0 and 1")
    sources = sources_of(data_config)
    weights = tuple(data_config.get("weights") or ()) or (1.0,) * len(sources)
    request = _Request(
        sources,
        tuple(weight / sum(weights) for weight in weights),
        data_config.get("validation", ""),
        fraction,
        {name: data_config.get(name, default) for name, default in (("tool_calls", "text"), ("on_error", "stop"))},
        _given_tokenizer(data_config.tokenizer or tokenizer_file, vocab_size),
        vocab_size,
    )
    known: dict[str, str] = {}
    for source in sources:
        if other := known.get(request.contents[source]):
            raise UserError(f"data.mixture has {other!r} twice, then as {source!r}: raise its weight instead")
        known[request.contents[source]] = source
    return request


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


def _digest(identity: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def _cache_root(cache_dir: str) -> Path:
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_jax"


# ---- the tokenizer


@contextlib.contextmanager
def _tokenizer_of(request: _Request, root: Path, log: Log) -> Iterator[Tokenizer]:
    """The given tokenizer, or one trained on the training split of all sources, which goes if these are refused."""
    if request.given:
        yield request.given
        return
    fraction = 0.0 if request.validation else request.fraction
    contents = [request.contents[source] for source in request.sources]
    key = _digest(["tokenizer", FORMAT_VERSION, contents, request.how, fraction, request.vocab_size])

    def build(folder: Path) -> None:
        log(f"data: training a tokenizer on {' and '.join(map(repr, request.sources))}")
        texts = _training_texts(request, fraction, log)
        tokenizer.save(tokenizer.train_tokenizer(texts, request.vocab_size, log), folder / TOKENIZER_FILE)
        write_facts(folder, FORMAT_VERSION, {}, {TOKENIZER_FILE: crc32_of_file(folder / TOKENIZER_FILE)})

    def opening(folder: Path) -> Tokenizer:
        read_facts(folder, FORMAT_VERSION, {}, [TOKENIZER_FILE])
        return tokenizer.load(folder / TOKENIZER_FILE)

    chosen, was_there = open_or_build(root / key, opening, build, "tokenizer", log)
    try:
        yield chosen
    except UserError:
        if not was_there:
            shutil.rmtree(root / key, ignore_errors=True)
        raise


def _training_texts(request: _Request, fraction: float, log: Log) -> Iterator[str]:
    """The texts of the training split; of a source with more than its share of TOKENIZER_CHARACTERS, a sample of it."""
    share = TOKENIZER_CHARACTERS // len(request.sources)
    for source in request.sources:
        size = corpus.source_size(source)
        rate = share / max(size, share)  # of a source whose size is not known, the beginning
        characters = 0
        for dialogue in corpus.read_corpus(source, Reading(**request.how)):
            if corpus.is_validation(dialogue.source, fraction):
                continue
            if rate < 1 and not corpus.is_validation(f"+{dialogue.source}", rate):
                continue
            yield from (turn.text for turn in dialogue.turns)
            characters += _length(dialogue)
            if characters > share:
                break
        if rate < 1:
            log(f"data: the tokenizer is trained on {characters:,} characters, a sample from all over {source!r}")
        elif characters > share:
            log(f"data: the tokenizer is trained on the first {characters:,} characters of {source!r}")


# ---- tokens


def _tokens(recipe: _Recipe, root: Path, log: Log) -> _Entry:
    """The tokens of one source, from the cache where they are in it."""
    folder, begun = root / recipe.fingerprint(), time.monotonic()

    def build(partial: Path) -> None:
        log(f"data: preparing {recipe.source!r}")
        _write_tokens(partial, recipe, log)

    entry, was_there = open_or_build(folder, _open, build, "token cache", log)
    if was_there:
        log(f"data: using the token cache {folder}")
    else:
        log(f"data: prepared in {time.monotonic() - begun:.1f} s, cached in {folder}")
    return entry.called(recipe.source)


def _open(folder: Path) -> _Entry:
    """Raises OSError, ValueError, KeyError or TypeError if the cache is not whole."""
    types = {"dtype": str, "stats": dict.fromkeys(_SPLITS, dict), "taken": list, "notes": list, "source": str}
    meta = read_facts(folder, FORMAT_VERSION, types, (*_ARRAYS, TOKENIZER_FILE))
    dtypes = {"tokens": np.dtype(meta["dtype"]), "assistant": np.dtype(np.uint8), "texts": np.dtype(np.uint64)}
    arrays = {}
    for name in _ARRAYS:
        split, _, kind = name.partition(".")
        count = meta["stats"][split]["dialogues" if kind == "texts" else "tokens"]
        arrays[name] = map_array(folder / name, dtypes[kind], count)
    return _Entry(arrays, meta["stats"], meta["taken"], meta["notes"], meta.get("source") or "")


class _Split:
    """The files of one split while they are written."""

    def __init__(self, outputs: dict[str, ChecksummedFile], dtype: np.dtype) -> None:
        self.outputs, self.dtype = outputs, dtype
        self.stats = {"dialogues": 0, "bytes": 0, "tokens": 0}

    def write(self, dialogue: Dialogue, ids: np.ndarray, said: np.ndarray) -> None:
        self.outputs["tokens"].write(ids.astype(self.dtype))
        self.outputs["assistant"].write(said)
        self.outputs["texts"].write(_digest_of_text(dialogue))
        self.stats["tokens"] += len(ids)
        self.stats["dialogues"] += 1
        self.stats["bytes"] += sum(len(turn.text.encode()) for turn in dialogue.turns)


def _write_tokens(folder: Path, recipe: _Recipe, log: Log) -> None:
    dtype = np.dtype(np.uint16 if recipe.tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    reading, sources = Reading(**recipe.how), set()
    with contextlib.ExitStack() as stack:
        outputs = {name: ChecksummedFile(stack.enter_context((folder / name).open("wb"))) for name in _ARRAYS}
        splits = {
            split: _Split({kind: outputs[f"{split}.{kind}"] for kind in ("tokens", "assistant", "texts")}, dtype)
            for split in _SPLITS
        }
        characters = logged = 0
        for batch in _batches(corpus.split_dialogues(corpus.read_corpus(recipe.source, reading), recipe.fraction)):
            dialogues = [dialogue for _, dialogue in batch]
            encoded = tokenizer.encode_dialogues(recipe.tokenizer, dialogues)
            for (is_validation, dialogue), (ids, said) in zip(batch, encoded, strict=True):
                if len(sources) <= _FEW:
                    sources.add(dialogue.source)
                splits[_SPLITS[is_validation]].write(dialogue, ids, said)
            characters += sum(map(_length, dialogues))
            if characters - logged >= _LOG_CHARACTERS:
                logged = characters
                log(f"data: {characters:,} characters tokenised")
    stats = {split: splits[split].stats for split in _SPLITS}
    _check_splits(stats, recipe, reading, sources)
    tokenizer.save(recipe.tokenizer, folder / TOKENIZER_FILE)
    checksums = {name: output.crc for name, output in outputs.items()}
    checksums[TOKENIZER_FILE] = crc32_of_file(folder / TOKENIZER_FILE)
    lines = {"taken": reading.taken(), "notes": reading.notes()}
    facts = {"dtype": dtype.name, "stats": stats, "source": recipe.source, **lines}
    write_facts(folder, FORMAT_VERSION, facts, checksums)


def _batches(dialogues: Iterable[tuple[bool, Dialogue]]) -> Iterator[list[tuple[bool, Dialogue]]]:
    batch, characters = [], 0
    for split, dialogue in dialogues:
        batch.append((split, dialogue))
        characters += _length(dialogue)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _length(dialogue: Dialogue) -> int:
    return sum(len(turn.text) for turn in dialogue.turns)


def _digest_of_text(dialogue: Dialogue) -> np.ndarray:
    """(1,) uint64: equal for dialogues of equal turns, whatever their ids."""
    spoken = "\0".join(part for turn in dialogue.turns for part in turn)
    return np.frombuffer(hashlib.blake2b(spoken.encode(), digest_size=8).digest(), np.uint64)


def _check_splits(stats: dict[str, dict[str, int]], recipe: _Recipe, reading: Reading, sources: set[str]) -> None:
    train, validation = (stats[split]["dialogues"] for split in _SPLITS)
    if not train + validation:
        bad = f": {reading.skipped:,} were skipped, first {reading.skipped_first[0]}" if reading.skipped else ""
        raise UserError(f"data source {recipe.source!r} holds no dialogue and no text{bad}")
    if (train and validation) or recipe.fraction in (0, 1):
        return
    empty, change = ("training", "lower") if not train else ("validation", "raise")
    if len(sources) == 1 < train + validation:
        [only] = sources
        raise UserError(
            f"data source {recipe.source!r}: all {train + validation} dialogues have one source, {only!r}, which is "
            f"never split, so the {empty} split is empty: give unrelated rows an 'id' of their own, or none, or give "
            "data.validation"
        )
    few = f" of {len(sources)} sources" if len(sources) <= min(_FEW, train + validation - 1) else ""
    raise UserError(
        f"data source {recipe.source!r}: none of the {train + validation} dialogues{few} falls in the {empty} split "
        f"at data.validation_fraction={recipe.fraction}: {change} it, give data.validation, or give more data"
    )


# ---- the corpus


def _corpus(
    request: _Request, train: dict[str, _Entry], validation: dict[str, _Entry], chosen: Tokenizer, fingerprint: str
) -> Corpus:
    def streams(entries: dict[str, _Entry], split: str, weights: Iterable[float]) -> tuple[Tokens, ...]:
        return tuple(
            Tokens(entry.arrays[f"{split}.tokens"], entry.arrays[f"{split}.assistant"], source, weight)
            for (source, entry), weight in zip(entries.items(), weights, strict=True)
        )

    stats = {
        split: {
            name: sum(entry.stats[split][name] for entry in entries.values())
            for name in ("dialogues", "bytes", "tokens")
        }
        for split, entries in (("train", train), ("validation", validation))
    }
    return Corpus(
        streams(train, "train", request.weights),
        streams(validation, "validation", [1.0] if request.validation else request.weights),
        chosen,
        fingerprint,
        stats,
        {source: entry.stats for source, entry in (train | validation).items()},
    )


def _log_facts(prepared: Corpus, entries: dict[str, _Entry], vocab_size: int, log: Log) -> None:
    for source, entry in entries.items():
        about = f" {source!r}:" if len(entries) > 1 else ""
        for line in (*entry.taken, *entry.notes):
            log(f"data:{about} {line}")
    stats = prepared.stats
    for source, weight in ((stream.name, stream.weight) for stream in prepared.train if len(prepared.train) > 1):
        counts = prepared.by_source[source]["train"]
        log(f"data: {weight:.1%} of the windows are of {source!r}, which has {counts['tokens']:,} training tokens")
    log(
        f"data: {sum(stats[split]['dialogues'] for split in _SPLITS):,} dialogues, "
        f"{sum(stats[split]['bytes'] for split in _SPLITS) / 1e6:.1f} MB, "
        f"{stats['train']['tokens']:,} training and {stats['validation']['tokens']:,} validation tokens"
    )
    size = prepared.tokenizer.get_vocab_size()
    if size < vocab_size:
        log(f"data: the tokenizer has {size} ids, the model {vocab_size}: {vocab_size - size} stay unused")


def _warn_of_repeats(train: dict[str, _Entry], validation: dict[str, _Entry], log: Log) -> None:
    """Counts the validation texts that are training texts too."""
    held = np.unique(np.concatenate([entry.arrays["validation.texts"] for entry in validation.values()]))
    seen = np.zeros(len(held), bool)
    for entry in train.values():
        texts = entry.arrays["train.texts"]
        for start in range(0, len(texts), _COMPARED):
            seen |= np.isin(held, texts[start : start + _COMPARED])
    if seen.any():
        log(
            f"warning: data: {seen.sum():,} of {len(held):,} validation texts stand in the training data too, word for "
            "word: the validation loss is lower than it would be for unseen text"
        )
