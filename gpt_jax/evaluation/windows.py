"""Cuts a stream of tokens into windows in which every token is a target once.

The stream s_1 ... s_N stands behind a start token s_0. Window k reads the tokens from s_{kS} on, as many as the model
sees at once (T), and predicts the one after each; S is the stride. The first window counts all of its targets, each
later one those that no window before it has counted: its last S. So with S = T windows lie side by side, and with a
smaller stride every target but those of the first window is predicted from at least T - S + 1 tokens before it. The
last window is as short as what is left.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt_jax.data.batches import MASKED


class Window(NamedTuple):
    """A piece of a text for the model.

    inputs: int32 (n,). targets: int32 (n,), the token after each; MASKED where it does not count. source: whatever
    tells the caller what the text is of.
    """

    inputs: np.ndarray
    targets: np.ndarray
    source: str = ""


class WindowCutter:
    """Takes a stream piece by piece, and gives its windows as soon as they are full; memory stays flat.

    Args:
      source: of its windows.
      start: the token that stands before the stream.
      length: tokens that the model sees at once.
      stride: in [1, length].
    """

    def __init__(self, source: str, start: int, length: int, stride: int) -> None:
        self._source, self._length, self._stride = source, length, stride
        self._ids = np.array([start], np.int32)
        self._counted = np.zeros(1, bool)

    def add(self, ids: np.ndarray, counted: np.ndarray) -> Iterator[Window]:
        """Appends tokens, (n,), with whether each counts as a target; yields the windows that are full now."""
        self._ids = np.concatenate([self._ids, ids.astype(np.int32)])
        self._counted = np.concatenate([self._counted, counted.astype(bool)])
        first = 0
        while first + self._length < len(self._ids):
            yield from self._cut(first, first + self._length + 1)
            first += self._stride
        self._ids, self._counted = self._ids[first:], self._counted[first:]

    def finish(self) -> Iterator[Window]:
        """The last window, if a target is left that counts."""
        yield from self._cut(0, len(self._ids))

    def _cut(self, first: int, end: int) -> Iterator[Window]:
        ids, counted = self._ids[first:end], self._counted[first:end]
        if counted[1:].any():
            yield Window(ids[:-1], np.where(counted, ids, np.int32(MASKED))[1:], self._source)
        self._counted[first:end] = False  # by now they have been
