"""Drawing tokens: each option beside a definition of it in NumPy, the draws' frequencies, and refused values."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from profiles import NIGHT, PROFILE

from configs import chat
from gpt_jax.errors import UserError
from gpt_jax.inference.sampling import (
    OPTION_FIELDS,
    SamplingOptions,
    choice_seed,
    draw_next,
    make_controls,
    seen_in_prompts,
)
from vk_kernels.ops import Texts
from vk_kernels.ops.draw_tokens import GENERATED, IN_PROMPT, LARGEST, gumbel

VOCAB = 12


def draw(logits, controls, seen, seeds, positions, alternatives=0):
    """Draws what stands at `positions` of texts that go on."""
    rows = np.zeros(len(logits), np.int32)
    texts = Texts(tokens=rows, positions=positions - 1, left=rows + 9, seen=seen)
    return draw_next(logits, texts, rows[:, None] - 1, seeds, controls, alternatives)[0]


draw_jit = jax.jit(draw, static_argnames="alternatives")


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def distribution(logits: np.ndarray, options: SamplingOptions, prompt: list[int], generated: list[int]) -> np.ndarray:
    """The probabilities, float64 (V,), that a token is drawn by: option by option, by sorting and loops."""
    scores = np.nan_to_num(logits.astype(np.float64), nan=-np.inf, posinf=LARGEST, neginf=-np.inf)
    for token in {*prompt, *generated}:
        r = options.repetition_penalty
        scores[token] = scores[token] / r if scores[token] > 0 else scores[token] * r
    for token in set(generated):
        scores[token] -= options.presence_penalty + options.frequency_penalty * generated.count(token)
    scores = np.minimum(scores, LARGEST)
    if options.temperature == 0 or not np.isfinite(scores.max()):
        return np.eye(len(scores))[scores.argmax()]
    scores = (scores - scores.max()) / options.temperature
    if options.top_k:
        smallest = np.sort(scores)[::-1][: options.top_k][-1]
        scores[scores < smallest] = -np.inf
    if options.top_p < 1:
        probabilities = softmax(scores)
        for token, score in enumerate(scores.copy()):
            likelier = probabilities[[other for other in range(len(scores)) if scores[other] > score]].sum()
            if likelier >= options.top_p:
                probabilities[token] = 0
        scores[probabilities == 0] = -np.inf
    probabilities = softmax(scores)
    probabilities[probabilities < options.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def draws(logits, options, count, prompt=(), generated=()) -> np.ndarray:
    """Tokens drawn from the same logits at `count` positions of a text."""
    seen = np.zeros((1, len(logits)), np.int32)
    seen[0, list(prompt)] = IN_PROMPT
    for token in generated:
        seen[0, token] += GENERATED
    rows = np.broadcast_to(logits.astype(np.float32), (count, len(logits)))
    seen = np.broadcast_to(seen, rows.shape)
    positions = np.arange(count, dtype=np.int32)
    seeds = np.full(count, 7 if options.seed is None else options.seed, np.uint32)
    return np.asarray(draw_jit(rows, make_controls([options] * count), seen, seeds, positions).tokens)


OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=0.5),
    SamplingOptions(temperature=3.0, top_k=4),
    SamplingOptions(top_p=0.8),
    SamplingOptions(min_p=0.2),
    SamplingOptions(repetition_penalty=1.7),
    SamplingOptions(presence_penalty=0.9),
    SamplingOptions(frequency_penalty=0.6),
    SamplingOptions(temperature=1.3, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=1.2, presence_penalty=-0.5),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in changed(o).items()))
def test_tokens_are_drawn_as_often_as_their_probability_says(options):
    logits = np.random.default_rng(3).standard_normal(VOCAB) * 1.5
    prompt, generated, count = [1, 2, 2], [3, 3, 3, 4], 4096
    expected = distribution(logits, options, prompt, generated) * count
    drawn = np.bincount(draws(logits, options, count, prompt, generated), minlength=VOCAB)
    assert drawn[expected == 0].sum() == 0
    likely = expected > 5
    chi_square = ((drawn - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 4  # passed by all but one in some thousands


def noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """The Gumbel noise of `draw`, float64, in Python's integers."""

    def philox(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(7):
            a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [b >> 32 ^ counter[1] ^ key[0], b % 2**32, a >> 32 ^ counter[3] ^ key[1], a % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return counter

    key = [seed, int.from_bytes(b"DRAW")]

    def half(token: int, part: int) -> int:
        word = philox([token // 256 * 32 + token % 32, position, part, 0], key)[token // 64 % 4]
        return word >> 16 if token // 32 % 2 else word % 2**16

    bits = np.array([half(token, 0) * 2**16 + (half(token, 1) | 1) for token in range(vocab_size)])
    v = np.minimum((bits / 2**32).astype(np.float32), 1 - 2**-24).astype(np.float64)
    return -np.log(-np.log1p(-v))


def test_the_noise_is_that_of_the_definition_past_one_block_of_tokens():
    found = np.asarray(jax.jit(gumbel, static_argnums=2)(np.uint32([5, 2**32 - 1]), np.int32([0, 70_000]), 600))
    np.testing.assert_allclose(found, [noise(5, 0, 600), noise(2**32 - 1, 70_000, 600)], rtol=1e-6, atol=1e-6)


numbers = st.integers(-480, 480).map(lambda i: i / 16)  # so that f32 ties where the definition does
logits_of_any_kind = arrays(
    np.float32, VOCAB, elements=numbers | st.sampled_from([0.0, -0.0, 2.5, 3e38, -3e38, np.inf, -np.inf, np.nan])
)
options_of_any_kind = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1e3]),
    top_k=st.integers(0, VOCAB + 1),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-30]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 3.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
tokens_of_any_kind = st.lists(st.integers(0, VOCAB - 1), max_size=5)


@settings(PROFILE, max_examples=1000 if NIGHT else 30)
@given(logits_of_any_kind, options_of_any_kind, tokens_of_any_kind, tokens_of_any_kind)
@example(np.full(VOCAB, -np.inf, np.float32), SamplingOptions(seed=1), [], [])
@example(np.full(VOCAB, np.inf, np.float32), SamplingOptions(seed=1, top_k=2), [], [])
@example(np.repeat(np.float32([1, 0, 2]), 4), SamplingOptions(seed=1, top_k=5), [], [])
@example(np.repeat(np.float32([1, 0, 2]), 4), SamplingOptions(seed=1, top_p=0.5), [], [])
def test_the_token_is_the_one_of_the_definition_and_the_noise(logits, options, prompt, generated):
    probabilities = distribution(logits, options, prompt, generated)
    for position, token in enumerate(draws(logits, options, 4, prompt, generated)):
        assert probabilities[token] > 0 or close_to_a_cut(logits, options, prompt, generated)
        with np.errstate(divide="ignore"):
            scores = np.log(probabilities) + noise(options.seed, position, VOCAB)
        assert scores[token] >= scores.max() - 1e-4 or close_to_a_cut(logits, options, prompt, generated)


def close_to_a_cut(logits, options, prompt, generated) -> bool:
    """Whether another rounding of f32 leaves more or fewer tokens to draw from."""
    slightly = [1 - 1e-5, 1 + 1e-5]
    changed = [replace(options, top_p=min(1, options.top_p * f), min_p=min(1, options.min_p * f)) for f in slightly]
    shifted = [logits * np.float32(f) for f in slightly]
    near = [distribution(x, o, prompt, generated) > 0 for x in shifted for o in changed]
    return any((kept != near[0]).any() for kept in near)


def test_log_probabilities_are_those_of_the_model_whatever_is_cut():
    logits = np.random.default_rng(5).standard_normal((3, VOCAB)).astype(np.float32) * 4
    options = [
        SamplingOptions(),
        SamplingOptions(temperature=0.1, top_k=1),
        SamplingOptions(presence_penalty=2.0, min_p=1.0),
    ]
    seen = seen_in_prompts([[1], [], [2, 3]], VOCAB)
    drawn = draw_jit(logits, make_controls(options), seen, np.arange(3, dtype=np.uint32), np.zeros(3, np.int32), 4)
    truth = np.log([softmax(row.astype(np.float64)) for row in logits])
    np.testing.assert_allclose(drawn.logprobs, truth[range(3), drawn.tokens], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(drawn.top_tokens, np.argsort(-truth, axis=-1)[:, :4])
    np.testing.assert_allclose(drawn.top_logprobs, -np.sort(-truth, axis=-1)[:, :4], rtol=0, atol=2e-6)


def test_alternatives_are_numbers_where_logits_are_none():
    logits = np.full((3, VOCAB), np.nan, np.float32)  # as many rows as above, whose program this is
    logits[0, :3], logits[1:, :3] = [1, np.inf, 2], [1, 3, 2]
    seen, controls = seen_in_prompts([[], [], []], VOCAB), make_controls([SamplingOptions(temperature=0)] * 3)
    drawn = draw_jit(logits, controls, seen, np.arange(3, dtype=np.uint32), np.zeros(3, np.int32), 4)
    assert drawn.tokens.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(drawn.top_tokens[:, 0], drawn.tokens)
    np.testing.assert_array_equal(drawn.top_logprobs[:, 0], drawn.logprobs)
    assert drawn.top_tokens[1:, 1:3].tolist() == [[2, 0]] * 2
    assert not np.isnan(drawn.top_logprobs).any()


def test_a_token_depends_on_its_text_alone_and_no_value_compiles_anew():
    logits = np.random.default_rng(6).standard_normal((4, VOCAB)).astype(np.float32)
    seeds, positions = np.uint32([9, 8, 7, 2**32 - 1]), np.int32([0, 5, 5, 1000])
    seen = seen_in_prompts([[0], [1, 1], [], [2]], VOCAB)

    def drawn(rows: list[int], options: list[SamplingOptions]) -> list[int]:
        arguments = logits[rows], make_controls([options[row] for row in rows]), seen[rows]
        return draw_jit(*arguments, seeds[rows], positions[rows]).tokens.tolist()

    once = drawn([0, 1, 2, 3], OPTIONS[:4])
    compiled = draw_jit._cache_size()
    assert drawn([3, 1, 0, 2], OPTIONS[:4]) == [once[3], once[1], once[0], once[2]]
    drawn([3, 1, 0, 2], OPTIONS[4:8])
    assert draw_jit._cache_size() == compiled


def test_tokens_are_counted_as_they_come():
    texts = Texts(*(np.int32([9, 9]) for _ in range(3)), seen=seen_in_prompts([[1, 1, 2], []], 4))
    controls, seeds = make_controls([SamplingOptions(temperature=0)] * 2), np.zeros(2, np.uint32)
    step = jax.jit(draw_next)
    for tokens in ([1, 3], [1, 3], [0, 2]):
        logits = np.eye(4, dtype=np.float32)[tokens]
        drawn, texts = step(logits, texts, np.zeros((2, 0), np.int32), seeds, controls)
        assert drawn.tokens.tolist() == texts.tokens.tolist() == tokens
    counted = [[GENERATED, IN_PROMPT + 2 * GENERATED, IN_PROMPT, 0], [0, 0, GENERATED, 2 * GENERATED]]
    assert texts.seen.tolist() == counted
    assert (texts.positions.tolist(), texts.left.tolist()) == ([12, 12], [6, 6])


def test_texts_for_one_prompt_have_seeds_of_their_own():
    assert choice_seed(5, 0) == 5
    assert len({choice_seed(2**32 - 1, choice) for choice in range(1000)}) == 1000


REFUSED = [
    ({"temperature": float("nan")}, "temperature must be a number in [0, inf), found nan"),
    ({"temperature": -0.1}, "temperature must be a number in [0, inf), found -0.1"),
    ({"temperature": float("inf")}, "temperature must be a number in [0, inf), found inf"),
    ({"temperature": "hot"}, "temperature must be a number in [0, inf), found 'hot'"),
    ({"top_k": -1}, "top_k must be a whole number from 0 to 2147483647, found -1"),
    ({"top_k": 1.5}, "top_k must be a whole number from 0 to 2147483647, found 1.5"),
    ({"top_p": 0.0}, "top_p must be a number in (0, 1], found 0.0"),
    ({"top_p": 1.1}, "top_p must be a number in (0, 1], found 1.1"),
    ({"min_p": -0.1}, "min_p must be a number in [0, 1], found -0.1"),
    ({"min_p": float("nan")}, "min_p must be a number in [0, 1], found nan"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a number in (0, inf), found 0.0"),
    ({"presence_penalty": 2.1}, "presence_penalty must be a number in [-2, 2], found 2.1"),
    ({"frequency_penalty": -3}, "frequency_penalty must be a number in [-2, 2], found -3"),
    ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, found -1"),
    ({"seed": True}, "seed must be a whole number from 0 to 4294967295, found True"),
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 2147483647, found 0"),
    ({"stop": "end"}, "stop must be a list of texts, found 'end'"),
    ({"stop": ("a", "")}, "stop[1] must be text of 1 or more characters, found ''"),
    ({"stop": (None,)}, "stop[0] must be text, found None"),
    ({"stop": ("x",) * 65}, "stop must be 64 texts at most, found 65"),
    ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, found 21"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_nonsense_is_refused_in_one_line_by_the_options_name(change, message):
    with pytest.raises(UserError) as caught:
        SamplingOptions(**change).check("--{}")
    assert str(caught.value) == f"--{message}"


def test_every_option_has_one_field_and_defaults_that_pass_it():
    SamplingOptions().check()
    assert OPTION_FIELDS.keys() == vars(SamplingOptions()).keys()


def test_a_config_gives_its_options_and_one_of_an_older_run_their_defaults():
    config = chat.get_config().to_dict()
    assert SamplingOptions.from_config(config) == SamplingOptions(temperature=0.8, top_k=40, max_tokens=80)
    config["sample"] = {"temperature": 0.5, "top_k": 3, "max_tokens": 9, "every": 1, "prompts": ()}
    assert SamplingOptions.from_config(config) == SamplingOptions(temperature=0.5, top_k=3, max_tokens=9)


def changed(options: SamplingOptions) -> dict:
    return {k: v for k, v in vars(options).items() if v != vars(SamplingOptions())[k]}
