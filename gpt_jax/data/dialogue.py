"""Dialogues: turns of a user and an assistant, checked while they are put together; and documents, which have none."""

import hashlib
import json
from typing import NamedTuple

from gpt_jax.errors import UserError

USER, ASSISTANT, END = MARKERS = ("<|user|>", "<|assistant|>", "<|end_of_text|>")
TEXT = "text"  # in place of a role: the one turn of a document

_as_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make the encoder anew each time


class Turn(NamedTuple):
    role: str  # 'user' or 'assistant'; of a document TEXT
    text: str  # stripped, never empty


class Context(Turn):
    """A turn that is read but never a target, whatever `data.targets` says."""

    __slots__ = ()


class Dialogue(NamedTuple):
    source: str  # the unit of the training/validation split
    turns: tuple[Turn, ...]  # user and assistant by turns, the assistant has the last; or one of TEXT


class Part(Dialogue):
    """A part of a document that the next one goes on with: no end marker closes it."""

    __slots__ = ()


def add_turn(turns: list[Turn], turn: Turn, where: str, *, assistant_may_open: bool = False) -> None:
    """Appends a turn, stripped.

    Raises:
      UserError: it is empty, or not the other one's turn.
    """
    if turns:
        expected = "user" if turns[-1].role == "assistant" else "assistant"
    else:
        expected = turn.role if assistant_may_open else "user"
    if turn.role != expected:
        raise UserError(f"{where}: found turn {turn.role!r} where {expected!r} must stand: turns alternate, user first")
    text = turn.text.strip()
    if not text:
        raise UserError(f"{where}: the {turn.role} turn is empty: fill it or remove the dialogue")
    turns.append(turn._replace(text=text))


def finish(turns: list[Turn], where: str, source: str | None = None) -> Dialogue:
    """The dialogue of these turns; without a `source` it is known by a digest of its text.

    Raises:
      UserError: the last turn is not the assistant's, or a text holds half of a surrogate pair.
    """
    if not turns or turns[-1].role != "assistant":
        found = "ends with a user turn" if turns else "has no turn"
        raise UserError(f"{where}: the dialogue {found}: an assistant turn must come last")
    digest = _digest(turns, where)  # refuses what is not text
    return Dialogue(source or digest, tuple(turns))


def finish_document(text: str, where: str, source: str | None = None, *, goes_on: bool = False) -> Dialogue:
    """A document, or a part of one that `goes_on`; without a `source` it is known by a digest of its text.

    Raises:
      UserError: the text holds half of a surrogate pair.
    """
    turns = [Turn(TEXT, text)]
    digest = _digest(turns, where)
    return (Part if goes_on else Dialogue)(source or digest, tuple(turns))


def _digest(turns: list[Turn], where: str) -> str:
    try:
        return hashlib.blake2b(_as_json(turns).encode(), digest_size=16).hexdigest()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise UserError(f"{where}: found {found}, half of a surrogate pair, which is not text") from None
