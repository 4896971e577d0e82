"""A slot engine: texts side by side, each in a slot of a cache, that grow by a chunk of tokens in one submission.

Batch generation fills the slots once; continuous batching fills each as it becomes free. Two functions run on the
device, over a state that is donated and stays there: `fill_slot` puts a prompt into a slot, `decode_chunk` draws the
next tokens of all texts. A prompt's last token is not part of its prefill: the first step of the next chunk reads it,
and draws the first new token as it draws all others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.backend import Backend
from gpt_jax.model.cached import Cache, Weights, decode_step, decoding_weights, empty_cache, prefill
from gpt_jax.model.gpt import GPT, ModelConfig

SHORTEST_PREFILL = 16  # tokens; longer ones are powers of two, so that few programs serve every prompt
MOST_ENDS = 8  # tokens that may end a text
UNDRAWN = -1  # in the place of a token where a text had ended


class SamplingOptions(NamedTuple):
    """How a text's tokens are drawn. temperature: 0 takes the likeliest. top_k: of the likeliest; 0: of all."""

    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0


class State(NamedTuple):
    """All that the device keeps of the texts; a row for each slot.

    tokens, positions: each text's last token, which is not in the cache yet, and its place. left: tokens that are
    still to be drawn, 0 where a text has ended. ends: (slots, MOST_ENDS), tokens that end a text; UNDRAWN where there
    are fewer. seeds, temperatures, top_ks: see `SamplingOptions`.
    """

    tokens: jax.Array
    positions: jax.Array
    left: jax.Array
    ends: jax.Array
    seeds: jax.Array
    temperatures: jax.Array
    top_ks: jax.Array
    cache: Cache


class Draws(NamedTuple):
    """The draws of a chunk, (chunk, slots) each: tokens, UNDRAWN where a text had ended, and log-probabilities."""

    tokens: jax.Array
    logprobs: jax.Array


class Piece(NamedTuple):
    """The part of a text that a chunk added.

    logprobs: of the tokens, under the model's own distribution. reason: None while the text goes on; 'stop': the last
    token is one of its ends; 'length': it has max_tokens, or fills the block.
    """

    tokens: list[int]
    logprobs: list[float]
    reason: str | None


def empty_state(config: ModelConfig, slots: int) -> State:
    """No slot in use."""
    integers, floats = jnp.zeros((slots,), jnp.int32), jnp.ones((slots,), jnp.float32)
    ends = jnp.full((slots, MOST_ENDS), UNDRAWN, jnp.int32)
    seeds = jnp.zeros((slots,), jnp.uint32)
    return State(integers, integers, integers, ends, seeds, floats, integers, empty_cache(config, slots))


def fill_slot(
    weights: Weights, state: State, tokens: jax.Array, row: State, slot: jax.Array, config: ModelConfig
) -> State:
    """The state with another text in a slot.

    Args:
      tokens: int32 (T,): the prompt without its last token, and anything after that.
      row: the slot's rows of the state, without a cache.
      slot: int32.
    """
    new = prefill(weights, tokens[None], config)
    cache = tuple(
        jax.lax.dynamic_update_slice(kept, one, (slot, 0, 0, 0, 0)) for kept, one in zip(state.cache, new, strict=True)
    )
    rows = [
        jax.lax.dynamic_update_slice(all_rows, jnp.asarray(x, all_rows.dtype)[None], (slot,) + (0,) * x.ndim)
        for all_rows, x in zip(state[:-1], row[:-1], strict=True)
    ]
    return State(*rows, cache)


def decode_chunk(weights: Weights, state: State, config: ModelConfig, chunk: int) -> tuple[State, Draws]:
    """Draws up to `chunk` tokens of every text that has not ended."""

    def step(state: State, _: None) -> tuple[State, Draws]:
        logits, cache = decode_step(weights, state.tokens, state.positions, state.cache, config)
        tokens, logprobs = _draw(logits, state)
        going_on = state.left > 0
        is_end = (state.ends == tokens[:, None]).any(axis=1)
        left = jnp.where(going_on & ~is_end, state.left - 1, 0)
        moved = going_on & (left > 0)
        new = state._replace(
            tokens=jnp.where(moved, tokens, state.tokens),
            positions=jnp.where(moved, state.positions + 1, state.positions),
            left=left,
            cache=cache,
        )
        return new, Draws(jnp.where(going_on, tokens, UNDRAWN), logprobs)

    return jax.lax.scan(step, state, None, length=chunk)


def _draw(logits: jax.Array, state: State) -> tuple[jax.Array, jax.Array]:
    """Each text's next token, and its log-probability."""
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    k = jnp.clip(state.top_ks - 1, 0, logits.shape[-1] - 1)
    smallest = jnp.take_along_axis(jax.lax.top_k(logits, logits.shape[-1])[0], k[:, None], axis=-1)
    kept = (state.top_ks[:, None] == 0) | (logits >= smallest)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position + 1)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    is_greedy = state.temperatures[:, None] == 0
    scaled = logits / jnp.where(is_greedy, 1.0, state.temperatures[:, None])
    scores = scaled + jnp.where(is_greedy, 0.0, jax.vmap(noise)(state.seeds, state.positions))
    tokens = jnp.where(kept, scores, -jnp.inf).argmax(axis=-1).astype(jnp.int32)
    return tokens, jnp.take_along_axis(log_probabilities, tokens[:, None], axis=-1)[:, 0]


@dataclasses.dataclass
class _Text:
    """A text in a slot, as it is known here: the tokens that end it, and whether it has ended."""

    ends: frozenset[int]
    has_ended: bool = False


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
        self._prepare = backend.jit(functools.partial(decoding_weights, config=config))
        self._empty = backend.jit(functools.partial(empty_state, config, slots))
        self._fill = backend.jit(_on_leaves(functools.partial(fill_slot, config=config), config), donate_argnums=1)
        chunked = functools.partial(decode_chunk, config=config, chunk=chunk)
        self._decode = backend.jit(_on_leaves(chunked, config), donate_argnums=1)
        self._texts: dict[int, _Text] = {}
        self._weights: Any = None
        self._state: Any = None
        self._held: Any = None
        if params is not None:
            self.load(params)

    def load(self, params: Any) -> None:
        """Takes other parameters; no text is in any slot from then on."""
        self._texts.clear()
        self._weights = self._prepare(params)
        self._state = self._state or tuple(jax.tree.leaves(self._empty()))

    def unload(self) -> None:
        """Gives the memory of weights and cache back, until `load`."""
        self._texts.clear()
        self._weights = self._state = self._held = None

    @property
    def free_slots(self) -> list[int]:
        return [slot for slot in range(self.slots) if slot not in self._texts]

    def insert(
        self,
        slot: int,
        tokens: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int,
        end_tokens: Sequence[int] = (),
        width: int = 0,
    ) -> None:
        """Puts a prompt into a free slot.

        Args:
          tokens: 1 to block_size of them.
          max_tokens: how many tokens to draw at most, 1 or more; the text also ends where the block is full.
          end_tokens: tokens any of which ends the text, which then has it as its last; MOST_ENDS at most.
          width: of the prefill, if the prompt is shorter: prompts that are filled alike share one program.

        Raises:
          ValueError: an argument that is not as said, or a slot in use.
        """
        block, count = self.config.block_size, len(tokens)
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
        row = State(
            tokens=np.int32(tokens[-1]),
            positions=np.int32(count - 1),
            left=np.int32(min(max_tokens, block - count + 1)),
            ends=np.array(ends, np.int32),
            seeds=np.uint32(options.seed % 2**32),
            temperatures=np.float32(options.temperature),
            top_ks=np.int32(options.top_k),
            cache=(),
        )
        # The recording of `decode` stays as long as its last results are held.
        self._held, state = self._state, self._state
        self._state = self._fill(self._weights, state, padded, row, np.int32(slot))[0]
        self._texts[slot] = _Text(frozenset(end_tokens))

    def prefill_width(self, count: int) -> int:
        """The tokens that a prefill of a prompt of `count` tokens takes."""
        width = SHORTEST_PREFILL
        while width < count - 1:
            width *= 2
        return min(width, self.config.block_size)

    def decode(self) -> dict[int, Piece]:
        """Draws up to `chunk` tokens of every text that has not ended; of each, what it has gained."""
        self._state, draws = self._decode(self._weights, self._state)
        self._held = None
        tokens, logprobs, left = (np.asarray(x) for x in (*draws, self._state[State._fields.index("left")]))
        pieces = {}
        for slot, text in self._texts.items():
            if text.has_ended:
                continue
            count = int((tokens[:, slot] != UNDRAWN).sum())
            new = tokens[:count, slot].tolist()
            reason = None
            if left[slot] == 0:
                reason, text.has_ended = "stop" if new[-1] in text.ends else "length", True
            pieces[slot] = Piece(new, logprobs[:count, slot].tolist(), reason)
        return pieces

    def release(self, slot: int) -> None:
        """Frees a slot."""
        del self._texts[slot]


def _on_leaves(fn: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """The function with a state's leaves as one tuple: passed whole, they are known by that tuple (see `donation`)."""
    structure = jax.tree.structure(jax.eval_shape(lambda: empty_state(config, 1)))

    def wrapped(weights: Weights, leaves: tuple, *rest: Any) -> Any:
        found = fn(weights, jax.tree.unflatten(structure, leaves), *rest)
        state, *results = (found,) if isinstance(found, State) else found
        return tuple(jax.tree.leaves(state)), *results

    return wrapped
