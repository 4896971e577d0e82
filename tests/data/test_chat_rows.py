"""Every format of rows that people have: read as what it is, or refused by one line; nothing is left out unsaid."""

import itertools
import json
import random

import pytest

from gpt_jax.data import corpus, files
from gpt_jax.data.dialogue import Context, Turn
from gpt_jax.data.reading import Reading
from gpt_jax.errors import UserError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
LAMP = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": '{"n": 0}'}}
CALL = '<tool_call>\n{"name": "lamp", "arguments": {"n": 0}}\n</tool_call>'
ANSWER = "<tool_response>\non\n</tool_response>"
TOOLS = '<tools>\n[{"name": "lamp"}]\n</tools>'


def chat(*texts):
    return tuple(Turn(role, text) for role, text in zip(itertools.cycle(["user", "assistant"]), texts))


def document(text):
    return (Turn("text", text),)


def read(path, *rows, **choices):
    """(turns of each dialogue, notes) of rows in a file of JSON lines."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    reading = Reading(**choices)
    return [dialogue.turns for dialogue in corpus.read_corpus(str(path), reading)], reading.notes()


def said(*messages, **more):
    return {"messages": [*messages], **more}


ROWS = {
    "bare list": ([Q, A], chat("q", "a")),
    "conversations in OpenAI's words": ({"conversations": [Q, A]}, chat("q", "a")),
    "messages in ShareGPT's words": (
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        chat("q", "a"),
    ),
    "conversation": ({"conversation": [Q, A]}, chat("q", "a")),
    "nested": ({"conversation": {"system": "S", "messages": [Q, A]}}, chat("S\n\nq", "a")),
    "developer": (said({"role": "developer", "content": "S"}, Q, A), chat("S\n\nq", "a")),
    "two system turns": (
        said({"role": "system", "content": "S"}, {"role": "developer", "content": "D"}, Q, A),
        chat("S\n\nD\n\nq", "a"),
    ),
    "system at the top": (said(Q, A, system="S"), chat("S\n\nq", "a")),
    "system at the top in parts": (said(Q, A, system=[{"type": "text", "text": "S"}]), chat("S\n\nq", "a")),
    "no user turn": (said({"role": "system", "content": "S"}, A), chat("S", "a")),
    "assistant first": (said(A, Q, A), (Turn("assistant", "a"), *chat("q", "a"))),
    "content in parts": (
        said({"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}, A),
        chat("q\nr", "a"),
    ),
    "refusal": (said(Q, {"role": "assistant", "content": None, "refusal": "No."}), chat("q", "No.")),
    "call beside text": (said(Q, A | {"tool_calls": [LAMP]}), chat("q", f"a\n{CALL}")),
    "call without text, and its answer": (
        said(Q, {"role": "assistant", "content": None, "tool_calls": [LAMP]},
             {"role": "tool", "tool_call_id": "c1", "content": "on"}, A),
        chat("q", CALL, ANSWER, "a"),
    ),
    "two calls at once": (
        said(Q, {"role": "assistant", "tool_calls": [LAMP, LAMP]}, {"role": "tool", "content": "on"},
             {"role": "tool", "content": "on"}, A),
        chat("q", f"{CALL}\n{CALL}", f"{ANSWER}\n{ANSWER}", "a"),
    ),
    "call of the old kind": (
        said(Q, {"role": "assistant", "content": None, "function_call": LAMP["function"]},
             {"role": "function", "name": "lamp", "content": "on"}, A),
        chat("q", CALL, ANSWER, "a"),
    ),
    "ShareGPT's calls": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "lamp"}'},
                           {"from": "observation", "value": "on"}, {"from": "gpt", "value": "a"}],
         "tools": '[{"name": "lamp"}]', "system": ""},
        chat(f"{TOOLS}\n\nq", '<tool_call>\n{"name": "lamp"}\n</tool_call>', ANSWER, "a"),
    ),
    "Anthropic's blocks": (
        said(Q, {"role": "assistant", "content": [{"type": "text", "text": "Sure."},
                 {"type": "tool_use", "id": "t", "name": "lamp", "input": {"n": 0}}]},
             {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
                                           "content": [{"type": "text", "text": "on"}]}]}, A),
        chat("q", f"Sure.\n{CALL}", ANSWER, "a"),
    ),
    "list of tools": (said(Q, A, tools=[{"name": "lamp"}]), chat(f"{TOOLS}\n\nq", "a")),
    "prompt and completion": ({"prompt": "q\n\n###\n\n", "completion": " a"}, chat("q\n\n###", "a")),
    "completion alone": ({"prompt": "", "completion": "a"}, (Turn("assistant", "a"),)),
    "lists of messages": (
        {"prompt": [Q, A, Q], "completion": [A]},
        (Turn("user", "q"), Context("assistant", "a"), *chat("q", "a")),
    ),
    "Alpaca": ({"instruction": "i", "input": "x", "output": "a", "text": "### i"}, chat("i\n\nx", "a")),
    "Alpaca with a history": (
        {"instruction": "i", "input": "", "output": "a", "system": "S", "history": [["q", "r"]]},
        chat("S\n\nq", "r", "i", "a"),
    ),
    "Dolly": ({"instruction": "i", "context": "c", "response": "a"}, chat("i\n\nc", "a")),
    "question and answer": ({"question": "q", "answer": "a"}, chat("q", "a")),
    "ChatML": (
        {"text": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
                 "<|im_start|>assistant\na\nb<|im_end|>\n"},
        chat("S\n\nq", "a\nb"),
    ),
    "marked text with a system and tools": (
        {"text": "<|user|>q<|assistant|>a<|user|>r<|assistant|>b<|end_of_text|>", "system": "S",
         "tools": [{"name": "lamp"}]},
        chat(f"S\n\n{TOOLS}\n\nq", "a", "r", "b"),
    ),
    "a column for everything": (
        {"messages": [Q | {"tool_calls": None, "weight": None, "name": None}, A], "text": None, "prompt": None},
        chat("q", "a"),
    ),
    "weight 0": (
        said(Q, A | {"weight": 0}, Q, A | {"weight": 1}),
        (Turn("user", "q"), Context("assistant", "a"), *chat("q", "a")),
    ),
    "plain text": ({"text": " one\n\ntwo ", "meta": {}}, document("one\n\ntwo")),
    "two users": (said(Q, Q | {"content": "r"}, A), chat("q\n\nr", "a")),
    "an answer in two turns": (said(Q, A, A | {"content": "b"}), chat("q", "a\n\nb")),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, chat("q", "a")),
    "preferences with a system": (
        {"system": "S", "question": "q", "chosen": "a", "rejected": "b"},
        chat("S\n\nq", "a"),
    ),
    "Alpaca's preferences": (
        {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"},
        chat("i\n\nx", "a"),
    ),
    "preferences in messages": (
        {"prompt": [Q, A, Q], "chosen": [A], "rejected": [B]},
        (Turn("user", "q"), Context("assistant", "a"), *chat("q", "a")),
    ),
    "whole dialogues of preferences": (
        {"prompt": "q", "prompt_id": "x", "chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B], "messages": [Q, A, Q, A]},
        (Turn("user", "q"), Context("assistant", "a"), *chat("q", "a")),
    ),
    "dialogues that differ from the first answer on": (
        {"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, B]},
        chat("q", "a", "q", "a"),
    ),
    "dialogues that differ in the second turn of an answer": (
        {"chosen": [Q, A, B], "rejected": [Q, A, A]},
        chat("q", "a\n\nb"),
    ),
    "a prompt that the assistant ends, and what the user says then": (
        {"prompt": [Q, A], "completion": [Q, B]},
        (Turn("user", "q"), Context("assistant", "a"), *chat("q", "b")),
    ),
    "a call in the prompt": (
        {"conversations": [Q, {"from": "function_call", "value": "c"}, {"from": "observation", "value": "on"}],
         "chosen": A, "rejected": B},
        (Turn("user", "q"), Context("assistant", "<tool_call>\nc\n</tool_call>"), *chat(ANSWER, "a")),
    ),
    "a call that is the answer": (
        {"prompt": "q", "chosen": [{"role": "tool_call", "content": "c"}], "rejected": "b"},
        chat("q", "<tool_call>\nc\n</tool_call>"),
    ),
    "Anthropic's preferences": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: Human: r\n\nAssistant: b",
         "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: Human: r\n\nAssistant: c"},
        (Turn("user", "q"), Context("assistant", "a"), *chat("Human: r", "b")),
    ),
    "Anthropic's preferences with the prompt apart": (
        {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r \n\nAssistant:", "chosen": " b", "rejected": " c"},
        (Turn("user", "q"), Context("assistant", "a"), *chat("r", "b")),
    ),
    "Anthropic's preferences, the prompt apart and in both sides": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ",
         "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        chat("q", "a"),
    ),
    "a transcript that does not open the answer": (
        {"prompt": "\n\nHuman: q\n\n", "chosen": [A], "rejected": [B]},
        chat("q", "a"),
    ),
    "a transcript as the prompt of a pair": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a"},
        chat("Human: q\n\nAssistant:", "a"),
    ),
    "a prompt that only begins like a transcript": (
        {"prompt": "Assistant: write it", "chosen": "a", "rejected": "b"},
        chat("Assistant: write it", "a"),
    ),
    "a transcript with an empty turn": (
        {"prompt": "\n\nHuman: q\n\nAssistant:\n\nHuman: r\n\nAssistant:", "chosen": "a", "rejected": "b"},
        chat("Human: q\n\nAssistant:\n\nHuman: r\n\nAssistant:", "a"),
    ),
    "dialogues with a prompt that begins like a transcript": (
        {"prompt": "\n\nHuman: q", "chosen": [{"role": "user", "content": "Human: q"}, A],
         "rejected": [{"role": "user", "content": "Human: q"}, B]},
        chat("Human: q", "a"),
    ),
    "preferences with a history": (
        {"prompt": "r", "history": [["q", "h"]], "chosen": "a", "rejected": "b"},
        (Turn("user", "q"), Context("assistant", "h"), *chat("r", "a")),
    ),
    "an empty prompt beside a question": (
        {"prompt": "", "question": "q", "chosen": "a", "rejected": "b"},
        chat("q", "a"),
    ),
    "OpenAI's preferences": (
        {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
        chat("q", "a"),
    ),
    "a prompt of one message": ({"prompt": Q, "chosen": "a", "rejected": "b"}, chat("q", "a")),
    "dialogues with a prompt of one message": ({"prompt": Q, "chosen": [Q, A], "rejected": [Q, B]}, chat("q", "a")),
    "ShareGPT's preferences": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                           {"from": "human", "value": "q"}],
         "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        (Turn("user", "q"), Context("assistant", "a"), *chat("q", "a")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read_as_what_it_is(tmp_path, name):
    row, expected = ROWS[name]
    (turns,), _ = read(tmp_path / "rows.jsonl", row)
    assert turns == expected
    assert [type(turn) for turn in turns] == [type(turn) for turn in expected]


REFUSED = {
    "image": (
        said({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A),
        r"messages\[0\], content\[0\]: found a part of type 'image_url', which is not text",
    ),
    "audio": (said(Q, A | {"audio": {"id": "x"}}), r"messages\[1\]: found 'audio', which is not text"),
    "a file of a message": (
        said(Q | {"attachments": ["x.pdf"]}, A),
        r"messages\[0\]: found 'attachments', which",
    ),
    "a file in a part": (
        said(Q | {"content": [{"type": "file", "file": {"file_id": "x"}}]}, A),
        "found a part of type 'file', which is not text",
    ),
    "images of the row": (said(Q, A, images=["x.png"]), "found 'images', which is not text"),
    "thought": (
        said(Q, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}]}),
        r"content\[0\]: found a part of type 'thinking'",
    ),
    "preferences of nothing": ({"chosen": "a", "rejected": "b"}, "but no 'prompt' that they answer"),
    "preferences with another prompt": (
        {"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]},
        "the 'prompt' is not in the 'chosen' dialogue",
    ),
    "preferences with a longer prompt": (
        {"prompt": [Q, A, Q], "chosen": [Q, A], "rejected": [Q, B]},
        "the 'prompt' is not how the 'chosen' dialogue begins",
    ),
    "preferences with a prompt of one other message": (
        {"prompt": B, "chosen": [Q, A], "rejected": [Q, B]},
        "the 'prompt' is not how the 'chosen' dialogue begins",
    ),
    "a prompt that the assistant ends": (
        {"prompt": [Q, A], "completion": "b"},
        "the prompt ends with an assistant turn, which the answer would follow: end it with the user's turn, or give",
    ),
    "a prompt that the assistant ends before messages": (
        {"prompt": [Q, A], "completion": [B]},
        "the prompt ends with an assistant turn",
    ),
    "a prompt of preferences that the assistant ends": (
        {"conversations": [Q, A], "chosen": A, "rejected": B},
        "the prompt ends with an assistant turn",
    ),
    "a transcript that the assistant ends": (
        {"prompt": "\n\nHuman: q\n\nAssistant: Sure,", "chosen": "a", "rejected": "b"},
        "the prompt ends with an assistant turn",
    ),
    "a number for the chosen side": ({"prompt": "q", "chosen": 5, "rejected": "x"}, "'chosen' is a number, not text"),
    "a number for the preferred side": (
        {"input": {"messages": [Q]}, "preferred_output": 5, "non_preferred_output": [B]},
        "'preferred_output' is a number, not text",
    ),
    "a number in the chosen dialogue": ({"chosen": [Q, 5], "rejected": [Q, B]}, r"chosen\[1\]: found a number where"),
    "judgement": ({"prompt": "q", "completion": "a", "label": False}, "found 'label' beside 'completion'"),
    "half a weight": (said(Q, A | {"weight": 0.5}), r"messages\[1\]: 'weight' is 0.5, neither 0 nor 1"),
    "a text for messages": ({"messages": "[]"}, "'messages' is text, not a list of turns"),
    "a number for an answer": ({"question": "q", "answer": 3}, "'answer' is a number, not text"),
    "a call without a name": (said(Q, A | {"tool_calls": [{"id": 1}]}), "a tool call without the name of a function"),
    "two weights in a row": (
        said(Q, A | {"weight": 0}, A),
        r"messages\[2\]: found weights 0 and 1 in turns of one side",
    ),
    "an empty turn after one of its side": (said(Q, Q | {"content": " "}, A), r"messages\[1\]: the user turn is empty"),
    "a system beside plain text": ({"text": "plain", "system": "S"}, "found a system's text beside a plain 'text'"),
    "an empty text": ({"text": " <|endoftext|>\n"}, "'text' is empty: fill it or remove the row"),
    "a history of texts": ({"instruction": "i", "output": "a", "history": ["q"]}, r"history\[0\]: found text"),
    "ChatML cut": ({"text": "<|im_start|>user\nq"}, "which is no whole turn of ChatML"),
    "a marker of a turn in the middle": ({"text": "stray<|user|>q"}, "found 'stray' outside any dialogue"),
    "a comma": (json.dumps(said(Q, A)) + ",", "not a JSON object: Extra data.*; remove the comma after it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_turn_can_say_is_refused_with_its_place(tmp_path, name):
    row, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "rows.jsonl", said(Q, A), row)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:2")
    assert "\n" not in str(error.value)


def test_the_system_of_a_row_is_read_in_each_dialogue_of_its_text(tmp_path):
    text = "<|user|>q<|assistant|>a<|end_of_text|>"
    turns, notes = read(
        tmp_path / "rows.jsonl", {"text": text * 2, "system_prompt": "S"}, {"text": text, "system": " "}
    )
    assert turns == [chat("S\n\nq", "a")] * 2 + [chat("q", "a")]
    assert notes == []
    with pytest.raises(UserError, match=r"rows.jsonl:1: system: found a number where"):
        read(tmp_path / "rows.jsonl", {"text": text, "system": 3})
    with pytest.raises(UserError, match=r"found 'tools': set data.tool_calls=text"):
        read(tmp_path / "rows.jsonl", {"text": text, "tools": "[1]"}, tool_calls="refuse")


def test_tool_calls_are_refused_by_choice(tmp_path):
    for name in ("call beside text", "ShareGPT's calls", "Anthropic's blocks", "list of tools"):
        with pytest.raises(UserError, match=r"rows.jsonl:1.*: found .*: set data.tool_calls=text to have it read"):
            read(tmp_path / "rows.jsonl", ROWS[name][0], tool_calls="refuse")
    read(tmp_path / "rows.jsonl", said(Q, A, tools=[]), tool_calls="refuse")  # none


def test_what_is_read_otherwise_or_not_at_all_is_said(tmp_path):
    rows = [said(Q | {"name": "Ann"}, A | {"weight": 0, "tool_calls": [LAMP]}, score=3, tags=[]), said(Q, A, score=4)]
    assert read(tmp_path / "rows.jsonl", *rows)[1] == [
        "1 tool calls, answers and lists of tools are read as text (data.tool_calls=refuse refuses them)",
        "1 turns of weight 0 are context, never targets",
        "keys that were not read: 'score' of rows (2), 'name' of messages (1)",
    ]
    assert read(tmp_path / "rows.jsonl", said(Q, A, id=1))[1] == []
    assert read(tmp_path / "rows.jsonl", said(Q, Q, A), *[{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2)[1] == [
        "2 rows are pairs of preferences: the chosen side is read, the rejected is left out",
        "1 turns follow one of the same side and are joined to it by a blank line",
    ]
    about = {"file": "part-1.json", "files": ["a"], "attachments": [{"name": "b"}]}  # where the row is from, it may be
    assert read(tmp_path / "rows.jsonl", said(Q, A, **about)) == (
        [chat("q", "a")],
        ["keys that were not read: 'file' of rows (1), 'files' of rows (1), 'attachments' of rows (1)"],
    )
    parts = [{"type": "text", "text": "q", "cache_control": None}, {"type": "text", "text": "r", "citations": ["c"]}]
    answer = [{"type": "tool_result", "tool_use_id": "c1", "content": "on", "is_error": True}]
    row = said(Q | {"content": parts}, A | {"tool_calls": [LAMP | {"result": 1}]}, Q | {"content": answer}, A)
    assert read(tmp_path / "rows.jsonl", row | {"system": parts[1:]})[1][1:] == [
        "keys that were not read: 'citations' of parts (2), 'result' of tool calls (1), 'is_error' of parts (1)"
    ]


PAIR, DIALOGUES = {"chosen": "a", "rejected": "b"}, {"chosen": [Q, A], "rejected": [Q, B]}
NOT_READ = {  # rows whose chosen side is the answer to q, and the keys beside it that are not read
    "messages beside whole dialogues": (DIALOGUES | {"messages": [Q, B]}, "messages"),
    "conversations beside whole dialogues": (DIALOGUES | {"conversations": [Q, B]}, "conversations"),
    "no list in conversations": (DIALOGUES | {"conversations": "q"}, "conversations"),
    "how the chosen dialogue begins": (DIALOGUES | {"messages": [Q], "conversation": [Q, A]},),
    "a prompt that is no text": (DIALOGUES | {"prompt": 3}, "prompt"),
    "an answer": (PAIR | {"question": "q", "answer": "x"}, "answer"),
    "a completion": (PAIR | {"prompt": "q", "completion": "x"}, "completion"),
    "the chosen side once more": (PAIR | {"prompt": "q", "completion": "a"},),
    "a completion after messages": (PAIR | {"messages": [Q], "completion": "x"}, "completion"),
    "messages beside a prompt": (PAIR | {"prompt": "q", "messages": [Q, B]}, "messages"),
    "a prompt beside OpenAI's": (
        {"input": {"messages": [Q]}, "prompt": "x", "completion": "x", "messages": [Q, B],
         "preferred_output": [A], "non_preferred_output": [B]},
        "prompt", "completion", "messages",
    ),
    "an empty prompt": (PAIR | {"prompt": "", "messages": [Q]},),
    "a context of messages": ({"question": [Q], "context": "c", "answer": "a"}, "context"),
    "what stands in a dialogue and beside it": (
        {"system": "", "source": "x", "conversation": {"source": "y", "messages": [Q, A]}}, "source", "source",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_what_stands_beside_the_side_that_is_read_is_counted(tmp_path, name):
    row, *keys = NOT_READ[name]
    reading = Reading()
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    [dialogue] = corpus.read_corpus(str(tmp_path / "rows.jsonl"), reading)
    assert dialogue.turns == chat("q", "a")
    assert sorted(reading.unread.elements()) == sorted(f"{key!r} of rows" for key in keys)


def test_bad_rows_are_skipped_counted_and_listed_by_choice(tmp_path):
    path = tmp_path / "rows.jsonl"
    half_good = {"text": "<|user|>q<|assistant|>a<|end_of_text|><|user|>"}
    rows = [said(Q, A), said(Q), '{"messages": [', half_good, said(Q, A)]
    turns, notes = read(path, *rows, on_error="skip")
    assert turns == [chat("q", "a")] * 2  # nothing of a bad row, not its good half either
    assert notes[0] == "3 bad rows, dialogues or files skipped (data.on_error=skip):"
    assert notes[1] == f"  {path}:2: the dialogue ends with a user turn: an assistant turn must come last"
    assert [line.split(": ")[0] for line in notes[1:]] == [f"  {path}:{number}" for number in (2, 3, 4)]
    turns, notes = read(path, *[said(Q)] * 25, said(Q, A), on_error="skip")
    assert (len(turns), len(notes), notes[-1]) == (1, 22, "  and 5 more")

    turns, notes = read(
        path, json.dumps([said(Q, A), said(Q), [said(Q, A), said(Q, A | {"content": ""})]]), on_error="skip"
    )
    assert turns == [chat("q", "a")] * 2  # of a list in one line, as json.dump writes it, the bad rows alone
    assert [line.split(": ")[0] for line in notes[1:]] == [f"  {path}:1[1]", f"  {path}:1[2][1], messages[1]"]

    good_row = json.dumps(said(Q, A)).encode()
    for first in (b'{"text": "\xff"}', good_row + b" and more"):  # the first line bad: a file of lines all the same
        path.write_bytes(first + b"\n" + good_row)
        reading = Reading(on_error="skip")
        assert [dialogue.turns for dialogue in corpus.read_corpus(str(path), reading)] == [chat("q", "a")]
        assert reading.skipped == 1

    path = tmp_path / "chats.txt"
    good = "<|user|>q<|assistant|>a<|end_of_text|>\n"
    path.write_text(
        f"{good}stray{good}<|user|>x<|user|>y<|assistant|>z<|end_of_text|>{good}<|user|>q<|end_of_text|>{good}<|user|>q"
    )
    reading = Reading(on_error="skip")
    assert [dialogue.turns for dialogue in corpus.read_corpus(str(path), reading)] == [chat("q", "a")] * 4
    assert reading.skipped == 4


GOOD = "<|user|>q<|assistant|>a<|end_of_text|>\n"
BAD_MARKED = {  # with how many dialogues are bad
    "no marker of a turn": ("q a<|end_of_text|>", 1),
    "no marker of a turn, twice": ("q a<|end_of_text|>\nq a<|end_of_text|>", 2),
    "no turn": ("<|end_of_text|>", 1),
    "a question alone": ("<|user|>q<|end_of_text|>", 1),
    "a question alone, then no marker": ("<|user|>q<|end_of_text|>q a<|end_of_text|>", 2),
    "two questions": ("<|user|>q<|user|>q<|assistant|>a<|user|><|end_of_text|>", 1),
    "an answer first": ("<|assistant|>a<|user|>q<|assistant|>a<|end_of_text|>", 1),
    "an empty answer": ("<|user|>q<|assistant|><|end_of_text|>", 1),
    "no marker of the question": ("q<|assistant|>a<|end_of_text|>", 1),
    "text before a bad one": ("stray<|user|>q<|end_of_text|>", 1),
    "text between": ("stray", 1),
}


@pytest.mark.parametrize("name", BAD_MARKED)
@pytest.mark.parametrize("before", ["", GOOD])
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_a_bad_dialogue_of_marked_text_counts_once(tmp_path, monkeypatch, name, before, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    text, count = BAD_MARKED[name]
    path, reading = tmp_path / "chats.txt", Reading(on_error="skip")
    path.write_text(f"{before}{text}{GOOD}")
    expected = [chat("q", "a")] * (2 if before else 1)
    assert [dialogue.turns for dialogue in corpus.read_corpus(str(path), reading)] == expected
    assert reading.skipped == count


def test_what_is_found_in_a_row_counts_only_where_the_row_is_read(tmp_path):
    bad = said({"role": "system", "content": "S"}, A | {"weight": 0}, Q, Q | {"name": "x"}, A | {"tool_calls": [LAMP]},
               Q, score=1, tools=[1])  # fmt: skip
    worse = {"system": "S", "text": "x" * 100_000, "score": 1}  # parts of a document, then refused
    pair = {"prompt": [Q, A, Q], "chosen": [A, Q], "rejected": [B], "score": 1}
    path, reading = tmp_path / "rows.jsonl", Reading(on_error="skip")
    path.write_text("\n".join(map(json.dumps, [bad, said(Q, A), worse, pair, bad])))
    assert [dialogue.turns for dialogue in corpus.read_corpus(str(path), reading)] == [chat("q", "a")]
    assert reading.skipped == 4
    assert (reading.tools, reading.context, reading.joined, reading.rejected, reading.parts) == (0, 0, 0, 0, 0)
    assert not reading.unread
    good = said(*bad["messages"], A, score=1, tools=[1])
    path.write_text("\n".join(map(json.dumps, [good, bad, good, {"text": "x " * 50_000}])))
    reading = Reading(on_error="skip")
    assert len(list(corpus.read_corpus(str(path), reading))) == 2 + reading.parts
    assert (reading.tools, reading.context, reading.joined, reading.skipped) == (4, 2, 2, 1)
    assert reading.unread == {"'name' of messages": 2, "'score' of rows": 2}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_of_one_list_is_read_in_chunks(tmp_path, monkeypatch, indent, chunk, end):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    rows = [said(Q, A), [Q, A], said(Q, {"role": "assistant", "content": "日\n"})]
    expected = [chat("q", "a"), chat("q", "a"), chat("q", "日")]

    def write(text):
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
        return [dialogue.turns for dialogue in corpus.read_corpus(str(path))]

    assert write("\n" + json.dumps(rows, indent=indent, ensure_ascii=False)) == expected
    assert write("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n") == expected
    assert write("\n".join(json.dumps(row, indent=2) for row in rows)) == expected
    rows.insert(1, said(Q))
    with pytest.raises(UserError, match=r"rows.json:3.*: the dialogue ends with a user"):
        write("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    with pytest.raises(UserError, match=r"rows.json:3: not valid JSON: Expecting"):
        write('[\n{"messages": []},\n{"messages": [}\n]'.replace("[]", json.dumps([Q, A])))
    with pytest.raises(UserError, match=r"the list of rows is not closed: is the file cut|not valid JSON"):
        write(json.dumps([said(Q, A)], indent=indent)[:-1])
    with pytest.raises(UserError, match="found 'x' after the end of the list"):
        write(json.dumps([said(Q, A)], indent=1) + "\nx")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_a_list_of_messages_is_one_dialogue_over_however_many_lines(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path, reading = tmp_path / "chat.json", Reading()
    one, last = [Q, A | {"content": "日\n"}], [{"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]
    path.write_text("\n" + json.dumps(one, indent=indent))
    [dialogue] = corpus.read_corpus(str(path), reading)
    assert dialogue.turns == chat("q", "日")
    assert reading.examples.popitem()[1].startswith(f"{path}:2: ")
    several = "\n".join(json.dumps(row, indent=indent) for row in (one, said(Q, A), last))
    path.write_text(several)
    assert [dialogue.turns for dialogue in corpus.read_corpus(str(path))] == [
        chat("q", "日"), chat("q", "a"), chat("r", "b")
    ]  # fmt: skip
    path.write_text("[\n" + ",\n".join(json.dumps(message, indent=indent) for message in one) + "\n]\n")
    assert [dialogue.turns for dialogue in corpus.read_corpus(str(path))] == [chat("q", "日")]
    path.write_text("[" + json.dumps(Q) + ",\n" + json.dumps(A | {"role": "alien"}) + "]")
    with pytest.raises(UserError, match=rf"{path.name}:1, messages\[1\]: 'role' is 'alien', not one of"):
        list(corpus.read_corpus(str(path)))
    rows = [{"from": "a library", "text": "one"}, {"from": "a library", "text": "two"}]  # of which none is a message
    path.write_text(json.dumps(rows, indent=indent))
    assert [dialogue.turns for dialogue in corpus.read_corpus(str(path))] == [document("one"), document("two")]


def test_a_list_of_rows_is_a_stream_and_one_of_messages_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_DIALOGUE", 2000)
    monkeypatch.setattr(files, "CHUNK", 100)
    path = tmp_path / "rows.json"
    path.write_text("[\n" + ",\n".join([json.dumps(said(Q, A))] * 100) + "\n]")
    assert len(list(corpus.read_corpus(str(path)))) == 100
    path.write_text("[\n" + ",\n".join(map(json.dumps, [Q, A] * 100)) + "\n]")
    with pytest.raises(UserError, match=r"rows.json:\d+: not valid JSON, or a row of over 2,000 characters"):
        list(corpus.read_corpus(str(path)))


def test_all_dialogues_of_an_id_are_one_source(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "<|user|>{}<|assistant|>a<|end_of_text|>"
    path.write_text(
        "\n".join(json.dumps({"id": n % 5, "text": text.format(n) + text.format(-n)}) for n in range(20))
        + '\n{"id": "\\ud83d", "messages": ' + json.dumps([Q, A]) + "}"
    )  # fmt: skip
    sources = [dialogue.source for dialogue in corpus.read_corpus(str(path))]
    assert sources[:-1] == [f"id {n % 5}" for n in range(20) for _ in range(2)]
    assert isinstance(corpus.is_validation(sources[-1], 0.5), bool)  # known by its bytes


@pytest.mark.slow
def test_a_dataset_that_cannot_be_read_on_names_its_row(tmp_path, capfd):
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(said(Q, A))] * 3) + '\n{"messages": [{"role": "us')
    with pytest.raises(UserError, match=rf"hf:{tmp_path} row 0 or one after it cannot be read: .*row 3") as error:
        list(corpus.read_corpus(f"hf:{tmp_path}"))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_bad_row_of_a_dataset_is_named_and_skipped_by_choice(tmp_path):
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in (said(Q, A), said(Q), said(Q, A))))
    with pytest.raises(UserError, match=rf"hf:{tmp_path} row 1: the dialogue ends with a user turn"):
        list(corpus.read_corpus(f"hf:{tmp_path}"))
    reading = Reading(on_error="skip")
    assert len(list(corpus.read_corpus(f"hf:{tmp_path}", reading))) == 2
    assert reading.skipped == 1


JUNK = [
    None,
    True,
    0,
    -1.5,
    "",
    " ",
    "\ud83d",
    [],
    {},
    [[]],
    [{}],
    ["a"],
    {"a": 1},
    {"type": "text"},
    {"role": ["x"]},
    Q,
]
KEYS = [*("messages", "conversation", "text", "prompt", "completion", "system", "tools", "id", "weight", "\ud800"),
        *("tool_calls", "function_call", "refusal", "role", "content", "from", "value", "history", "type")]  # fmt: skip


def mutated(value, rng):
    if rng.random() < 0.05:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        more = {rng.choice(KEYS): rng.choice(JUNK)} if rng.random() < 0.1 else {}
        return {key: mutated(inner, rng) for key, inner in value.items() if rng.random() > 0.05} | more
    if isinstance(value, list):
        return [mutated(inner, rng) for inner in value]
    return value


def test_whatever_a_row_is_it_is_read_or_refused_in_one_line(tmp_path):
    rng = random.Random(0)
    rows = [row for row, _ in [*ROWS.values(), *REFUSED.values()] if not isinstance(row, str)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(mutated(rng.choice(rows), rng)) for _ in range(3000)))
    reading = Reading(on_error="skip")
    for dialogue in corpus.read_corpus(str(path), reading):
        roles = [turn.role for turn in dialogue.turns]
        if roles == ["text"]:
            continue
        assert roles[-1] == "assistant"
        assert all(one != other for one, other in itertools.pairwise(roles))
        assert all(turn.text == turn.text.strip() != "" for turn in dialogue.turns)
        "".join(turn.text for turn in dialogue.turns).encode()
    assert 500 < reading.skipped < 2500
    assert not any("\n" in error for error in reading.skipped_first)
