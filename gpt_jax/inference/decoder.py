"""A slot engine: texts side by side, each in a slot of a cache, that grow by a chunk of tokens in one submission.

Batch generation fills the slots once; continuous batching fills each as it becomes free. Two functions run on the
device, over a state that is donated and stays there: `fill_slot` puts a prompt into a slot, `decode_chunk` draws the
next tokens of all texts. A prompt's last token is not part of its prefill: the first step of the next chunk reads it,
and draws the first new token as it draws all others.

The device is kept one chunk ahead: `decode` starts the next chunk before it reads the one that it returns. Where a text
ends is decided on the device, so that one which has ended there is drawn no further; at most one chunk of it is idle.
"""

import dataclasses
import functools
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.backend import Backend
from gpt_jax.inference.sampling import (
    MOST_ALTERNATIVES,
    Draw,
    SamplingOptions,
    draw_next,
    make_controls,
    seen_in_prompts,
)
from gpt_jax.model.gpt import GPT, ModelConfig
from gpt_jax.model.kv_cache import Cache, Weights, decode_step, decoding_weights, empty_cache, prefill
from vk_kernels.ops import Controls, Texts
from vk_kernels.ops.extend_texts import UNDRAWN

SHORTEST_PREFILL = 16  # tokens; longer ones are powers of two, so that few programs serve every prompt
MOST_ENDS = 8  # tokens that may end a text


class State(NamedTuple):
    """All that the device keeps of the texts; a row for each slot.

    texts: the last token of each is not in the cache yet. ends: int32 (slots, MOST_ENDS), tokens that end a text;
    UNDRAWN where there are fewer. seeds, controls: see `sampling.draw_next`.
    """

    texts: Texts
    ends: jax.Array
    seeds: jax.Array
    controls: Controls
    cache: Cache


class Piece(NamedTuple):
    """The part of a text that a chunk added.

    logprobs: of the tokens, under the model's own distribution. alternatives: at each place the likeliest tokens with
    theirs, as many as the text's options ask for. reason: None while the text goes on; 'stop': the last token is one
    of its ends; 'length': it has max_tokens, or fills the block.
    """

    tokens: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    reason: str | None


def empty_state(config: ModelConfig, slots: int) -> State:
    """No slot in use."""
    controls = Controls(*map(jnp.asarray, make_controls([SamplingOptions()] * slots)))
    tokens, positions, left = (jnp.zeros((slots,), jnp.int32) for _ in range(3))
    return State(
        texts=Texts(tokens, positions, left, seen=jnp.zeros((slots, config.vocab_size), jnp.int32)),
        ends=jnp.full((slots, MOST_ENDS), UNDRAWN, jnp.int32),
        seeds=jnp.zeros((slots,), jnp.uint32),
        controls=controls,
        cache=empty_cache(config, slots),
    )


def fill_slot(
    weights: Weights, state: State, tokens: jax.Array, row: State, slot: jax.Array, config: ModelConfig
) -> State:
    """The state with another text in a slot.

    Args:
      tokens: int32 (T,): the prompt without its last token, and anything after that.
      row: the slot's rows of the state, without a cache.
      slot: int32.
    """
    cache = prefill(weights, tokens, state.cache, slot, config)
    *rows, _ = jax.tree.map(
        lambda all_rows, x: jax.lax.dynamic_update_slice(all_rows, x[None], (slot,) + (0,) * x.ndim),
        state._replace(cache=()),
        row,
    )
    return State(*rows, cache)


def decode_chunk(
    weights: Weights, state: State, config: ModelConfig, rows: int, chunk: int, alternatives: int
) -> tuple[State, Draw, jax.Array]:
    """Draws up to `chunk` tokens of every text in the first `rows` slots that has not ended.

    Returns:
      The state; the draws, (chunk, rows) each: tokens are UNDRAWN where a text had ended; and the state's `left`.
    """

    def step(state: State, _: None) -> tuple[State, Draw]:
        texts = state.texts
        logits, cache = decode_step(weights, texts.tokens, texts.positions, state.cache, config)
        drawn, texts = draw_next(logits, texts, state.ends, state.seeds, state.controls, alternatives)
        return state._replace(texts=texts, cache=cache), drawn

    first, draws = jax.lax.scan(step, _first_rows(state, rows), None, length=chunk)
    texts = Texts(*map(_with_first_rows, state.texts, first.texts))
    return state._replace(texts=texts, cache=first.cache), draws, first.texts.left


def _first_rows(state: State, rows: int) -> State:
    """The state of the first slots, but for what is large, which is written where it lies."""
    texts, cache = state.texts, state.cache
    small = jax.tree.map(lambda x: x[:rows], state._replace(texts=texts._replace(seen=()), cache=()))
    return small._replace(texts=small.texts._replace(seen=texts.seen), cache=cache)


def _with_first_rows(whole: jax.Array, first: jax.Array) -> jax.Array:
    return first if whole.shape == first.shape else whole.at[: len(first)].set(first)


@dataclasses.dataclass(eq=False)
class _Text:
    """A text in a slot, as it is known here.

    ends: tokens that end it. alternatives: how many are told. left: tokens that it may still get from chunks that have
    not begun. has_ended: whether its last piece was read.
    """

    ends: frozenset[int]
    alternatives: int
    left: int
    has_ended: bool = False


class _Chunk(NamedTuple):
    """A chunk that has begun: the texts that it draws for, by slot, and its results, see `decode_chunk`."""

    texts: dict[int, _Text]
    draws: Draw
    left: jax.Array


class Decoder:
    """Decodes up to `slots` texts side by side on a backend.

    `insert` puts a prompt into a free slot; each `decode` adds up to `chunk` tokens to every text; `release` frees a
    slot, whether its text has ended or not. A text's tokens follow from its prompt, its options and its seed alone,
    whatever the chunk, the slot and the texts beside it.
    """

    def __init__(self, model: GPT, params: Any, backend: Backend, *, slots: int, chunk: int = 8):
        """params: as the model has them; None: `load` brings them."""
        self.config: ModelConfig = model.config
        self.slots, self.chunk = slots, chunk
        self._backend = backend
        config = self.config
        # New weights come into the memory of the old: recordings are bound to it.
        prepare = functools.partial(_reload, config=config)
        self._prepare = backend.jit(prepare, donate_argnums=0, keep_unused=True)
        self._fill = backend.jit(_on_leaves(functools.partial(fill_slot, config=config), config), donate_argnums=1)
        # By rows, so that few texts do not pay for empty slots, and by alternatives, so that none pays for what another
        # one asks. Each is compiled when it is first needed.
        self.batches = batch_sizes(slots)
        self._decode = {
            (rows, count): backend.jit(
                _on_leaves(
                    functools.partial(decode_chunk, config=config, rows=rows, chunk=chunk, alternatives=count), config
                ),
                donate_argnums=1,
            )
            for rows in self.batches
            for count in (0, min(MOST_ALTERNATIVES, config.vocab_size))
        }
        self._texts: dict[int, _Text] = {}
        self._begun: deque[_Chunk] = deque()
        self._weights: Any = None
        self._state: Any = None
        # The last state that each program gave: what it recorded for that memory stays as long as this is held.
        self._held: dict[Any, Any] = {}
        if params is not None:
            self.load(params)

    def load(self, params: Any) -> None:
        """Takes other parameters; no text is in any slot from then on."""
        self._texts.clear()
        self._begun.clear()
        if self._state is None:
            shapes = jax.eval_shape(functools.partial(decoding_weights, config=self.config), params)
            self._weights, state = self._backend.jit(functools.partial(_empty, shapes, self.config, self.slots))()
            self._state = tuple(jax.tree.leaves(state))
        self._weights = self._prepare(self._weights, params)

    @property
    def free_slots(self) -> list[int]:
        return [slot for slot in range(self.slots) if slot not in self._texts]

    def insert(
        self,
        slot: int,
        tokens: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None = None,
        end_tokens: Sequence[int] = (),
        width: int = 0,
    ) -> None:
        """Puts a prompt into a free slot.

        Args:
          tokens: 1 to block_size of them.
          options: how to draw; without a seed another text each time. Stop strings are the caller's business.
          max_tokens: how many tokens to draw at most, 1 or more, instead of the options'; the text also ends where the
            block is full: the last token that is drawn comes behind it.
          end_tokens: tokens any of which ends the text, which then has it as its last; MOST_ENDS at most.
          width: of the prefill, if the prompt is shorter: prompts that are filled alike share one program.

        Raises:
          ValueError: an argument that is not as said, or a slot in use.
        """
        block, count = self.config.block_size, len(tokens)
        max_tokens = options.max_tokens if max_tokens is None else max_tokens
        if slot in self._texts or not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} is not one of the free slots, {self.free_slots}")
        if not 1 <= count <= block:
            raise ValueError(f"a prompt has 1 to {block} tokens, found {count}")
        if max_tokens < 1 or len(end_tokens) > MOST_ENDS:
            raise ValueError(
                f"max_tokens={max_tokens} must be 1 or more, and {len(end_tokens)} ends {MOST_ENDS} at most"
            )
        padded = np.zeros(max(self.prefill_width(count), min(width, block)), np.int32)
        padded[: count - 1] = tokens[:-1]
        ends = [*end_tokens, *[UNDRAWN] * (MOST_ENDS - len(end_tokens))]
        left = min(max_tokens, block - count + 1)
        row = State(
            texts=Texts(
                tokens=np.int32(tokens[-1]),
                positions=np.int32(count - 1),
                left=np.int32(left),
                seen=seen_in_prompts([tokens], self.config.vocab_size)[0],
            ),
            ends=np.array(ends, np.int32),
            seeds=np.uint32((secrets.randbits(32) if options.seed is None else options.seed) % 2**32),
            controls=Controls(*(x[0] for x in make_controls([options]))),
            cache=(),
        )
        self._state = self._held[self._fill] = self._fill(self._weights, self._state, padded, row, np.int32(slot))[0]
        self._texts[slot] = _Text(frozenset(end_tokens), options.logprobs, left)

    def prefill_width(self, count: int) -> int:
        """The tokens that a prefill of a prompt of `count` tokens takes."""
        width = SHORTEST_PREFILL
        while width < count - 1:
            width *= 2
        return min(width, self.config.block_size)

    def decode(self, *, ahead: bool = True) -> dict[int, Piece]:
        """Draws up to `chunk` tokens of texts that have not ended; of each, what it has gained.

        A text that was put into its slot after the chunk began, which this returns, gains nothing yet.

        ahead: whether the next chunk may begin before this one is read; a slot that is freed after this call has no
          part in it.
        """
        while self._begun and not self._open_texts(self._begun[0]):
            self._begun.popleft()  # idle: nobody reads it
        if not self._begun:
            self._begin()
        if ahead and len(self._begun) == 1:
            self._begin()
        return self._read(self._begun.popleft()) if self._begun else {}

    def _open_texts(self, chunk: _Chunk) -> dict[int, _Text]:
        """The texts of a chunk that are still in their slots, and whose end was not read."""
        return {
            slot: text for slot, text in chunk.texts.items() if self._texts.get(slot) is text and not text.has_ended
        }

    def _begin(self) -> None:
        """Starts a chunk of the texts that may get more tokens, if there are any."""
        texts = {slot: text for slot, text in self._texts.items() if text.left and not text.has_ended}
        if not texts:
            return
        rows = next(rows for rows in self.batches if rows > max(texts))
        asks = any(text.alternatives for text in texts.values())
        program = self._decode[rows, min(MOST_ALTERNATIVES, self.config.vocab_size) if asks else 0]
        self._state, draws, left = program(self._weights, self._state)
        self._held[program] = self._state
        for x in (*draws, left):
            x.copy_to_host_async()
        for text in texts.values():
            text.left = max(text.left - self.chunk, 0)
        self._begun.append(_Chunk(texts, draws, left))

    def _read(self, chunk: _Chunk) -> dict[int, Piece]:
        """The pieces of a chunk, once it is done."""
        draws, left = Draw(*map(np.asarray, chunk.draws)), np.asarray(chunk.left)
        pieces = {}
        for slot, text in self._open_texts(chunk).items():
            count = int((draws.tokens[:, slot] != UNDRAWN).sum())
            tokens, logprobs = (x[:count, slot].tolist() for x in draws[:2])
            likeliest = (x[:count, slot, : text.alternatives].tolist() for x in draws[2:])
            alternatives = [list(zip(*pair, strict=True)) for pair in zip(*likeliest, strict=True)]
            reason = None
            if left[slot] == 0:
                reason, text.has_ended = "stop" if tokens[-1] in text.ends else "length", True
            pieces[slot] = Piece(tokens, logprobs, alternatives, reason)
        return pieces

    def release(self, slot: int) -> None:
        """Frees a slot."""
        del self._texts[slot]


def batch_sizes(slots: int) -> list[int]:
    """The numbers of first slots that a program decodes: all, and as few as are in use, by factors of four.

    Two at least where there are more: a row has the same bits in each of these on Vulkan, where one alone has others.
    """
    sizes = [min(2, slots)]
    while sizes[-1] < slots:
        sizes.append(min(4 * sizes[-1], slots))
    return sizes


def _empty(shapes: Weights, config: ModelConfig, slots: int) -> tuple[Weights, State]:
    """Weights of these shapes, all 0, and a state without a text."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), empty_state(config, slots)


def _reload(old: Weights, params: Any, config: ModelConfig) -> Weights:
    """The weights of other parameters; `old` is donated, and nothing else of it matters."""
    return decoding_weights(params, config)


def _on_leaves(fn: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """The function with a state's leaves as one tuple: passed whole, they are known by that tuple (see `donation`)."""
    structure = jax.tree.structure(jax.eval_shape(lambda: empty_state(config, 1)))

    def wrapped(weights: Weights, leaves: tuple, *rest: Any) -> Any:
        found = fn(weights, jax.tree.unflatten(structure, leaves), *rest)
        state, *results = (found,) if isinstance(found, State) else found
        return tuple(jax.tree.leaves(state)), *results

    return wrapped
