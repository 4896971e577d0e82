"""Fits a conversation into the block: its head stays, and of the rest the newest turns that leave room to answer."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import encode, encode_prompt, marker_ids
from gpt_jax.errors import UserError

ROOM = 4  # an answer is left a quarter of the block at most: the rest is what it answers


class Fitted(NamedTuple):
    """A prompt as token ids, and how many of the oldest turns are not in it."""

    tokens: list[int]
    left_out: int

    def told(self) -> str:
        """A line about what was left out; empty if nothing was."""
        if not self.left_out:
            return ""
        return f"the conversation is longer than the model sees: the oldest {self.left_out} turns were left out"


class TooLong(UserError):
    """A single turn and the system text do not fit into the block."""


def room_for_answer(max_tokens: int, block_size: int) -> int:
    """Tokens of the block that a conversation leaves free: those that the answer may have, up to a quarter."""
    return max(1, min(max_tokens, block_size // ROOM))


def fit(tokenizer: Tokenizer, turns: Sequence[Turn], system: str = "", *, block_size: int, room: int) -> Fitted:
    """Encodes a conversation in at most `block_size - room` tokens.

    As in training, the system text stands before the first user turn, in it, with a blank line between. It stays, and
    turns go from the oldest on, a question with its answer, until the rest fits.

    Args:
      turns: user and assistant by turns, the user first and last.
      system: what the conversation begins with; may be empty.
      room: tokens to leave for the answer.

    Raises:
      TooLong: the last turn and the system text alone are longer.
    """
    limit = block_size - room
    first, total = len(turns) - 1, 1 + _size(tokenizer, turns[-1])
    while first >= 2:  # from the newest back: what is long before is not even encoded
        total += _size(tokenizer, turns[first - 1]) + _size(tokenizer, turns[first - 2])
        if total > limit:
            break
        first -= 2
    # The system text changes how the turn after it is encoded, so its own size is not added but measured.
    while True:
        kept = [turns[first]._replace(text=with_system(system, turns[first].text)), *turns[first + 1 :]]
        tokens = encode_prompt(tokenizer, kept)
        if len(tokens) <= limit:
            return Fitted(tokens, first)
        if first + 2 >= len(turns):
            what = "the message and the system prompt have" if system else "the message has"
            raise TooLong(
                f"{what} {len(tokens):,} tokens with their markers, and the model sees {block_size:,}, of which "
                f"{room:,} are for the answer: shorten it"
            )
        first += 2


def _size(tokenizer: Tokenizer, turn: Turn) -> int:
    """Tokens of a turn, with its marker."""
    return 1 + len(encode(tokenizer, turn.text))


def with_system(system: str, text: str) -> str:
    """A first user turn with the system's text before it."""
    return f"{system.strip()}\n\n{text}" if system.strip() else text


def fit_text(tokenizer: Tokenizer, text: str, *, block_size: int) -> list[int]:
    """The ids of plain text to continue; an empty one is begun as texts are after an end of text.

    Raises:
      TooLong: it fills the block.
    """
    tokens = encode(tokenizer, text) or [marker_ids(tokenizer)[2]]
    check_length(tokens, block_size)
    return tokens


def check_length(tokens: Sequence[int], block_size: int) -> None:
    """Raises TooLong for a prompt that leaves no place for an answer."""
    if len(tokens) >= block_size:
        raise TooLong(f"the prompt has {len(tokens):,} tokens, and the model sees {block_size:,}: shorten it")
