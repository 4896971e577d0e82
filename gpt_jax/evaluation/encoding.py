"""Dialogues and questions as tokens of a model: with markers or, where its tokenizer has none, as plain text."""

import functools
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from gpt_jax.data import tokenizer as bpe
from gpt_jax.data.dialogue import MARKERS, Context, Dialogue, Part, Turn
from gpt_jax.errors import UserError

BETWEEN_TURNS = "\n\n"  # in plain text; no target, since the data does not hold it


class Encoding:
    """A tokenizer with what a model was trained to read around the text.

    chat: whether it has the markers of turns. start: the token before any text, which is the one after each. bytes_of:
    int (ids,), the bytes of text that a token stands for; 0 for one that is no text.

    Args:
      end_of_text: the token by which texts end, where the tokenizer lacks the markers.

    Raises:
      UserError: it has neither, or is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_of_text: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat = all(tokenizer.token_to_id(marker) is not None for marker in MARKERS)
        special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        start = bpe.marker_ids(tokenizer)[2] if self.chat else tokenizer.token_to_id(end_of_text or "")
        if start is None:
            raise UserError(
                "the tokenizer has no token that ends a text: name it as eos_token in tokenizer_config.json"
            )
        self.start: int = start
        special |= {start, *(bpe.marker_ids(tokenizer) if self.chat else ())}
        spelled = bpe.vocabulary_bytes(tokenizer, vocab_size)
        self.bytes_of = np.array([0 if i in special else len(text) for i, text in enumerate(spelled)])

    def dialogue(self, dialogue: Dialogue, targets: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a dialogue up to its end, and whether each is a target: 'all', or what the assistant says."""
        if self.chat:
            [(ids, said)] = bpe.encode_dialogues(self.tokenizer, [dialogue])
            return ids, said == bpe.SAID if targets == "assistant" else said != bpe.UNCOUNTED
        ids, counted, counts = [], [], False
        for turn in dialogue.turns:
            spoken = self.text(turn.text)
            between = self._between_turns if ids else []
            ids += [*between, *spoken]
            counts = not isinstance(turn, Context) and (targets == "all" or turn.role == "assistant")
            counted += [False] * len(between) + [counts] * len(spoken)
        if not isinstance(dialogue, Part):
            ids, counted = [*ids, self.start], [*counted, counts]
        return np.array(ids), np.array(counted)

    def text(self, text: str) -> list[int]:
        """The tokens of a text, none of them special."""
        return bpe.encode(self.tokenizer, text)

    def question(self, text: str) -> list[int]:
        """The tokens of a user's turn and the marker that asks for the answer."""
        return bpe.encode_prompt(self.tokenizer, [Turn("user", text.strip())])

    @functools.cached_property
    def _between_turns(self) -> Sequence[int]:
        return self.text(BETWEEN_TURNS)
