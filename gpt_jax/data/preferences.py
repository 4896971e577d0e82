"""Pairs of preferences, as rows whose chosen side is the answer.

The chosen side is what a language model can be trained on; the rejected side is left out, and only tells which of the
turns before the answer both sides share: these are what is answered, so none of them is a target.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpt_jax.data.row_keys import LISTS, PAIRS, side_of
from gpt_jax.errors import UserError

_SIDES = {"chosen": "rejected", "preferred_output": "non_preferred_output"}
_HUMAN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # how Anthropic's transcripts begin a turn


def preferred_key(row: Mapping[str, Any]) -> str:
    """The key of the better side of a row with two; '' for any other row."""
    return next((better for better, worse in _SIDES.items() if better in row and worse in row), "")


class Chosen(NamedTuple):
    """A row without preferences, whose answer is the chosen side."""

    row: dict[str, Any]
    unread: dict[str, Any]  # of the row with preferences: what stood in the way of the chosen side


def chosen_side(row: Mapping[str, Any], better: str, where: str) -> Chosen:
    """Brings a row to the shape of one without preferences, with the chosen side as its answer.

    Raises:
      UserError: nothing says what is answered, or the prompt is another than that of the chosen dialogue.
    """
    worse = _SIDES[better]
    rest = {key: value for key, value in row.items() if key not in (better, worse)}
    chosen = _messages(row[better])
    if isinstance(chosen, list) and (not chosen or side_of(chosen[0]) != "assistant"):
        read, plain = _whole(rest, chosen, _messages(row[worse]), better, where)
    else:
        read, plain = _answered(rest, chosen, f"{where}: found {better!r} and {worse!r}")
    rest = {key: value for key, value in rest.items() if key not in read}
    unread = {key: value for key, value in rest.items() if key in LISTS or (key in plain and plain[key] != value)}
    return Chosen({**{key: value for key, value in rest.items() if key not in unread}, **plain}, unread)


def _answered(rest: Mapping[str, Any], chosen: Any, found: str) -> tuple[set[str], dict[str, Any]]:
    """The keys of `rest` that were read, and what stands in their place: what is answered, and the answer."""
    asked = rest.get("input")
    if isinstance(asked, dict) and isinstance(asked.get("messages"), list):  # OpenAI's
        others = {key: value for key, value in asked.items() if key != "messages"}
        return {"input"}, {**others, "prompt": asked["messages"], "completion": chosen}
    if rest.get("prompt"):
        return {"prompt"}, {"prompt": _prompt(rest["prompt"]), "completion": chosen}
    for key in LISTS:
        if isinstance(rest.get(key), list):
            return {key}, {"prompt": rest[key], "completion": chosen}
    pairs = sorted(PAIRS, key=lambda pair: not rest.get(pair[0]))  # an empty question hides none that says something
    for question, _, answer in pairs:
        if question in rest:
            return {question}, {question: _prompt(rest[question]), answer: chosen}
    raise UserError(f"{found}, but no 'prompt' that they answer")


def _messages(side: Any) -> Any:
    """A side as a list of messages where it is one, a message alone, or a transcript of Human and Assistant."""
    if isinstance(side, dict):
        return [side]
    if isinstance(side, str) and side.lstrip().startswith(("Human:", "Assistant:")):
        before, *parts = _HUMAN.split(side)
        if not before.strip():
            roles = {"Human": "user", "Assistant": "assistant"}
            turns = zip(parts[::2], parts[1::2], strict=True)
            return [{"role": roles[role], "content": text.strip()} for role, text in turns]
    return side


def _prompt(prompt: Any) -> Any:
    """A prompt, as `_messages` reads a side; the last `Assistant:` of a transcript is where the answer begins.

    Any text may begin with `Human:`. A transcript begins with an empty line, as Anthropic's do, and has no empty turn.
    """
    if not isinstance(prompt, str):
        return _messages(prompt)
    if not prompt.startswith("\n\nHuman:"):
        return prompt
    messages = _messages(prompt)
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]
    return messages if all(message["content"] for message in messages) else prompt


def _whole(
    rest: Mapping[str, Any], chosen: list[Any], rejected: Any, better: str, where: str
) -> tuple[set[str], dict[str, Any]]:
    """The same as `_answered` gives, of a row whose chosen side is the whole dialogue, the prompt in it."""
    prompt = rest.get("prompt")
    texts = [message.get("content", message.get("value")) for message in chosen if isinstance(message, dict)]
    in_it = isinstance(prompt, str) and any(prompt.strip() in str(text) for text in texts)
    prompt = prompt if in_it else _prompt(prompt)
    if isinstance(prompt, str) and prompt.strip() and not in_it:
        raise UserError(f"{where}: the 'prompt' is not in the {better!r} dialogue, which begins with another turn")
    if isinstance(prompt, list) and chosen[: len(prompt)] != prompt:
        raise UserError(f"{where}: the 'prompt' is not how the {better!r} dialogue begins")
    read = {"prompt"} if isinstance(prompt, str | list) else set()
    read |= {key for key in LISTS if isinstance(rest.get(key), list) and chosen[: len(rest[key])] == rest[key]}
    shared, others = 0, rejected if isinstance(rejected, list) else []
    while shared < min(len(chosen) - 1, len(others)) and chosen[shared] == others[shared]:
        shared += 1
    while shared and side_of(chosen[shared - 1]) == side_of(chosen[shared]) == "assistant":  # these are one answer
        shared -= 1
    messages = [
        {**message, "weight": 0} if number < shared and side_of(message) == "assistant" else message
        for number, message in enumerate(chosen)
    ]
    return read, {"messages": messages}
