"""The command around the chat: its flags."""

import pytest
from absl import flags

from gpt_jax import chat
from gpt_jax.cli import parse_flags
from gpt_jax.errors import UserError
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.inference.sampling_flags import options_of_flags


def options(*arguments: str) -> SamplingOptions:
    values = flags.FlagValues()
    chat.define_flags(values)
    parse_flags(["chat", *arguments], values)
    return options_of_flags(values, SamplingOptions(temperature=0.5, top_k=40))


def test_flags_take_the_place_of_the_runs_options():
    assert options() == SamplingOptions(temperature=0.5, top_k=40)
    assert options("--temperature=0", "--seed=3") == SamplingOptions(temperature=0.0, top_k=40, seed=3)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--temperature=hot", "must be a number"),
        ("--temperature=-1", r"--temperature must be a number in \[0, inf\), found -1.0"),
        ("--temperature=nan", "--temperature must be a number"),
        ("--top_p=0", r"--top_p must be a number in \(0, 1\]"),
        ("--top_k=-1", "--top_k must be a whole number from 0"),
        ("--min_p=2", "--min_p must be"),
        ("--repetition_penalty=0", "--repetition_penalty must be"),
        ("--presence_penalty=3", "--presence_penalty must be"),
        ("--max_tokens=0", "--max_tokens must be a whole number from 1"),
        ("--seed=4294967296", "--seed must be a whole number from 0 to 4294967295"),
        ("--backend=cuda", "backend"),
        ("--nonsense=1", "nonsense"),
    ],
)
def test_a_flag_that_means_nothing_is_a_line(flag, message):
    with pytest.raises(UserError, match=message) as raised:
        options(flag)
    assert "\n" not in str(raised.value)
