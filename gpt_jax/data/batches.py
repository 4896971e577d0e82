"""Batches: random access to shuffled windows of streams of tokens, mixed by weight, and which tokens are targets.

Batch n is a pure function of (seed, n): nothing about the data's position needs saving but how many windows were seen.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from gpt_jax.config import TARGETS
from gpt_jax.data import tokenizer
from gpt_jax.data.token_cache import Corpus, Tokens
from gpt_jax.errors import UserError
from gpt_jax.imports import absent
from gpt_jax.log import Log

with absent("orbax"):  # which it takes for checkpoints of its own
    import grain

MASKED = -1  # the target that no loss counts
_ENDLESS = 2**62  # windows: grain adds to the length of what is endless, and it must stay an index
_SCANNED = 2**24  # tokens looked at a time
Batch = dict[str, np.ndarray]


def check_windows(prepared: Corpus, block_size: int, targets: str) -> None:
    """Raises UserError if a split has no window of `block_size` tokens with a target that counts."""
    for streams, split in ((prepared.train, "training"), (prepared.validation, "validation")):
        for tokens in streams:
            _Windows(tokens, block_size, targets, split, lambda line: None)


def windows(
    streams: Tokens | Sequence[Tokens],
    *,
    block_size: int,
    batch_size: int,
    seed: int,
    targets: str = "all",
    seen: int = 0,
    rows: np.ndarray | None = None,
    log: Log = logging.info,
) -> grain.MapDataset[Batch]:
    """Endless shuffled batches with random access: `ds[n]` is a pure function of (seed, seen, n).

    A window is `block_size + 1` tokens, the last of them the first of the next, so that each token but the
    first is a target once an epoch (up to a remainder shorter than a window). Every epoch has its own order;
    a batch may span two epochs, so no window is dropped.

    Of several streams, each has its share of the windows, by its weight, in every stretch of the order, and an epoch
    and an order of its own: a small one is repeated. The share is exact to a hundredth of the smallest one.

    Args:
      streams: one, or several with weights.
      seed: in [0, 2**32).
      targets: 'all', or 'assistant': targets that the assistant does not say are MASKED (-1). Who says a
        token is stored with it, so this is exact in a window that starts in the middle of a turn. Windows
        without any other target are left out: a batch of them would teach nothing.
      seen: windows of the endless order that `ds[0]` comes after. A run that goes on with another batch size
        gives how many it has seen, and each window is still seen once an epoch.
      rows: those of each batch that are read, where several processes share it; None: all.
      log: takes a line about the windows left out.

    Returns:
      A dataset of {'inputs': (batch_size, block_size) int32, 'targets': (batch_size, block_size) int32}; with `rows`,
      as many as these.

    Raises:
      UserError: the tokens are fewer than one window, no window has a target, or `targets` is neither.
    """
    streams = [streams] if isinstance(streams, Tokens) else list(streams)
    parts = [_Windows(tokens, block_size, targets, "training", log) for tokens in streams]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    orders = [
        grain.MapDataset.range(int(start), int(end)).shuffle(seed=seed).repeat()
        for start, end in itertools.pairwise(starts)
    ]
    order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, _shares(streams))

    def gather(numbers: Iterable[int]) -> Batch:
        wanted = np.asarray(numbers) if rows is None else np.asarray(numbers)[rows]
        of = np.searchsorted(starts, wanted, side="right") - 1  # the stream of each
        batch = np.empty((2, len(wanted), block_size), np.int32)
        for number in np.unique(of):
            batch[:, of == number] = parts[number].gather(wanted[of == number] - starts[number])
        return {"inputs": batch[0], "targets": batch[1]}

    return order.slice(slice(seen, _ENDLESS)).batch(batch_size, batch_fn=gather)


def _shares(streams: Sequence[Tokens]) -> list[int]:
    """The weights in hundredths of the smallest one: grain would cut off what is below, 1,499.9 to 1,499."""
    smallest = min(tokens.weight for tokens in streams)
    return [round(100 * tokens.weight / smallest) for tokens in streams]


def evaluation_batches(
    tokens: Tokens,
    *,
    block_size: int,
    batch_size: int,
    batches: int,
    targets: str = "all",
    rows: np.ndarray | None = None,
    log: Log = logging.info,
) -> grain.MapDataset[Batch]:
    """The same `batches` batches at every call, or fewer if all windows fit in fewer; none is seen twice.

    The windows are drawn from the whole stream in one fixed order, so that a few batches stand for all of
    it. A last batch that is not full is filled up with MASKED targets: shapes never change.

    Returns and raises: as `windows`, but finite.
    """
    part = _Windows(tokens, block_size, targets, "validation", log)

    def gather(numbers: Iterable[int]) -> Batch:
        numbers, size = np.asarray(numbers), batch_size
        if rows is not None:
            numbers, size = numbers[rows[rows < len(numbers)]], len(rows)
        inputs, wanted = part.gather(numbers)
        missing = ((0, size - len(inputs)), (0, 0))
        return {"inputs": np.pad(inputs, missing), "targets": np.pad(wanted, missing, constant_values=MASKED)}

    return grain.MapDataset.range(len(part)).shuffle(seed=0).batch(batch_size, batch_fn=gather).slice(slice(0, batches))


def loader(dataset: grain.MapDataset[Batch], start: int = 0, prefetch: int = 2) -> grain.DatasetIterator[Batch]:
    """Iterates from batch `start` on, found in O(1), with `prefetch` batches made ahead by one thread.

    `close()` ends the thread. The thread touches numpy only, and there is no child process.
    """
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


class _Windows:
    """The windows of a stream that have a target, numbered in their order.

    Raises:
      UserError: as `windows`.
    """

    def __init__(self, tokens: Tokens, block_size: int, targets: str, split: str, log: Log) -> None:
        if targets not in TARGETS:
            raise UserError(f"data.targets is {targets!r}: it must be 'all' or 'assistant'")
        self.tokens, self.targets, self.offsets = tokens, targets, np.arange(block_size + 1)
        of = f" of {tokens.name!r}" if tokens.weight < 1 else ""
        remedy = ("" if split == "training" else "raise data.validation_fraction, ") + "give more data"
        if len(tokens) <= block_size:
            raise UserError(
                f"block_size is {block_size} but the {split} data{of} has {len(tokens)} tokens, and a window needs "
                f"{block_size + 1}: lower block_size, {remedy}"
            )
        count = (len(tokens) - 1) // block_size
        has_target = _has_a_target(tokens, block_size, count, targets)
        if not has_target.any():
            remedy += ", or set data.targets=all" if targets == "assistant" else ""
            raise UserError(
                f"none of the {count:,} windows of the {split} data{of} has a target that data.targets={targets} "
                f"counts: {remedy}"
            )
        # Numbers of the windows that are left, or a range of all of them, which takes no memory.
        self.kept = range(count) if has_target.all() else np.flatnonzero(has_target)
        if len(self.kept) < count:
            left_out = count - len(self.kept)
            log(f"data: {left_out:,} of {count:,} {split} windows{of} have no counted target; they are left out")

    def __len__(self) -> int:
        return len(self.kept)

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """(2, B, T) int32: inputs and targets of windows."""
        numbers = numbers if isinstance(self.kept, range) else self.kept[numbers]
        positions = numbers[:, None] * (len(self.offsets) - 1) + self.offsets  # (B, T + 1)
        block = self.tokens.ids[positions].astype(np.int32)
        counted = _counted(self.tokens.assistant[positions[:, 1:]], self.targets)
        return np.stack([block[:, :-1], np.where(counted, block[:, 1:], np.int32(MASKED))])


def _counted(assistant: np.ndarray, targets: str) -> np.ndarray:
    return assistant == tokenizer.SAID if targets == "assistant" else assistant != tokenizer.UNCOUNTED


def _has_a_target(tokens: Tokens, block_size: int, count: int, targets: str) -> np.ndarray:
    """(count,) bool, by window."""
    found = np.empty(count, bool)
    step = max(_SCANNED // block_size, 1)  # windows at a time, so that memory stays flat
    for first in range(0, count, step):
        last = min(first + step, count)
        said = tokens.assistant[1 + first * block_size : 1 + last * block_size].reshape(-1, block_size)  # by target
        found[first:last] = _counted(said, targets).any(axis=1)
    return found
