"""Pairs of preferences, as rows whose chosen side is the answer.

The chosen side is what a language model can be trained on; the rejected side is left out, and only tells which of the
turns before the answer both sides share: these are what is answered, so none of them is a target.
"""

import re
from collections.abc import Mapping
from typing import Any

from gpt_jax.data.row_keys import LISTS, PAIRS, side_of
from gpt_jax.errors import UserError

_SIDES = {"chosen": "rejected", "preferred_output": "non_preferred_output"}
_HUMAN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # how Anthropic's transcripts begin a turn


def preferred_key(row: Mapping[str, Any]) -> str:
    """The key of the better side of a row with two; '' for any other row."""
    return next((better for better, worse in _SIDES.items() if better in row and worse in row), "")


def chosen_side(row: Mapping[str, Any], better: str, where: str) -> dict[str, Any]:
    """The row with the chosen side as its answer, in the shape of a row without preferences.

    Raises:
      UserError: nothing says what is answered, or the prompt is another than that of the chosen dialogue.
    """
    worse = _SIDES[better]
    rest = {key: value for key, value in row.items() if key not in (better, worse)}
    chosen, rejected = (_messages(row[key]) for key in (better, worse))
    if isinstance(chosen, list) and (not chosen or side_of(chosen[0]) != "assistant"):
        return _whole(rest, chosen, rejected, better, where)
    asked = rest.pop("input", None)
    if isinstance(asked, dict) and isinstance(asked.get("messages"), list):  # OpenAI's
        others = {key: value for key, value in asked.items() if key != "messages"}
        return {**others, **rest, "prompt": asked["messages"], "completion": chosen}
    rest = rest if asked is None else rest | {"input": asked}
    for key in LISTS:
        if isinstance(rest.get(key), list):
            return {"prompt": rest.pop(key), "completion": chosen, **rest}
    for question, _, answer in PAIRS:
        if question in rest:
            return {**rest, answer: chosen}
    raise UserError(f"{where}: found {better!r} and {worse!r}, but no 'prompt' that they answer")


def _messages(side: Any) -> Any:
    """A side as a list of messages where it is one, a message alone, or a transcript of Human and Assistant."""
    if isinstance(side, dict):
        return [side]
    if isinstance(side, str) and (parts := _HUMAN.split(side))[0].strip() == "" and len(parts) > 1:
        roles = {"Human": "user", "Assistant": "assistant"}
        return [{"role": roles[role], "content": text} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    return side


def _whole(rest: dict[str, Any], chosen: list[Any], rejected: Any, better: str, where: str) -> dict[str, Any]:
    """A row whose chosen side is the whole dialogue, the prompt in it."""
    prompt = rest.pop("prompt", None)
    texts = [message.get("content", message.get("value")) for message in chosen if isinstance(message, dict)]
    if isinstance(prompt, str) and prompt.strip() and not any(prompt.strip() in str(text) for text in texts):
        raise UserError(f"{where}: the 'prompt' is not in the {better!r} dialogue, which begins with another turn")
    if isinstance(prompt, list) and prompt and chosen[: len(prompt)] != prompt:
        raise UserError(f"{where}: the 'prompt' is not how the {better!r} dialogue begins")
    shared, others = 0, rejected if isinstance(rejected, list) else []
    while shared < min(len(chosen) - 1, len(others)) and chosen[shared] == others[shared]:
        shared += 1
    messages = [
        {**message, "weight": 0} if number < shared and side_of(message) == "assistant" else message
        for number, message in enumerate(chosen)
    ]
    return {**{key: value for key, value in rest.items() if key not in LISTS}, "messages": messages}
