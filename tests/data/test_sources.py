"""Files and folders of every kind: told by their content, read as what they are, or refused by one line."""

import bz2
import gzip
import itertools
import json
import lzma
import tracemalloc

import numpy as np
import pytest
from small_cache import prepare

from gpt_jax.data import corpus, files, plain_text
from gpt_jax.data import tokenizer as tk
from gpt_jax.data.dialogue import Part, Turn
from gpt_jax.data.reading import Reading
from gpt_jax.errors import UserError

GOOD = "<|user|>q<|assistant|>a<|end_of_text|>\n"
ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
CHAT = (Turn("user", "q"), Turn("assistant", "a"))


def documents(*texts):
    return [(Turn("text", text),) for text in texts]


def put(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, **choices):
    reading = Reading(**choices)
    return [dialogue.turns for dialogue in corpus.read_corpus(str(path), reading)], reading


CONTENTS = {
    "plain text": ("\ufeff One,\r\ntwo.\n\nThree. \n", documents("One,\ntwo.\n\nThree."), "plain text"),
    "letters like those of bzip2": ("BZhang said:", documents("BZhang said:"), "plain text"),
    "a list in it": ("[1] A footnote.\n{an aside}", documents("[1] A footnote.\n{an aside}"), "plain text"),
    "with our ends": ("a\n<|end_of_text|>\n\nb <|end_of_text|>", documents("a", "b"), "plain text"),
    "with GPT-2's ends": ("a<|endoftext|><|endoftext|>b", documents("a", "b"), "plain text"),
    "markers": (f"\n{GOOD}", [CHAT], "text with markers"),
    "lines of JSON": (f"\n{json.dumps(ROW)}\n\n{json.dumps(ROW)}", [CHAT] * 2, "row of 'messages' in JSON lines"),
    "a list": (json.dumps([ROW, ROW]), [CHAT] * 2, "row of 'messages' in JSON"),
    "lists of messages": (json.dumps([ROW["messages"]]), [CHAT], "row of 'messages' in JSON"),
    "a pretty object": (json.dumps(ROW, indent=1), [CHAT], "row of 'messages' in JSON"),
    "pretty objects": (json.dumps(ROW, indent=1) + "\n" + json.dumps(ROW, indent=1), [CHAT] * 2, "row of 'messages'"),
    "half pretty objects": ('{ "text":\n"a"}\n{ "text":\n"b"}\n', documents("a", "b"), "row of 'text', plain in JSON"),
    "line ends of old": (f"{json.dumps(ROW)}\r{json.dumps(ROW)}\r", [CHAT] * 2, "row of 'messages' in JSON"),
}  # fmt: skip
PACKINGS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_file_is_what_its_content_says_whatever_its_name(tmp_path, content, packing):
    text, expected, format_ = CONTENTS[content]
    path = put(tmp_path / f"corpus.txt{packing}", PACKINGS[packing](text.encode()))
    turns, reading = read(path)
    assert turns == expected
    [line] = reading.taken()
    assert format_ in line
    assert line.startswith(f"read {len(expected)} x ")
    assert f"; the first, {path}" in line
    if not packing and "document" not in line and content != "markers":
        assert read(put(tmp_path / "corpus.jsonl", text))[0] == expected


def test_an_example_is_cut_and_does_nothing_to_a_terminal(tmp_path):
    _, reading = read(put(tmp_path / "corpus.txt", f"\x1b[2Jred\n{'long ' * 50}"))
    [line] = reading.taken()
    assert line.endswith("text: \\x1b[2Jred long long long long long long long long long l...")
    assert line.isprintable()


def test_zstd_is_read_where_python_or_the_extra_can(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra hf is not installed")
    with pyarrow.output_stream(str(tmp_path / "corpus.txt.zst"), compression="zstd") as file:
        file.write(b"One.\nTwo.")
    assert read(tmp_path / "corpus.txt.zst")[0] == documents("One.\nTwo.")


REFUSED = {
    "twice packed": (gzip.compress(bz2.compress(b"a")), "is gzip in which there is bzip2: unpack it once"),
    "cut": (gzip.compress(b"text " * 99)[:-9], "its gzip is cut or damaged: Compressed file ended"),
    "a flipped bit": (bytes([*bz2.compress(b"text " * 99)[:-4], 0, 0, 0, 0]), "its bzip2 is cut or damaged"),
    "Parquet": (b"PAR1\0\0", "is Parquet: give its folder as hf:FOLDER"),
    "zip": (b"PK\x03\x04\0", "is a zip archive: unpack it"),
    "no text": (b"one\ntwo\0", ":2: found byte 0x00, which no text has"),
    "UTF-16": ("text".encode("utf-16"), ":1: found byte 0xff: save it as UTF-8"),
    "Latin-1": ("text\n\xe9t\xe9".encode("latin-1"), ":2: found byte 0xe9: save it as UTF-8"),
    "ChatML": (b"<|im_start|>user\nq<|im_end|>", "is ChatML, in which no dialogue has an end"),
    "a late marker": (b"word " * 300_000 + b"\n<|user|>q", r":2: found <\|user\|> in plain text"),
}


@pytest.mark.parametrize("content", REFUSED)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, content):
    data, message = REFUSED[content]
    path = put(tmp_path / "corpus.txt", data)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is a table: give its folder as hf:FOLDER"):
        read(put(tmp_path / "corpus.csv", "a,b\n1,2\n"))


def test_a_folder_is_all_of_its_files_in_the_order_of_their_paths(tmp_path):
    folder = tmp_path / "folder"
    put(folder / "b.txt", "plain")
    put(folder / "a.jsonl", json.dumps(ROW))
    put(folder / "c" / "d.txt.gz", gzip.compress(b"packed"))
    put(folder / "c" / "empty.md", " \n")
    put(folder / ".hidden", "\xff")
    put(folder / ".git" / "object", b"\0")
    turns, reading = read(folder)
    assert turns == [CHAT, *documents("plain", "packed")]
    assert [line.partition(";")[0] for line in reading.taken()] == [
        "read 1 x row of 'messages' in JSON lines",
        "read 1 x document (or part of a long one) in plain text",
        "read 1 x document (or part of a long one) in plain text in gzip",
    ]
    assert reading.notes() == ["1 empty files"]
    before = corpus.source_fingerprint(str(folder))
    put(folder / "c" / "empty.md", "not empty")
    assert corpus.source_fingerprint(str(folder)) != before

    bad = put(folder / "b.bin", b"\0")
    with pytest.raises(UserError, match=r"b.bin:1: found byte 0x00"):
        read(folder)
    turns, reading = read(folder, on_error="skip")
    assert turns == [CHAT, *documents("plain", "packed", "not empty")]
    assert reading.skipped_first[0].startswith(f"{bad}:1: found byte 0x00")


# ---- long documents


@pytest.mark.parametrize("chunk", [101, 1000, 2**20])
def test_a_long_document_is_cut_where_a_paragraph_or_a_word_ends_and_nothing_is_lost(chunk):
    rng = np.random.default_rng(0)
    words = rng.choice(["alpha", "be", "c" * 50, "日本", "\n", "\n\n"], 40_000)
    long = " ".join(words).strip()
    text = f"first<|endoftext|> {long}\n<|end_of_text|>{'x' * 70_000}<|end_of_text|>last"
    chunks = [text[at : at + chunk] for at in range(0, len(text), chunk)]
    reading = Reading()
    found = list(plain_text.read_documents(chunks, str, reading))
    ends = [number for number, one in enumerate(found) if not isinstance(one, Part)]
    whole = [
        "".join(one.turns[0].text for one in found[first:last])
        for first, last in itertools.pairwise([0, *(end + 1 for end in ends)])
    ]
    assert whole == ["first", long, "x" * 70_000, "last"]
    parts = [one.turns[0].text for one in found[1 : ends[1]]]
    assert all(plain_text.PART / 2 <= len(part) <= 2 * plain_text.PART for part in parts)
    assert all(part.endswith(("\n", " ")) or part[-1] in "aec本" for part in parts)
    assert len({one.source for one in found[: ends[1] + 1]}) == ends[1] + 1  # each is a unit of the split
    assert reading.parts == len(found) - 2


def test_an_endless_document_takes_little_memory():
    chunk = "A sentence of a book. " * 40_000
    tracemalloc.start()
    try:
        count = sum(1 for _ in plain_text.read_documents(itertools.repeat(chunk, 16), str, Reading()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count > 16 * len(chunk) / plain_text.PART
    assert peak < 8 * len(chunk)


def test_parts_side_by_side_are_joined_and_others_are_parted_by_the_marker(tmp_path):
    text = "".join(f"Line {n} of the book.\n" for n in range(9000))
    prepared = prepare(put(tmp_path / "book.txt", text), vocab_size=400)
    assert min(prepared.stats[split]["dialogues"] for split in ("train", "validation")) > 1
    said = {}
    for split, [tokens] in (("train", prepared.train), ("validation", prepared.validation)):
        said[split] = tk.decode(prepared.tokenizer, tokens.ids)
        assert not tokens.assistant.any()
    assert set("\n".join(said.values()).replace("<|end_of_text|>", "\n").splitlines()) - {""} == set(text.splitlines())
    for one, other in (("train", "validation"), ("validation", "train")):  # what goes on elsewhere is closed
        stretches = said[one].split("<|end_of_text|>")
        assert stretches.pop() == ""
        assert all(stretch in text for stretch in stretches)
        for stretch in stretches:
            following = text[text.index(stretch) + len(stretch) :].lstrip().partition("\n")[0]
            assert not following or following in said[other]


# ---- the same in every format


def test_one_set_of_chats_gives_the_same_tokens_in_every_format(tmp_path):
    chats = [(f"What is {n} and\n\n{n}?", f"It is {n + n}. Ünïcode 日本 {n}") for n in range(40)]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    shared = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in chats]

    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    openai = [{"messages": turns} for turns in messages]
    formats = {
        "marked.txt": "".join(f"<|user|>{q}<|assistant|>{a}<|end_of_text|>\n" for q, a in chats),
        "openai.jsonl": lines(openai),
        "openai.json": json.dumps(openai, indent=2, ensure_ascii=False),
        "one after another.json": "\n".join(json.dumps(row, indent=2) for row in openai),
        "openai.jsonl.gz": gzip.compress(lines(openai).encode()),
        "nanochat.jsonl": lines(messages),
        "sharegpt.json": json.dumps([{"conversations": turns} for turns in shared]),
        "parts.jsonl": lines({"messages": [{"role": "user", "content": [{"type": "text", "text": q}]}, answer]}
                             for (q, _), [_, answer] in zip(chats, messages, strict=True)),
        "alpaca.json": json.dumps([{"instruction": f"What is {n} and", "input": f"{n}?", "output": a}
                                   for n, (_, a) in enumerate(chats)]),
        "prompts.jsonl": lines({"prompt": q, "completion": a} for q, a in chats),
        "system.jsonl": lines({"system": f"What is {n} and", "messages": [{"role": "user", "content": f"{n}?"}, answer]}
                              for n, [_, answer] in enumerate(messages)),
        "developer.jsonl": lines({"messages": [{"role": "developer", "content": f"What is {n} and"},
                                               {"role": "user", "content": f"{n}?"}, answer]}
                                 for n, [_, answer] in enumerate(messages)),
        "two turns.jsonl": lines({"messages": [{"role": "user", "content": f"What is {n} and"},
                                               {"role": "user", "content": f"{n}?"}, answer]}
                                 for n, [_, answer] in enumerate(messages)),
        "preferences.jsonl": lines({"prompt": q, "chosen": a, "rejected": "No."} for q, a in chats),
        "preferred.jsonl": lines({"input": {"messages": [question]}, "preferred_output": [answer],
                                  "non_preferred_output": [question | answer | {"content": "No."}]}
                                 for question, answer in messages),
        "text.jsonl": lines({"text": f"<|user|>{q}<|assistant|>{a}<|end_of_text|>"} for q, a in chats),
        "chatml.jsonl": lines({"text": f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"}
                              for q, a in chats),
    }  # fmt: skip
    put(tmp_path / "folder" / "1.txt", "".join(formats["marked.txt"].splitlines(keepends=True)[:60]))  # 3 lines each
    put(tmp_path / "folder" / "2.jsonl.gz", gzip.compress(lines(openai[20:]).encode()))
    tokenizer = tmp_path / "tokenizer.json"
    tk.save(tk.train_tokenizer([text for chat in chats for text in chat], 300), tokenizer)

    def streams(source):
        prepared = prepare(source, tokenizer=str(tokenizer))
        return [np.array(array) for split in (*prepared.train, *prepared.validation)
                for array in (split.ids, split.assistant)]  # fmt: skip

    expected = streams(put(tmp_path / "marked.txt", formats.pop("marked.txt")))
    assert len(expected[0]) > 500
    for name, content in formats.items():
        for one, other in zip(streams(put(tmp_path / name, content)), expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
    for one, other in zip(streams(tmp_path / "folder"), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("chunk", [1, 7])
def test_an_end_of_a_document_may_be_cut_by_a_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    assert read(put(tmp_path / "a.txt", "日\r\n<|end_of_text|>本<|endoftext|>"))[0] == documents("日", "本")


def test_a_document_whose_rest_cannot_be_read_ends_before_the_next_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 2**14)
    long = "\n\n".join(f"Paragraph {n} has some words." for n in range(6_000)).encode()
    (tmp_path / "1.txt").write_bytes(long + b"\xff")
    (tmp_path / "2.txt").write_text("another file")
    reading = Reading(on_error="skip")
    *parts, last = corpus.read_corpus(str(tmp_path), reading)
    assert reading.skipped == 1
    assert last.turns[0].text == "another file"
    assert [isinstance(part, Part) for part in parts] == [True] * (len(parts) - 1) + [False]
