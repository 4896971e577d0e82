"""Byte-level BPE: exact round trips, markers that text cannot forge, files that are checked when read."""

import threading

import hypothesis
import hypothesis.strategies as st
import pytest
from profiles import NIGHT, PROFILE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from waiting import PATIENCE

from gpt_jax.data import tokenizer as tk
from gpt_jax.data.corpus import render
from gpt_jax.data.dialogue import MARKERS, Dialogue, Turn
from gpt_jax.errors import UserError

TEXTS = ["the quality of mercy is not strained", "it droppeth as the gentle rain", "the rain, the mercy"] * 5


@pytest.fixture(scope="module")
def trained():
    return tk.train_tokenizer(TEXTS, 300)


def test_size_and_markers(trained):
    assert trained.get_vocab_size() == 300
    assert tk.marker_ids(trained) == (0, 1, 2)
    assert [trained.id_to_token(i) for i in range(3)] == list(MARKERS)


def test_merges_shorten_text(trained):
    assert len(tk.encode(trained, TEXTS[0])) < len(TEXTS[0]) / 2


def test_training_is_deterministic(trained):
    assert tk.train_tokenizer(iter(TEXTS), 300).to_str() == trained.to_str()


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.example("naïve 真 \t\r\n\x00 é e\u0301 🇫🇷 ﬁ \u200b\ufeff  ")
@hypothesis.example("".join(MARKERS) + " <|user|> x<|assistant|>")
@hypothesis.settings(PROFILE, max_examples=1000 if NIGHT else 100)
def test_any_text_round_trips_and_makes_no_marker(trained, text):
    ids = tk.encode(trained, text)
    assert tk.decode(trained, ids) == text
    assert min(ids, default=3) >= 3


def test_no_merge_spells_a_marker():
    """Even where the training text is full of markers."""
    trained = tk.train_tokenizer(["".join(MARKERS) + " <|user|>"] * 100, 400)
    assert min(tk.encode(trained, "x<|user|> <|assistant|><|end_of_text|>")) >= 3


def test_small_corpus_gives_a_smaller_vocabulary():
    assert tk.SMALLEST_VOCABULARY <= tk.train_tokenizer(["abc"], 4000).get_vocab_size() < 270


def test_vocabulary_too_small():
    with pytest.raises(UserError, match="vocab_size is 258: a byte-level tokenizer needs 259 or more"):
        tk.train_tokenizer(TEXTS, 258)
    assert tk.train_tokenizer(TEXTS, 259).get_vocab_size() == 259


TURNS = (
    Turn("user", "the rain"),
    Turn("assistant", "mercy"),
    Turn("user", "<|user|>"),
    Turn("assistant", "it"),
)


def test_dialogues_become_tokens_and_who_says_them(trained):
    question, answer, forged, last = (tk.encode(trained, turn.text) for turn in TURNS)
    (ids, said), (short, short_said) = tk.encode_dialogues(trained, [Dialogue("s", TURNS), Dialogue("s", TURNS[:2])])
    assert ids.tolist() == [0, *question, 1, *answer, 0, *forged, 1, *last, 2]
    # Said: the answers and the markers that close them, not the <|assistant|> that opens them.
    expected = [0, *[0] * len(question), 0, *[1] * len(answer), 1, *[0] * len(forged), 0, *[1] * len(last), 1]
    assert said.tolist() == [bool(flag) for flag in expected]
    assert short.tolist() == [0, *question, 1, *answer, 2]
    assert short_said.tolist() == [False] * (2 + len(question)) + [True] * (len(answer) + 1)
    assert tk.decode(trained, short) == render(Dialogue("s", TURNS[:2]))


def test_prompt_is_the_beginning_of_the_dialogue(trained):
    ((ids, _),) = tk.encode_dialogues(trained, [Dialogue("s", TURNS)])
    prompt = tk.encode_prompt(trained, TURNS[:3])
    assert prompt == ids.tolist()[: len(prompt)]
    assert prompt[-1] == 1


def test_save_and_load(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    tk.save(trained, path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = tk.load(path)
    assert loaded.to_str() == trained.to_str()
    text = "mercy <|user|> 真"
    assert tk.encode(loaded, text) == tk.encode(trained, text)


def test_load_mistakes(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"does not exist: give the path of a tokenizer.json"):
        tk.load(path)
    trained.save(str(path))
    path.write_text(path.read_text()[:-100])
    with pytest.raises(UserError, match="cannot be read, it is damaged") as error:
        tk.load(path)
    assert "\n" not in str(error.value)


def test_load_refuses_tokenizers_that_would_spoil_the_data(tmp_path):
    path = tmp_path / "tokenizer.json"
    bytes_only = Tokenizer(models.BPE())
    bytes_only.save(str(path))
    with pytest.raises(UserError, match=r"has no token <\|user\|>: add the three markers"):
        tk.load(path)

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(MARKERS))
    words.save(str(path))
    with pytest.raises(UserError, match=r"comes back as .* it must be byte-level"):
        tk.load(path)

    for change in ("normalizer", "add_prefix_space"):
        changed = tk.train_tokenizer(TEXTS, 259)
        if change == "normalizer":
            changed.normalizer = normalizers.Lowercase()
        else:
            changed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        changed.save(str(path))
        with pytest.raises(UserError, match=f"comes back as .*, without .*{change}"):
            tk.load(path)

    plain = tk.train_tokenizer(TEXTS, 259).to_str().replace('"special":true', '"special":false')
    path.write_text(plain)
    with pytest.raises(UserError, match="makes a marker out of text"):
        tk.load(path)


@pytest.mark.parametrize(
    "word",
    ["x" * 30_000, "ab1²" * 8_000, "真理" * 9_000, "=-_" * 9_000, " \t" * 9_000, "e\u0301" * 9_000, "\u0661x" * 9_000],
)
def test_a_very_long_word_is_trained_on_in_pieces_and_told_once(word):
    """The time to train grows with the square of a word's length: 47 minutes for 2 MB."""
    texts = ["a few words", f"before {word} between {word} after", word]
    said = []
    pieces = list(tk._in_pieces(texts, said.append))
    assert "".join(pieces) == "".join(texts)
    split = tk.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert max(end - start for piece in pieces for _, (start, end) in split(piece)) <= 1001
    assert len(said) <= 1
    if any(end - start > 1001 for text in texts for _, (start, end) in split(text)):
        assert "trained on pieces of words longer than 1,000" in said[0]


def test_ordinary_texts_are_trained_on_whole():
    texts = ["word " * 5_000, "a,b" * 2_000, "x" * 1000]
    assert list(tk._in_pieces(texts, pytest.fail)) == texts


def test_a_source_that_times_out_ends_the_training():
    def away() -> None:
        raise TimeoutError("the disk is away")

    with pytest.raises(TimeoutError, match="the disk is away"):
        tk._in_thread(away, pytest.fail)


def test_training_can_be_interrupted(monkeypatch):
    """While Rust merges, Python's main thread only waits, and says that it goes on."""
    monkeypatch.setattr(tk, "_SIGN_OF_LIFE", 0.02)
    go_on, trained = threading.Event(), []

    def train() -> None:
        go_on.wait(PATIENCE)
        trained.append(True)

    def stop(line: str) -> None:
        assert line.startswith("data: training the tokenizer for ")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tk._in_thread(train, stop)
    assert not trained
    go_on.set()
