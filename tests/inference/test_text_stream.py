"""Tokens to text: characters of several tokens, stop strings across pieces, and any cut of them alike."""

import pytest
from fake_decoder import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import NIGHT, PROFILE

from gpt_jax.data.tokenizer import decode, encode, vocabulary_bytes
from gpt_jax.inference.text_stream import TextStream

TOKENIZER = make_tokenizer()
VOCABULARY = vocabulary_bytes(TOKENIZER, TOKENIZER.get_vocab_size() + 3)


EXAMPLES = 1000 if NIGHT else 100


def pieces(ids, stop=(), size=1) -> list[str]:
    stream = TextStream(VOCABULARY, stop)
    return [*(stream.feed(ids[i : i + size]) for i in range(0, len(ids), size)), stream.finish()]


def test_the_bytes_of_a_token_are_those_that_it_decodes_to():
    for text in ("naïve 真 \t\r\n a question", "".join(map(chr, range(1, 0x250)))):
        assert b"".join(VOCABULARY[i] for i in encode(TOKENIZER, text)).decode() == text
    assert VOCABULARY[:3] == [b"<|user|>", b"<|assistant|>", b"<|end_of_text|>"]
    assert VOCABULARY[-3:] == [b""] * 3


@settings(PROFILE, max_examples=EXAMPLES)
@given(st.lists(st.integers(0, 279), max_size=30), st.integers(1, 5))
def test_the_pieces_are_the_text_of_all_tokens_whatever_their_cut(ids, size):
    assert "".join(pieces(ids, size=size)) == decode(TOKENIZER, ids)


@settings(PROFILE, max_examples=EXAMPLES)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_the_stop_string_that_is_whole_first_ends_the_text(text, stop, size):
    found = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    end = min(found)[1] if found else len(text)
    assert "".join(pieces(encode(TOKENIZER, text), stop, size)) == text[:end]


def test_no_piece_has_half_a_character():
    given_pieces = pieces(encode(TOKENIZER, "真😀"))
    assert [piece for piece in given_pieces if piece] == ["真", "😀"]
    assert pieces(encode(TOKENIZER, "真")[:2])[-1] == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "held"),
    [("one tw", "two", "tw"), ("aab", "aabc", "aab"), ("abab", "ababc", "abab"), ("xy", "z", "")],
)
def test_what_may_be_a_stop_string_is_held_back_until_it_is_none(text, stop, held):
    *before, last = pieces(encode(TOKENIZER, text), (stop,))
    assert ("".join(before), last) == (text.removesuffix(held), held)


def test_nothing_comes_after_a_stop_string():
    stream = TextStream(VOCABULARY, ("b",))
    assert stream.feed(encode(TOKENIZER, "aba")) == "a"
    assert stream.stopped
    assert stream.feed(encode(TOKENIZER, "more")) == stream.finish() == ""
