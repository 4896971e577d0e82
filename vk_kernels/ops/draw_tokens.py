"""The next token of each text: penalties, temperature, top-k, top-p and min-p, and a draw by the Gumbel-max trick.

Random bits are a pure function of (seed, position, token), so that a text is the same on every implementation, in any
batch and however many tokens are drawn in a submission.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vk_kernels.bridge.primitive import make_primitive, vary_alike
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.philox import DRAWS_PER_BLOCK, philox4x32
from vk_kernels.ops.planning import dispatch, has_lanes, operands_of, planner, require_plain
from vk_kernels.ops.public import check_arrays, public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan
from vk_kernels.runtime.kernel import manifest

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

SITE = 0x44524157  # of these bits in Philox's key: no use of dropout has it
IN_PROMPT = 1  # of an element of `seen`: the token is in the prompt
GENERATED = 2  # of an element of `seen`: what each time that it was generated adds
LARGEST = float(np.finfo(np.float32).max)
_UNBOUNDED = np.int32(2**31 - 1)  # above the bits of every distance
LANES = 32  # of a subgroup of the wide kernel
_NEIGHBOURS = 32  # tokens whose bits come from as many blocks


class Controls(NamedTuple):
    """Settings of each row's draw: arrays (B,), in the order in which they act, so that no value of one compiles anew.

    repetition_penalty: f32; divides positive logits and multiplies negative ones of tokens seen; 1: none.
    presence_penalty: f32, taken off the logits of tokens generated; 0: none.
    frequency_penalty: f32, taken off for each time that a token was generated; 0: none.
    temperature: f32, of the softmax; 0: the likeliest token, the first of several.
    top_k: int32; tokens stay that fewer than k are likelier than; 0: all.
    top_p: f32; of these, tokens stay for which the likelier ones have less than this probability together; 1: all.
    min_p: f32; of these, tokens stay that have this times the largest probability; 0: all.
    """

    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


CONTROL_TYPES = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in Controls._fields}


class Drawn(NamedTuple):
    """tokens: int32 (B,). logprobs: f32 (B,), of them in the model's own distribution."""

    tokens: jax.Array
    logprobs: jax.Array


def draw_tokens_reference(
    logits: jax.Array, seen: jax.Array, seeds: jax.Array, positions: jax.Array, controls: Controls
) -> Drawn:
    """Draws a token from each row of `logits`.

    Args:
      logits: f32 (B, V). NaN counts as -inf, +inf as the largest number.
      seen: int32 (B, V): IN_PROMPT if the token is in the prompt, plus GENERATED for each time it was generated.
      seeds: uint32 (B,). positions: int32 (B,), of the token that is drawn: with the seed they decide the bits.
      controls: what is drawn from, and how.

    Returns:
      The tokens, and their log-probabilities under the softmax of the logits as they came, before any control.

    Source: the controls in the order of transformers' `generate`: repetition (Keskar et al., "CTRL", 2019),
    temperature, top-k (Fan et al., 2018), top-p (Holtzman et al., 2020), min-p (Nguyen et al., 2024); presence and
    frequency as OpenAI's API defines them. The log-probabilities are what vLLM calls raw_logprobs, its default.
    """
    logits = _ordered(logits)
    columns = Controls(*(value[:, None] for value in controls))  # (B, 1) each
    penalised = _penalise(logits, seen, columns)
    peak = jnp.maximum(penalised.max(axis=-1, keepdims=True), -LARGEST)  # not -inf, where no token is possible
    is_greedy = columns.temperature == 0
    # Logits below the largest: (p - max) / T is p / T - max / T without an overflow at small T.
    scaled = (penalised - peak) / jnp.where(is_greedy, 1.0, columns.temperature)
    noise = jnp.where(is_greedy, 0.0, gumbel(seeds, positions, logits.shape[-1]))
    scores = jnp.where(_kept(scaled, columns), scaled + noise, -jnp.inf)
    tokens = scores.argmax(axis=-1).astype(jnp.int32)
    logprobs = log_probabilities(logits)
    return Drawn(tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0])


def _ordered(logits: jax.Array) -> jax.Array:
    """The logits with -inf for NaN and the largest number for +inf."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, LARGEST))


def _penalise(logits: jax.Array, seen: jax.Array, controls: Controls) -> jax.Array:
    repetition = controls.repetition_penalty
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    times = (seen // GENERATED).astype(jnp.float32)
    present = jnp.where(times > 0, controls.presence_penalty, 0.0)
    penalised = jnp.where(seen > 0, repeated, logits) - present - controls.frequency_penalty * times
    return jnp.minimum(penalised, LARGEST)


def _kept(scaled: jax.Array, controls: Controls) -> jax.Array:
    """The tokens to draw from, bool (B, V): those whose distance from the largest, -scaled, is small enough.

    Each of top-k, top-p and min-p is a threshold of the distance, so that equal logits stay or go together.
    """
    distance = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)  # from 0 on, bits are in the numbers' order
    k, p = controls.top_k, controls.top_p
    share = jnp.where(k == 0, jnp.inf, k.astype(jnp.float32))
    within_k = _farthest(distance, jnp.ones_like(scaled), share)
    weights = jnp.where(distance <= within_k, jnp.exp(scaled), 0.0)
    share = jnp.where(p >= 1, jnp.inf, p * weights.sum(axis=-1, keepdims=True))
    within_p = _farthest(distance, weights, share)
    return (distance <= jnp.minimum(within_k, within_p)) & (scaled >= jnp.log(controls.min_p))


def _farthest(distance: jax.Array, weights: jax.Array, share: jax.Array) -> jax.Array:
    """The largest number, int32 (B, 1), below which the weights of all distances sum to less than `share` (B, 1).

    Found bit by bit from the highest, without a sort; no work where every share is infinite.
    """

    def decide_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.int32(1) << (30 - i))
        below = jnp.where(distance < tried, weights, 0.0).sum(axis=-1, keepdims=True)
        return jnp.where(below < share, tried, found)

    bounded = jnp.isfinite(share)
    bits = jnp.where(bounded.any(), 31, 0)
    found = jax.lax.fori_loop(0, bits, decide_bit, jnp.zeros(share.shape, jnp.int32))
    return jnp.where(bounded, found, _UNBOUNDED)


def log_probabilities(logits: jax.Array) -> jax.Array:
    """The logarithm of the softmax, f32 (B, V); NaN counts as -inf, +inf as the largest number."""
    logits = _ordered(logits)
    below = logits - jnp.maximum(logits.max(axis=-1, keepdims=True), -LARGEST)
    total = jnp.exp(below).sum(axis=-1, keepdims=True)
    return below - jnp.log(jnp.maximum(total, 1))  # less only where no token is possible


def gumbel(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Standard Gumbel noise for each token, f32 (B, vocab_size): -log(-log(1 - v)).

    v is uniform in [2**-32, 1 - 2**-24], where f32 holds it in steps of 2**-31: the near end decides for rare tokens.
    Of each 256 tokens from 256 g on, number 32 (2 w + h) + i takes the upper 16 of its 32 bits from half h (0 = low) of
    word w of the Philox block with counter (32 g + i, position, 0, 0) and key (seed, SITE), and the lower 16 from
    counter (32 g + i, position, 1, 0): 32 threads read neighbours, each with a block of its own, and make the second
    one only for tokens that the first leaves in the race.
    """
    upper, lower = (_random_uint16(seeds, positions, vocab_size, part) for part in (0, 1))
    v = upper.astype(jnp.float32) * 2.0**-16 + (lower | 1).astype(jnp.float32) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(v, 1 - 2.0**-24)))


def _random_uint16(seeds: jax.Array, positions: jax.Array, vocab_size: int, part: int) -> jax.Array:
    """16 random bits for each token, as uint32 (B, vocab_size)."""
    groups = -(-vocab_size // (_NEIGHBOURS * DRAWS_PER_BLOCK))
    grid = (seeds.shape[0], groups, _NEIGHBOURS)
    first, neighbour = (jax.lax.broadcasted_iota(jnp.uint32, grid, axis) for axis in (1, 2))
    counter = (
        first * _NEIGHBOURS + neighbour,
        jnp.broadcast_to(positions.astype(jnp.uint32)[:, None, None], grid),
        jnp.full(grid, part, jnp.uint32),
        jnp.zeros(grid, jnp.uint32),
    )
    words = philox4x32(counter, (jnp.broadcast_to(seeds[:, None, None], grid), jnp.uint32(SITE)))
    # The barrier keeps XLA from computing a whole block again for each of the eight tokens it decides.
    words = jax.lax.optimization_barrier(words)
    halves = [half for word in words for half in (word & jnp.uint32(0xFFFF), word >> 16)]
    return jnp.stack(halves, axis=2).reshape(grid[0], -1)[:, :vocab_size]


def takes_wide_kernel(info: "DeviceInfo", name: str) -> bool:
    """Whether a device runs a kernel of full subgroups of LANES."""
    needs = manifest()[name]
    lacks = (set(needs["features"]) | {"computeFullSubgroups"}) - info.features.names
    return not lacks and has_lanes(info, LANES) and needs["workgroup"][0] <= info.limits.workgroup_invocations


@planner
def plan_draw_tokens(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: logits, seen, seeds, positions, and those of Controls; outputs: those of Drawn. See `draw_tokens`.

    Raises:
      ValueError: rows without a token.
    """
    require_plain(variant)
    (logits, seen, seeds, positions, *controls), (tokens, logprobs), _ = operands_of(inputs, outputs)
    rows, columns = inputs[logits].shape
    if rows == 0:
        return Plan(())
    if columns == 0:
        raise ValueError(f"logits must be of a token or more, found {inputs[logits]}")
    is_wide = takes_wide_kernel(info, "draw_tokens.wide")
    run = dispatch(
        "draw_tokens",
        "wide" if is_wide else "small",
        rows,
        constants={"rows": rows, "columns": columns},
        subgroup_size=LANES if is_wide else None,
        logits=logits,
        seen=seen,
        seeds=seeds,
        positions=positions,
        **dict(zip(Controls._fields, controls, strict=True)),
        tokens=tokens,
        logprobs=logprobs,
    )
    return Plan((run,))


def _reference_of_operands(logits, seen, seeds, positions, *controls):
    return tuple(draw_tokens_reference(logits, seen, seeds, positions, Controls(*controls)))


_OPERANDS = 4 + len(Controls._fields)
_draw_tokens_primitive = make_primitive(
    "draw_tokens", _reference_of_operands, KernelOp(plan_draw_tokens, batch_axes=lambda: (True,) * _OPERANDS)
)


@public(draw_tokens_reference)
def draw_tokens(target, logits, seen, seeds, positions, controls):
    if jnp.ndim(logits) != 2:
        raise ValueError(f"draw_tokens: logits must be (B, V), found {jnp.shape(logits)}")
    rows = jnp.shape(logits)[:1]
    of_rows = {name: (value, rows, CONTROL_TYPES[name]) for name, value in controls._asdict().items()}
    check_arrays(
        "draw_tokens",
        logits=(logits, jnp.shape(logits), jnp.float32),
        seen=(seen, jnp.shape(logits), jnp.int32),
        seeds=(seeds, rows, jnp.uint32),
        positions=(positions, rows, jnp.int32),
        **of_rows,
    )
    return Drawn(*_draw_tokens_primitive.bind(*vary_alike(logits, seen, seeds, positions, *controls), target=target))
