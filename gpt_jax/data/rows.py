"""Rows of JSON or of a dataset, in the formats that people have, read as dialogues. docs/data.md has them all.

Every row is first brought to one form, a list of messages, and the messages are then read as turns. What says
something (a tool call, a system text, a weight) is read, or the row is refused; keys that nothing is known of are
counted, so that nothing is left out without a word.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gpt_jax.data.dialogue import TEXT, Context, Dialogue, Turn, add_turn, finish
from gpt_jax.data.preferences import chosen_side, preferred_key
from gpt_jax.data.reading import Reading
from gpt_jax.data.row_keys import LISTS, PAIRS, ROLES, SIDES, is_message, side_of
from gpt_jax.errors import UserError

TextReader = Callable[[str, str, str | None, Reading], list[Dialogue]]  # (text, where, source, reading)

_NOT_TEXT = {"image", "images", "audio", "audios", "video", "videos"}  # keys of rows and of messages
_NO_TURN = {*_NOT_TEXT, "file", "files", "attachments"}  # keys of messages; those of a row may say where it is from
_COUNTED = {"weight": (0, 1), "train": (False, True), "loss": (False, True)}  # by key: no target, target
_READ = {"role", "content", "from", "value", "tool_calls", "function_call", "refusal", *_COUNTED}
_READ_OF_PARTS = {  # by type
    **{kind: {"text"} for kind in ("text", "input_text", "output_text")},
    "refusal": {"refusal"},
    "tool_use": {"name", "input"},
    "tool_result": {"content"},
}
_READ_OF_ROWS = {"id", "system", "system_prompt", "tools", "functions"}  # beside those of the row's shape
_LINKS = {"id", "tool_call_id", "tool_use_id"}  # which answer belongs to which call: their order says it
_CHATML = re.compile(r"\s*<\|im_start\|>([^\n<]*)\n(.*?)<\|im_end\|>(?:\s*<\|endoftext\|>\s*\Z)?", re.DOTALL)


def single_rows(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The rows of a list of rows, (where, row) each, however deep they lie; any other value as the one row it is."""
    waiting = [(where, value)]  # the next one last
    while waiting:
        where, value = waiting.pop()
        is_list = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
        if is_list and not _is_messages(value):
            waiting += [(f"{where}[{number}]", item) for number, item in enumerate(value)][::-1]
        else:
            yield where, value


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_message, value))


def read_row(
    row: Any, where: str, reading: Reading, read_text: TextReader, better: str = ""
) -> tuple[str, list[Dialogue]]:
    """Reads a row.

    Args:
      row: what JSON or a dataset gave.
      where: file and line, or dataset and number, for messages.
      reading: the choices; findings are added to it.
      read_text: reads a `text`, with markers or without.
      better: the key by which a person knows the answer; '' where the row has it as it was written.

    Returns:
      What the row was taken for, and its dialogues or documents.

    Raises:
      UserError: the row is malformed, or of no format that is known.
    """
    if _is_messages(row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {_kind(row)} where a row must be an object with 'messages'")
    # A dataset of many shapes gives every row all columns, null where they do not apply.
    row = {key: value for key, value in row.items() if value is not None}
    for key in LISTS:
        if isinstance(inner := row.get(key), dict) and any(name in inner for name in LISTS):
            outer = {name: value for name, value in row.items() if name != key}
            _note_unread({name: outer[name] for name in outer.keys() & inner.keys()}, {"id"}, "of rows", reading)
            return read_row({**outer, **inner}, f"{where}, {key}", reading, read_text, better)
    _refuse_what_no_turn_can_say(row, where)
    if preferred := preferred_key(row):
        plain, unread = chosen_side(row, preferred, where)
        shape, dialogues = read_row(plain, where, reading, read_text, preferred)
        _note_unread(unread, set(), "of rows", reading)
        reading.rejected += 1
        return f"{preferred!r}, {shape}", dialogues
    identity = None if row.get("id") in (None, "") else f"id {row['id']}"
    shape, used = _shape(row, where)
    taken_for = " and ".join(repr(key) for key in row if key in used) if shape == "pair" else repr(shape)
    if shape == "text":
        text = _text(row["text"], "text", where)
        if not text.lstrip().startswith("<|im_start|>"):
            opening = _opening(_system(row, where, reading))
            _note_unread(row, _READ_OF_ROWS | used, "of rows", reading)
            dialogues = [
                _opened(dialogue, opening, where, identity) for dialogue in read_text(text, where, identity, reading)
            ]
            is_document = dialogues[0].turns[0].role == TEXT
            return "'text', " + ("plain" if is_document else "with markers"), dialogues
        taken_for, messages = "'text', ChatML", _chatml(text, where)
    elif shape in LISTS:
        messages = row[shape]
        if not isinstance(messages, list):
            raise UserError(f"{where}: {shape!r} is {_kind(messages)}, not a list of turns")
    else:
        messages, used = _pair(row, used, where, better)
    system = _system(row, where, reading)
    _note_unread(row, _READ_OF_ROWS | used, "of rows", reading)
    turns = _turns(messages, system, where, (better or shape) if shape in LISTS else "turn", reading)
    return taken_for, [finish(turns, where, identity)]


def _system(row: Mapping[str, Any], where: str, reading: Reading) -> list[str]:
    """The texts that a row puts before its first turn: its system prompt and its list of tools."""
    system = [_content(row[key], f"{where}: {key}", reading) for key in ("system", "system_prompt") if key in row]
    for key in ("tools", "functions"):
        if tools := row.get(key):
            tools = tools if isinstance(tools, str) else _json(tools)
            if tools.strip() not in ("", "[]"):
                _note_tool(f"{where}: found {key!r}", reading)
                system.append(f"<tools>\n{tools}\n</tools>")
    return system


def _opening(system: Iterable[str]) -> str:
    return "\n\n".join(text.strip() for text in system if text.strip())


def _opened(dialogue: Dialogue, opening: str, where: str, identity: str | None) -> Dialogue:
    """A dialogue of marked text, which begins with the user's turn, with the system's text before it."""
    if not opening:
        return dialogue
    first, *rest = dialogue.turns
    if first.role == TEXT:
        raise UserError(f"{where}: found a system's text beside a plain 'text', which has no turns")
    return finish([first._replace(text=f"{opening}\n\n{first.text}"), *rest], where, identity)


def _refuse_what_no_turn_can_say(row: Mapping[str, Any], where: str) -> None:
    if "completion" in row and isinstance(row.get("label"), bool):
        raise UserError(f"{where}: found 'label' beside 'completion', a judgement, which this loss cannot learn from")
    for key in sorted(row.keys() & _NOT_TEXT):
        if row[key]:
            raise UserError(f"{where}: found {key!r}, which is not text: remove the row")


def _shape(row: Mapping[str, Any], where: str) -> tuple[str, set[str]]:
    """(key of a list of messages, 'text' or 'pair'; the keys that it reads)."""
    for key in LISTS:
        if key in row:
            return key, {key}
    for question, more, answer in PAIRS:
        if question in row and answer in row:
            return "pair", {question, answer, *({more} & row.keys())}
    if "text" in row:
        return "text", {"text"}
    keys = ", ".join(map(repr, row)) or "none"
    raise UserError(
        f"{where}: found the keys {keys}: a row needs 'messages', 'conversations', 'text' or a pair such as 'prompt' "
        "and 'completion'"
    )


def _pair(row: Mapping[str, Any], used: set[str], where: str, better: str) -> tuple[list[Any], set[str]]:
    """The messages of a question and its answer, and the keys that were read."""
    question, more, answer = next(pair for pair in PAIRS if pair[0] in used and pair[2] in used)
    messages: list[Any] = []
    if "history" in row:  # of Alpaca: pairs of texts
        used = used | {"history"}
        for number, turn in enumerate(row["history"] if isinstance(row["history"], list) else [row["history"]]):
            if not isinstance(turn, list) or len(turn) != 2:
                raise UserError(f"{where}, history[{number}]: found {_kind(turn)}, not a question and its answer")
            asked, answered = turn
            context = {"weight": 0} if better else {}  # which both sides of a preference share
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered, **context},
            ]
    said = row[answer]
    if not isinstance(said, list):
        said = [{"role": "assistant", "content": _text(said, better or answer, where)}]
    if isinstance(row[question], list):  # of messages, which are what the answer is given to
        used = used - {more}
        if row[question] and said and side_of(row[question][-1]) == side_of(said[0]) == "assistant":
            raise UserError(
                f"{where}: the prompt ends with an assistant turn, which the answer would follow: end it with the "
                "user's turn, or give the whole dialogue as 'messages'"
            )
        messages += [
            {**message, "weight": 0} if side_of(message) == "assistant" else message for message in row[question]
        ]
    else:
        texts = [_text(row[key], key, where) for key in (question, more) if key in row]
        if asked := "\n\n".join(text.strip() for text in texts if text.strip()):
            messages.append({"role": "user", "content": asked})
    return messages + said, used


def _chatml(text: str, where: str) -> list[dict[str, str]]:
    messages, end = [], 0
    while match := _CHATML.match(text, end):
        messages.append({"role": match[1].strip(), "content": match[2]})
        end = match.end()
    if rest := text[end:].strip():
        raise UserError(
            f"{where}: found {rest[:40]!r}, which is no whole turn of ChatML: "
            "<|im_start|>role, a new line, text<|im_end|>"
        )
    return messages


@dataclasses.dataclass
class _Said:
    """One message as text."""

    where: str
    side: str  # user, assistant or system
    text: str
    tool: bool  # whether it is a call of a tool or an answer
    context: bool  # whether it is never a target


def _turns(messages: list[Any], system: list[str], where: str, shape: str, reading: Reading) -> list[Turn]:
    """Messages as turns. The system's text comes before the first user turn's, or is that turn where there is none."""
    system, said = list(system), []
    for position, message in enumerate(messages):
        one = _said(message, f"{where}, {shape}[{position}]", reading)
        before = said[-1] if said else None
        if one.side == "system":
            if before:
                raise UserError(f"{one.where}: a system turn can only come first")
            system.append(one.text)
        elif not before and one.tool and one.side == "user":
            raise UserError(f"{one.where}: found a tool's answer before any call")
        elif before and before.side == one.side and before.context == one.context and before.text.strip():
            if not one.text.strip():
                raise UserError(f"{one.where}: the {one.side} turn is empty: fill it or remove the dialogue")
            tool = before.tool or one.tool
            between = "\n" if tool else "\n\n"
            before.text, before.tool = f"{before.text.strip()}{between}{one.text.strip()}", tool
            reading.joined += not tool
        elif before and before.side == one.side and before.context != one.context:
            raise UserError(f"{one.where}: found weights 0 and 1 in turns of one side that follow each other")
        else:
            said.append(one)
    turns: list[Turn] = []
    if opening := _opening(system):
        if said and said[0].side == "user":
            said[0].text = f"{opening}\n\n{said[0].text.strip()}" if said[0].text.strip() else ""
        elif said:
            add_turn(turns, Turn("user", opening), where)
    for one in said:
        turn = (Context if one.context else Turn)(one.side, one.text)
        add_turn(turns, turn, one.where, assistant_may_open=True)
    reading.context += sum(one.context for one in said)
    return turns


def _said(message: Any, where: str, reading: Reading) -> _Said:
    if not isinstance(message, dict):
        raise UserError(f"{where}: found {_kind(message)} where a turn must be an object with 'role' and 'content'")
    message = {key: value for key, value in message.items() if value is not None}
    role_key, text_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role = ROLES.get(str(message.get(role_key)))
    if role is None:
        raise UserError(f"{where}: {role_key!r} is {message.get(role_key)!r}, not one of {', '.join(ROLES)}")
    for key in sorted(message.keys() & _NO_TURN):
        if message[key]:
            raise UserError(f"{where}: found {key!r}, which is not text")
    _note_unread(message, _READ | _LINKS, "of messages", reading)

    texts, tool = _parts(message[text_key], where, text_key, reading) if text_key in message else ([], False)
    if message.get("refusal"):
        texts.append(_text(message["refusal"], "refusal", where))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UserError(f"{where}: 'tool_calls' is {_kind(calls)}, not a list")
    calls = calls + ([message["function_call"]] if message.get("function_call") else [])
    for call in calls:
        _note_tool(f"{where}: found a tool call", reading)
        texts.append(_call(call, where, reading))
    if text_key not in message and not texts:
        raise UserError(f"{where}: found nothing where {text_key!r} must hold text")
    if role in ("call", "answer"):
        _note_tool(f"{where}: found {role_key!r} {message[role_key]!r}, a tool's", reading)
        texts = [_tagged("tool_call" if role == "call" else "tool_response", "\n".join(texts))]
    side = SIDES[role]
    context = any(_no_target(message, key, where) for key in sorted(message.keys() & _COUNTED.keys()))
    return _Said(
        where, side, "\n".join(text for text in texts if text.strip()), tool or side != role or bool(calls), context
    )


def _parts(content: Any, where: str, key: str, reading: Reading) -> tuple[list[str], bool]:
    """The texts of a message's content: a text, or a list of typed parts, as of OpenAI and Anthropic; and whether a
    tool has part in it."""
    if isinstance(content, str):
        return [content], False
    if not isinstance(content, list):
        raise UserError(f"{where}: found {_kind(content)} where {key!r} must hold text")
    texts, tool = [], False
    for number, part in enumerate(content):
        here = f"{where}, {key}[{number}]"
        if not isinstance(part, dict):
            raise UserError(f"{here}: found {_kind(part)} where a part must be an object with 'type'")
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type")
        if isinstance(kind, str) and kind in _READ_OF_PARTS:
            _note_unread(part, {"type", *_READ_OF_PARTS[kind], *_LINKS}, "of parts", reading)
        if kind in ("text", "input_text", "output_text"):
            texts.append(_text(part.get("text"), "text", here))
        elif kind == "refusal":
            texts.append(_text(part.get("refusal"), "refusal", here))
        elif kind in ("tool_use", "tool_result"):
            tool = True
            _note_tool(f"{here}: found {kind!r}", reading)
            if kind == "tool_use":
                texts.append(_call({"name": part.get("name"), "arguments": part.get("input")}, here, reading))
            else:
                inner, _ = _parts(part.get("content") or "", here, "content", reading)
                texts.append(_tagged("tool_response", "\n".join(inner)))
        else:
            raise UserError(f"{here}: found a part of type {kind!r}, which is not text")
    return texts, tool


def _call(call: Any, where: str, reading: Reading) -> str:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: found a tool call without the name of a function")
    found = {key: value for key, value in {**call, **function}.items() if value is not None}
    _note_unread(found, {"function", "name", "arguments", "type", "index", *_LINKS}, "of tool calls", reading)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # no JSON: what the model wrote stays
            arguments = json.loads(arguments)
    return _tagged("tool_call", _json({"name": function["name"], "arguments": arguments}))


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text.strip()}\n</{tag}>"


def _no_target(message: Mapping[str, Any], key: str, where: str) -> bool:
    if message[key] not in _COUNTED[key]:
        no, yes = map(_json, _COUNTED[key])
        raise UserError(f"{where}: {key!r} is {message[key]!r}, neither {no} nor {yes}")
    return not message[key]


def _content(value: Any, where: str, reading: Reading) -> str:
    """The text of a top-level system prompt."""
    texts, _ = _parts(value, where, "content", dataclasses.replace(reading, tool_calls="refuse"))  # shares the counter
    return "\n".join(texts)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {_kind(value)}, not text")
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _note_tool(found: str, reading: Reading) -> None:
    if reading.tool_calls == "refuse":
        raise UserError(f"{found}: set data.tool_calls=text to have it read as text, or remove the row")
    reading.tools += 1


def _note_unread(found: Mapping[str, Any], read: set[str], whose: str, reading: Reading) -> None:
    if found.keys() <= read:  # nearly always
        return
    for key, value in found.items():
        if key not in read and value not in ("", [], {}):
            name = f"{key!r} {whose}"
            reading.unread[name] = reading.unread.get(name, 0) + 1  # += is slow for a key that is new


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")
