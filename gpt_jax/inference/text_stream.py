"""Tokens to text, piece by piece: no half characters, and nothing of a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer while its tokens come.

    The pieces together are the text of all tokens, up to the first stop string. A piece is held back as long as it may
    be the beginning of a character or of a stop string.

    Args:
      vocabulary: the bytes of each token, see `vocabulary_bytes`.
      stop: texts that end the answer and are no part of it.
    """

    def __init__(self, vocabulary: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self._vocabulary, self._stop = vocabulary, [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False  # whether a stop string came; nothing comes after it

    def feed(self, tokens: Sequence[int]) -> str:
        """The characters that are sure after these tokens."""
        return self._give(self._decoder.decode(b"".join(self._vocabulary[token] for token in tokens)), is_last=False)

    def finish(self) -> str:
        """The characters that were held back, when no token comes any more; a half character is U+FFFD."""
        return self._give(self._decoder.decode(b"", final=True), is_last=True)

    def _give(self, new: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        places = ((text.find(stop), len(stop)) for stop in self._stop)
        found = [(place + length, place) for place, length in places if place >= 0]
        if found:  # the one that is whole first, so that it does not matter how the text was cut
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        length = 0 if is_last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string that goes on."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
