"""Text from a trained model: the next token, continuations, and answers in a conversation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import decode, encode_prompt, marker_ids
from gpt_jax.model.gpt import GPT

COLDEST = 1e-6  # a softmax at lower temperatures is its argmax, and in f32 logits / temperature might overflow


class Sample(NamedTuple):
    """The model's answer to one prompt."""

    text: str
    tokens: int  # generated, the end marker included
    ended: bool  # by the model itself, not by the limit


def next_token(
    params: Any,
    tokens: jax.Array,
    last: jax.Array,
    key: jax.Array,
    *,
    model: GPT,
    temperature: float,
    top_k: int,
) -> jax.Array:
    """One token, int32 (B,), after position `last` (B,) of `tokens` (B, T).

    Drawn from the softmax of logits / temperature over the `top_k` largest (0: all); the largest if below COLDEST.
    """
    logits = model.apply({"params": params}, tokens, last, method="next_token_logits")  # (B, V)
    if temperature < COLDEST:
        return logits.argmax(axis=-1).astype(jnp.int32)
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


@functools.lru_cache(maxsize=8)
def make_sampler(
    model: GPT, temperature: float, top_k: int, jit: Callable[..., Any] = jax.jit
) -> Callable[..., jax.Array]:
    """`next_token` compiled by `jit`, for `generate`."""
    return jit(functools.partial(next_token, model=model, temperature=temperature, top_k=top_k))


def generate(
    sampler: Callable[..., jax.Array],
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    block_size: int,
    end_tokens: Sequence[int],
    max_tokens: int,
    key: jax.Array,
) -> list[list[int]]:
    """Continues each prompt (token ids) until one of `end_tokens` or `max_tokens`; the prompts run as one batch.

    A text longer than the block keeps its last `block_size` tokens in view.
    """
    texts = [list(prompt) for prompt in prompts]
    if not texts:
        return []
    starts = [len(text) for text in texts]
    width = min(block_size, max(starts) + max_tokens)
    open_rows = set(range(len(texts)))
    for i in range(max_tokens):
        views = [text[-width:] for text in texts]
        tokens = np.array([view + [0] * (width - len(view)) for view in views], np.int32)
        last = np.array([len(view) - 1 for view in views], np.int32)
        drawn = np.asarray(sampler(params, tokens, last, jax.random.fold_in(key, i)))
        for row in tuple(open_rows):
            texts[row].append(int(drawn[row]))
            if drawn[row] in end_tokens:
                open_rows.remove(row)
        if not open_rows:
            break
    return [text[start:] for text, start in zip(texts, starts, strict=True)]


def answer(
    sampler: Callable[..., jax.Array],
    params: Any,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Turn]],
    *,
    block_size: int,
    max_tokens: int,
    key: jax.Array,
) -> list[Sample]:
    """Generates the assistant's next turn in each conversation, whose last turn is the user's."""
    markers = marker_ids(tokenizer)
    generated = generate(
        sampler,
        params,
        [encode_prompt(tokenizer, turns) for turns in conversations],
        block_size=block_size,
        end_tokens=markers,  # any of them closes the assistant's turn
        max_tokens=max_tokens,
        key=key,
    )
    samples = []
    for ids in generated:
        ended = bool(ids) and ids[-1] in markers
        samples.append(Sample(decode(tokenizer, ids[:-1] if ended else ids), len(ids), ended))
    return samples
