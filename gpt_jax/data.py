"""From a corpus to batches: a token cache on disk, and random access to shuffled windows of it.

The cache is a folder named by a fingerprint of the source, the tokenizer, the split and FORMAT_VERSION:
  train.tokens, validation.tokens        ids, uint16 or uint32 (above 65,536 ids), dialogue after dialogue
  train.assistant, validation.assistant  one byte a token: 1 where the assistant says it
  tokenizer.json, stats.json
It is built beside its place and renamed into it, so a killed run leaves no half cache. Batch n is a pure
function of (seed, n): nothing about the data's position needs saving but n.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from gpt_jax import corpus, tokenizer
from gpt_jax.config import UserError
from gpt_jax.json_file import VERSION, read_object

# Raise it when the same source and tokenizer would give other tokens or files than before.
FORMAT_VERSION = 1

MASKED = -1  # the target that no loss counts
TOKENIZER_CHARACTERS = 500_000_000  # what a BPE is trained on at most: its word table must fit in memory

_ENDLESS = 2**62  # windows: grain adds to the length of what is endless, and it must stay an index
_BATCH_CHARACTERS = 1_000_000  # encoded at a time
_LOG_CHARACTERS = 100_000_000  # between two lines of progress
_ABANDONED = 3600  # seconds without a write after which a build is taken for dead
_SPLITS = ("train", "validation")

Batch = dict[str, np.ndarray]
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A stream of N tokens.

    Attributes:
      ids: (N,) uint16 or uint32.
      assistant: (N,) uint8: 1 where the assistant says the token: its text, and the marker that closes it.
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


def prepare(data_config: Any, vocab_size: int, log: Log = logging.info) -> Corpus:
    """Tokenises a corpus, or opens the cache of an earlier call; memory stays flat however large it is.

    Args:
      data_config: a ConfigDict with `source` (see `corpus.read_corpus`), `validation_fraction`,
        `tokenizer` (path of a tokenizer.json; '' trains one on the training split) and
        `cache_dir` ('' is gpt_jax in $XDG_CACHE_HOME or ~/.cache).
      vocab_size: the model's; the tokenizer has as many ids or fewer.
      log: takes a line about what is done.

    Raises:
      UserError: the source or the tokenizer cannot be used, a split is empty, or the cache cannot be written.
    """
    fraction = data_config.validation_fraction
    if not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction is {fraction}: it must lie between 0 and 1")
    given = tokenizer.load(data_config.tokenizer) if data_config.tokenizer else None
    if given and given.get_vocab_size() > vocab_size:
        raise UserError(
            f"tokenizer {data_config.tokenizer} has {given.get_vocab_size()} ids but the model's vocab_size "
            f"is {vocab_size}: raise vocab_size"
        )
    identity = [
        FORMAT_VERSION,
        corpus.source_fingerprint(data_config.source),
        fraction,
        given.to_str() if given else vocab_size,
    ]
    fingerprint = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    root = _cache_root(data_config.cache_dir)
    folder = root / fingerprint
    if folder.exists():
        try:
            prepared = _open(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log(f"warning: the token cache {folder} is damaged ({error}): building it again")
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        else:
            log(f"data: using the token cache {folder}")
            _log_size(prepared, vocab_size, log)
            return prepared

    log(f"data: preparing {data_config.source!r}")
    start = time.monotonic()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root, fingerprint)
        partial = root / f"{fingerprint}.{uuid.uuid4().hex}.partial"
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write the token cache: {error}: set data.cache_dir to a folder that can be") from None
    try:
        _build(partial, data_config.source, fraction, given, vocab_size, log)
        try:
            partial.rename(folder)
        except OSError:  # another run has built the same in the meantime: it is as good
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    prepared = _open(folder)
    log(f"data: prepared in {time.monotonic() - start:.1f} s, cached in {folder}")
    _log_size(prepared, vocab_size, log)
    return prepared


def windows(
    tokens: Tokens,
    *,
    block_size: int,
    batch_size: int,
    seed: int,
    targets: str = "all",
    seen: int = 0,
    log: Log = logging.info,
) -> grain.MapDataset[Batch]:
    """Endless shuffled batches with random access: `ds[n]` is a pure function of (seed, seen, n).

    A window is `block_size + 1` tokens, the last of them the first of the next, so that each token but the
    first is a target once an epoch (up to a remainder shorter than a window). Every epoch has its own order;
    a batch may span two epochs, so no window is dropped.

    Args:
      seed: in [0, 2**32).
      targets: 'all', or 'assistant': targets that the assistant does not say are MASKED (-1). Who says a
        token is stored with it, so this is exact in a window that starts in the middle of a turn. Windows
        without any other target are left out: a batch of them would teach nothing.
      seen: windows of the endless order that `ds[0]` comes after. A run that goes on with another batch size
        gives how many it has seen, and each window is still seen once an epoch.
      log: takes a line about the windows left out.

    Returns:
      A dataset of {'inputs': (batch_size, block_size) int32, 'targets': (batch_size, block_size) int32}.

    Raises:
      UserError: the tokens are fewer than one window, no window has a target, or `targets` is neither.
    """
    order, gather = _windows(tokens, block_size, batch_size, targets, "training", log)
    return order.shuffle(seed=seed).repeat().slice(slice(seen, _ENDLESS)).batch(batch_size, batch_fn=gather)


def evaluation_batches(
    tokens: Tokens,
    *,
    block_size: int,
    batch_size: int,
    batches: int,
    targets: str = "all",
    log: Log = logging.info,
) -> grain.MapDataset[Batch]:
    """The same `batches` batches at every call, or fewer if all windows fit in fewer; none is seen twice.

    The windows are drawn from the whole stream in one fixed order, so that a few batches stand for all of
    it. A last batch that is not full is filled up with MASKED targets: shapes never change.

    Returns and raises: as `windows`, but finite.
    """
    order, gather = _windows(tokens, block_size, batch_size, targets, "validation", log)
    return order.shuffle(seed=0).batch(batch_size, batch_fn=gather).slice(slice(0, batches))


def loader(dataset: grain.MapDataset[Batch], start: int = 0, prefetch: int = 2) -> grain.DatasetIterator[Batch]:
    """Iterates from batch `start` on, found in O(1), with `prefetch` batches made ahead by one thread.

    `close()` ends the thread. The thread touches numpy only, and there is no child process.
    """
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def _windows(
    tokens: Tokens, block_size: int, batch_size: int, targets: str, split: str, log: Log
) -> tuple[grain.MapDataset[int], Callable[[Iterable[int]], Batch]]:
    """The windows of a split that have a target, numbered in their order, and what makes a batch of such numbers."""
    if targets not in ("all", "assistant"):
        raise UserError(f"data.targets is {targets!r}: it must be 'all' or 'assistant'")
    remedy = ("" if split == "training" else "raise data.validation_fraction, ") + "give more data"
    if len(tokens) <= block_size:
        raise UserError(
            f"block_size is {block_size} but the {split} data has {len(tokens)} tokens, and a window needs "
            f"{block_size + 1}: lower block_size, {remedy}"
        )
    count = (len(tokens) - 1) // block_size
    kept = None
    if targets == "assistant":
        said = tokens.assistant[1 : 1 + count * block_size].reshape(count, block_size)  # by target
        kept = np.flatnonzero(said.any(axis=1))
        if not len(kept):
            raise UserError(
                f"data.targets=assistant, but in none of the {count:,} windows of the {split} data does the assistant "
                f"say anything that counts: {remedy}, or set data.targets=all"
            )
        if len(kept) < count:
            left_out = count - len(kept)
            log(f"data: {left_out:,} of {count:,} {split} windows have no counted target; they are left out")
    offsets = np.arange(block_size + 1)

    def gather(numbers: Iterable[int]) -> Batch:
        numbers = np.asarray(numbers)
        numbers = numbers if kept is None else kept[numbers]
        positions = numbers[:, None] * block_size + offsets  # (windows, T + 1)
        block = tokens.ids[positions].astype(np.int32)
        inputs, wanted = block[:, :-1], block[:, 1:]
        if targets == "assistant":
            wanted = np.where(tokens.assistant[positions[:, 1:]], wanted, np.int32(MASKED))
        missing = ((0, batch_size - len(block)), (0, 0))
        return {
            "inputs": np.pad(inputs, missing),
            "targets": np.pad(wanted, missing, constant_values=MASKED),
        }

    return grain.MapDataset.range(count if kept is None else len(kept)), gather


# ---- the cache


def _cache_root(cache_dir: str) -> Path:
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_jax"


def _remove_abandoned(root: Path, fingerprint: str) -> None:
    for partial in root.glob(f"{fingerprint}.*.partial"):
        changed = max(path.stat().st_mtime for path in [partial, *partial.iterdir()])
        if time.time() - changed > _ABANDONED:
            shutil.rmtree(partial, ignore_errors=True)


def _build(folder: Path, source: str, fraction: float, given: Tokenizer | None, vocab_size: int, log: Log) -> None:
    trained = given or tokenizer.train_tokenizer(_training_texts(source, fraction), vocab_size)
    dtype = np.dtype(np.uint16 if trained.get_vocab_size() <= 2**16 else np.uint32)
    stats = {split: {"dialogues": 0, "bytes": 0, "tokens": 0} for split in _SPLITS}
    files = {split: [(folder / f"{split}.{kind}").open("wb") for kind in ("tokens", "assistant")] for split in _SPLITS}
    try:
        characters = logged = 0
        for batch in _batches(corpus.read_corpus(source)):
            for dialogue, (ids, said) in zip(batch, tokenizer.encode_dialogues(trained, batch), strict=True):
                split = _SPLITS[corpus.is_validation(dialogue.source, fraction)]
                files[split][0].write(ids.astype(dtype).tobytes())
                files[split][1].write(said.tobytes())
                stats[split]["dialogues"] += 1
                stats[split]["bytes"] += sum(len(turn.text.encode()) for turn in dialogue.turns)
                stats[split]["tokens"] += len(ids)
            characters += sum(_length(dialogue) for dialogue in batch)
            if characters - logged >= _LOG_CHARACTERS:
                logged = characters
                log(f"data: {characters:,} characters tokenised")
    finally:
        for file in [*files["train"], *files["validation"]]:
            file.close()
    _check_splits(stats, source, fraction)
    tokenizer.save(trained, folder / "tokenizer.json")
    meta = {VERSION: FORMAT_VERSION, "dtype": dtype.name, "stats": stats}
    (folder / "stats.json").write_text(json.dumps(meta, indent=2))


def _training_texts(source: str, fraction: float) -> Iterator[str]:
    characters = 0
    for dialogue in corpus.read_corpus(source):
        if corpus.is_validation(dialogue.source, fraction):
            continue
        for turn in dialogue.turns:
            yield turn.text
        characters += _length(dialogue)
        if characters > TOKENIZER_CHARACTERS:
            return


def _batches(dialogues: Iterable[corpus.Dialogue]) -> Iterator[list[corpus.Dialogue]]:
    batch, characters = [], 0
    for dialogue in dialogues:
        batch.append(dialogue)
        characters += _length(dialogue)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _length(dialogue: corpus.Dialogue) -> int:
    return sum(len(turn.text) for turn in dialogue.turns)


def _check_splits(stats: dict[str, dict[str, int]], source: str, fraction: float) -> None:
    train, validation = (stats[split]["dialogues"] for split in _SPLITS)
    if not train + validation:
        raise UserError(f"data source {source!r} holds no dialogue")
    if not train or not validation:
        empty, change = ("training", "lower") if not train else ("validation", "raise")
        raise UserError(
            f"data source {source!r}: none of the {train + validation} dialogues falls in the {empty} split "
            f"at data.validation_fraction={fraction}: {change} it, or give more data"
        )


def _open(folder: Path) -> Corpus:
    """Raises OSError, ValueError, KeyError or TypeError if the cache is not whole."""
    meta = read_object(folder / "stats.json", FORMAT_VERSION, {"dtype": str, "stats": dict.fromkeys(_SPLITS, dict)})
    splits = []
    for split in _SPLITS:
        count = meta["stats"][split]["tokens"]
        ids = _map(folder / f"{split}.tokens", np.dtype(meta["dtype"]), count)
        splits.append(Tokens(ids, _map(folder / f"{split}.assistant", np.dtype(np.uint8), count)))
    return Corpus(*splits, tokenizer.load(folder / "tokenizer.json"), folder.name, meta["stats"])


def _map(path: Path, dtype: np.dtype, count: int) -> np.memmap:
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path.name} has {size} bytes, not {expected}")
    return np.memmap(path, dtype, mode="r", shape=(count,))


def _log_size(prepared: Corpus, vocab_size: int, log: Log) -> None:
    stats = prepared.stats
    log(
        f"data: {sum(stats[split]['dialogues'] for split in _SPLITS):,} dialogues, "
        f"{sum(stats[split]['bytes'] for split in _SPLITS) / 1e6:.1f} MB, "
        f"{len(prepared.train):,} training and {len(prepared.validation):,} validation tokens"
    )
    size = prepared.tokenizer.get_vocab_size()
    if size < vocab_size:
        log(f"data: the tokenizer has {size} ids, the model {vocab_size}: {vocab_size - size} stay unused")
