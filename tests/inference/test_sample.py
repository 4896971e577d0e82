"""Sampling: greedy, top-k, long texts, and the chat around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import sample
from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import encode_prompt, marker_ids, train_tokenizer
from gpt_jax.inference.generate import answer, generate, make_sampler, next_token
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from vk_kernels.errors import DeviceLostError

MODEL = GPT(ModelConfig(vocab_size=270, block_size=10, num_layers=1, num_heads=2, embed_dim=16))
KEY = jax.random.key(0)


@functools.cache  # not when the file is imported, which every selection of tests does
def parameters():
    return jax.jit(init_params, static_argnums=(0, 1))(MODEL, 3)


@jax.jit
def next_token_logits(params, view, last):
    return MODEL.apply({"params": params}, view, last, method="next_token_logits")


BLOCK = 6  # tokens that are kept in view


def logits_after(ids: list[int]) -> np.ndarray:
    """Logits after a text without padding, a program for each length."""
    view = jnp.asarray([ids[-BLOCK:]])
    return np.asarray(next_token_logits(parameters(), view, jnp.array([view.shape[1] - 1])))[0]


def test_greedy_follows_the_argmax_of_the_last_block_of_tokens():
    prompts = [[5, 6, 7], [9] * 14]
    generated = generate(
        make_sampler(MODEL, 0.0, 0), parameters(), prompts, block_size=BLOCK, end_tokens=(), max_tokens=8, key=KEY
    )
    for prompt, new in zip(prompts, generated, strict=True):
        text = list(prompt)
        for token in new:
            logits = logits_after(text)
            assert logits[token] >= logits.max() - 1e-5
            text.append(token)
        assert len(new) == 8


def test_top_k_draws_only_from_the_largest_and_from_all_of_them():
    params = jax.tree.map(lambda leaf: leaf * 4, parameters())  # not all but uniform
    draw = jax.jit(functools.partial(next_token, model=MODEL, temperature=1.0, top_k=3))
    tokens, last = jnp.array([[4, 8]]), jnp.array([1])
    drawn = {int(draw(params, tokens, last, jax.random.key(i))[0]) for i in range(60)}
    logits = next_token_logits(params, tokens, last)[0]
    assert drawn <= set(np.argsort(logits)[-3:].tolist())
    assert len(drawn) > 1


def test_the_same_key_gives_the_same_text_and_another_key_another():
    sampler = make_sampler(MODEL, 1.0, 0)
    options = {"block_size": 10, "end_tokens": (), "max_tokens": 8}
    one, again = (generate(sampler, parameters(), [[1, 2]], key=KEY, **options) for _ in range(2))
    other = generate(sampler, parameters(), [[1, 2]], key=jax.random.key(9), **options)
    assert one == again != other


def test_a_row_ends_at_its_end_token_while_others_go_on():
    sampler = make_sampler(MODEL, 0.0, 0)
    [free] = generate(sampler, parameters(), [[1, 2]], block_size=10, end_tokens=(), max_tokens=6, key=KEY)
    prompts = [[1, 2], [1, 2, *free[:1]]]
    ended = generate(sampler, parameters(), prompts, block_size=10, end_tokens=(free[2],), max_tokens=6, key=KEY)
    stop = free.index(free[2])
    assert ended[0] == free[: stop + 1]
    assert ended[1][-1] == free[2] or len(ended[1]) == 6


def test_answers_are_decoded_without_the_marker_that_ends_them():
    tokenizer = train_tokenizer(["a question and an answer"], 262)
    _, _, end = marker_ids(tokenizer)
    reply = tokenizer.encode("an answer", add_special_tokens=False).ids

    def scripted(params, tokens, last, key):
        prompt = len(encode_prompt(tokenizer, [Turn("user", "a question")]))
        script = [*reply, end]
        return np.array([script[int(last[0]) + 1 - prompt]])

    [sample] = answer(scripted, None, tokenizer, [[Turn("user", "a question")]], block_size=64, max_tokens=50, key=KEY)
    assert sample == ("an answer", len(reply) + 1, True)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DeviceLostError("the device was lost"), "error: the device was lost; --backend=xla answers without Vulkan\n"),
        (MemoryError(), "error: out of memory\n"),
    ],
)
def test_a_device_that_fails_costs_one_line(error, line, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(sample, "answer_prompts", fail)
    assert sample.main(["sample"]) == 1
    assert capsys.readouterr().err == line
