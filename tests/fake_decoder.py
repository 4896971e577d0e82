"""A decoder without a model: of the interface of `gpt_jax.inference.decoder.Decoder`, its texts written beforehand."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from gpt_jax.data.tokenizer import decode, encode, marker_ids, train_tokenizer

CORPUS = "a question and an answer, another question and its answer"
BLOCK = 400


def make_tokenizer() -> Tokenizer:
    return train_tokenizer([CORPUS] * 3, 280)


class Piece(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    reason: str | None


class FakeDecoder:
    """Answers with the text that `say` makes of a prompt's text and its options, then the end marker.

    pace: called before every chunk, with its number; may wait, or raise as a device does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        say: Callable[[str, Any], str],
        *,
        slots: int = 4,
        chunk: int = 4,
        pace: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.tokenizer, self.say, self.pace = tokenizer, say, pace
        self.slots, self.chunk, self.chunks = slots, chunk, 0
        self.texts: dict[int, list[Any]] = {}
        self.most_at_once = 0
        self.thread = threading.get_ident()

    @property
    def free_slots(self) -> list[int]:
        return [slot for slot in range(self.slots) if slot not in self.texts]

    def insert(
        self, slot: int, tokens: Sequence[int], options: Any, *, max_tokens: int, end_tokens: Sequence[int] = ()
    ) -> None:
        assert threading.get_ident() == self.thread
        assert slot in self.free_slots
        if len(tokens) > BLOCK:
            raise ValueError(f"a prompt has 1 to {BLOCK} tokens, found {len(tokens)}")
        said = [
            *encode(self.tokenizer, self.say(decode(self.tokenizer, tokens), options)),
            marker_ids(self.tokenizer)[2],
        ]
        left = min(max_tokens, BLOCK - len(tokens) + 1)
        self.texts[slot] = [said, left, frozenset(end_tokens), options]
        self.most_at_once = max(self.most_at_once, len(self.texts))

    def decode(self, *, ahead: bool = True) -> dict[int, Piece]:
        assert threading.get_ident() == self.thread
        self.pace(self.chunks)
        self.chunks += 1
        pieces = {}
        for slot, text in self.texts.items():
            said, left, ends, options = text
            new, reason = [], None
            while len(new) < self.chunk and reason is None:
                new.append(said.pop(0) if said else 7)
                left -= 1
                reason = "stop" if new[-1] in ends else "length" if left == 0 else None
            text[1] = left
            likely = [
                [(token, math.log(0.5)), (9, math.log(0.25)), (10, -math.inf)][: options.logprobs] for token in new
            ]
            pieces[slot] = Piece(new, [math.log(0.5)] * len(new), likely, reason)
        return pieces

    def release(self, slot: int) -> None:
        del self.texts[slot]
