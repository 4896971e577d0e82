"""A conversation in the block: what stays, what goes, and that it is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import NIGHT, PROFILE

from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import encode_prompt, train_tokenizer
from gpt_jax.inference.conversation import TooLong, fit, fit_text, room_for_answer

TOKENIZER = train_tokenizer(["a question and an answer, a longer question and another answer"] * 3, 280)


def chat(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def test_what_fits_is_given_whole_and_nothing_is_told():
    turns = chat("a question", "an answer", "another question")
    fitted = fit(TOKENIZER, turns, block_size=200, room=20)
    assert fitted == (encode_prompt(TOKENIZER, turns), 0)
    assert fitted.told() == ""


def test_the_system_text_is_put_where_training_puts_it():
    fitted = fit(TOKENIZER, chat("hello", "good day", "who?"), " Be brief.\n", block_size=200, room=20)
    assert fitted.tokens == encode_prompt(TOKENIZER, chat("Be brief.\n\nhello", "good day", "who?"))


def test_the_oldest_pairs_go_and_the_system_text_stays():
    turns = chat("first " * 9, "one", "second " * 9, "two", "third")
    whole = len(encode_prompt(TOKENIZER, turns))
    fitted = fit(TOKENIZER, turns, "Be brief.", block_size=whole, room=10)
    assert fitted.tokens == encode_prompt(TOKENIZER, chat("Be brief.\n\n" + "second " * 9, "two", "third"))
    assert fitted.told() == "the conversation is longer than the model sees: the oldest 2 turns were left out"


@settings(PROFILE, max_examples=600 if NIGHT else 60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=9).filter(lambda sizes: len(sizes) % 2),
    st.integers(0, 20),
    st.integers(20, 120),
    st.integers(1, 40),
)
def test_as_much_as_fits_is_kept(sizes, system_size, block_size, max_tokens):
    turns, system = chat(*("ab " * size for size in sizes)), "s " * system_size
    room = room_for_answer(max_tokens, block_size)
    try:
        fitted = fit(TOKENIZER, turns, system, block_size=block_size, room=room)
    except TooLong:
        fitted = None
    whole = [
        fit(TOKENIZER, turns[first:], system, block_size=10**6, room=0).tokens for first in range(0, len(turns), 2)
    ]
    fitting = [tokens for tokens in whole if len(tokens) <= block_size - room]
    assert (fitted.tokens if fitted else None) == (fitting[0] if fitting else None)
    assert fitted is None or fitted.left_out == 2 * whole.index(fitted.tokens)


def test_a_turn_longer_than_the_block_is_a_clear_line():
    with pytest.raises(TooLong, match=r"the message has \d+ tokens .* the model sees 40, of which 10 are for the an"):
        fit(TOKENIZER, chat("x" * 60), block_size=40, room=10)
    with pytest.raises(TooLong, match="the message and the system prompt have"):
        fit(TOKENIZER, chat("x", "y", "z"), "s" * 60, block_size=40, room=10)


@pytest.mark.parametrize(("max_tokens", "block", "room"), [(80, 256, 64), (8, 256, 8), (80, 128, 32), (5, 2, 1)])
def test_an_answer_has_room(max_tokens, block, room):
    assert room_for_answer(max_tokens, block) == room


def test_text_to_continue():
    assert fit_text(TOKENIZER, "", block_size=8) == [2]
    with pytest.raises(TooLong, match="the prompt has 8 tokens, and the model sees 8"):
        fit_text(TOKENIZER, "z" * 8, block_size=8)
