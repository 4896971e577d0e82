"""Every operation at named real shapes, with its float64 truth: what checks, tests and measurements share.

A case makes its operands from a seed, so that the same one is the same everywhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vk_kernels import ops

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

RNG = np.array([42, 7], np.uint32)  # seed, step
ADAMW = {"b1": 0.9, "b2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


class Sizes(NamedTuple):
    """Sizes of a model and its batch: batch, length, width, heads, vocabulary."""

    batch: int
    length: int
    width: int
    heads: int
    vocab: int


# tiny is odd wherever it can be; megabyte has arrays over 1 MB; the others are training steps.
SIZES = {
    "tiny": Sizes(3, 21, 36, 3, 53),
    "megabyte": Sizes(4, 150, 1032, 12, 301),
    "chat": Sizes(16, 256, 256, 8, 4000),
    "124M": Sizes(4, 1024, 768, 12, 50257),
}

Operands = tuple[Any, ...]


@dataclass(frozen=True)
class OpCase:
    """One operation at one shape.

    operands: (sizes, dtype) -> numpy arrays. keywords: the names of the last of them, which are passed by name.
    parameters: of the operation, beside them. differentiable: indices of the operands that have a gradient.
    truth: the same operation in plain JAX, on operands in float64; its results as a tuple.
    """

    op: str
    name: str
    operands: Callable[[Sizes, np.dtype], Operands]
    truth: Callable[..., tuple[jax.Array, ...]]
    parameters: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[int, ...] = ()
    keywords: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.op} ({self.name})" if self.name else self.op

    def run(self, operands: Sequence[Any], implementation: str | None = None) -> tuple[jax.Array, ...]:
        """The operation on these operands; its results as a tuple."""
        results = self._call(getattr(ops, self.op), operands, implementation=implementation)
        return tuple(results) if isinstance(results, (tuple, list)) else (results,)

    def run_truth(self, operands: Sequence[Any]) -> tuple[jax.Array, ...]:
        """The truth; operands in float64, under `jax.enable_x64`."""
        return self._call(self.truth, operands)

    def _call(self, function: Callable[..., Any], operands: Sequence[Any], **options: Any) -> Any:
        split = len(operands) - len(self.keywords)
        named = dict(zip(self.keywords, operands[split:], strict=True))
        return function(*operands[:split], **named, **self.parameters, **options)


def numbers(shape: tuple[int, ...], dtype: np.dtype, seed: int, scale: float = 1.0) -> np.ndarray:
    """Normal numbers of that standard deviation."""
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def _hidden(sizes: Sizes, dtype: np.dtype, seed: int) -> np.ndarray:
    return numbers((sizes.batch, sizes.length, sizes.width), dtype, seed)


def _parameters(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of a layer norm."""
    return 1 + numbers((sizes.width,), F32, 11, 0.1), numbers((sizes.width,), F32, 12, 0.1)


def _weights(rows: int, columns: int, dtype: np.dtype, seed: int) -> np.ndarray:
    return numbers((rows, columns), dtype, seed, 1 / math.sqrt(rows))


def _ids(sizes: Sizes) -> np.ndarray:
    return np.random.default_rng(13).integers(0, sizes.vocab, (sizes.batch, sizes.length), dtype=np.int32)


def _targets(sizes: Sizes) -> np.ndarray:
    """Some of them masked."""
    ids = _ids(sizes).reshape(-1)
    return np.where(np.arange(ids.size) % 7 == 3, np.int32(ops.IGNORED), ids)


def _qkv(sizes: Sizes, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    shape = (sizes.batch, sizes.length, sizes.heads, sizes.width // sizes.heads)
    return tuple(numbers(shape, dtype, seed) for seed in (1, 2, 3))


def _model_parameters(sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    """Shapes of a few of a model's parameters."""
    return (sizes.vocab, sizes.width), (sizes.width, 4 * sizes.width), (sizes.width,)


def _adamw_operands(sizes: Sizes, dtype: np.dtype) -> Operands:
    shapes = _model_parameters(sizes)
    kinds = (
        (F32, 0.1),
        (dtype, 1.0),
        (F32, 0.1),
        (F32, 0.1),
    )  # parameters, gradients, first and second moments
    arrays = [numbers(shape, kind, i, scale) for i, (kind, scale) in enumerate(kinds) for shape in shapes]
    seconds = [np.square(x) for x in arrays[3 * len(shapes) :]]
    return *arrays[: 3 * len(shapes)], *seconds, np.int32(4), np.float32(1e-3), np.float32(2.5)


SEEDS, PLACES = np.arange(5, 2**32, 2**27, np.uint32), np.arange(32, dtype=np.int32) % 7  # of a token's random bits


def _drawing(sizes: Sizes, dtype: np.dtype) -> Operands:
    """Logits of up to 32 texts, f32 whatever the dtype, and controls that differ from row to row."""
    rows = sizes.batch

    def cycle(*values: float, dtype: np.dtype = F32) -> np.ndarray:
        return np.resize(np.array(values, dtype), rows)

    seen = np.random.default_rng(14).integers(0, 8, (rows, sizes.vocab), np.int32)
    controls = ops.Controls(
        repetition_penalty=cycle(1, 1.3, 1, 1, 1),
        presence_penalty=cycle(0, 0.5, 0, 0, 0),
        frequency_penalty=cycle(0, -0.2, 0, 0, 0),
        temperature=cycle(1, 0.7, 1.2, 0, 1),
        top_k=cycle(0, 40, 0, 7, 0, dtype=np.dtype(np.int32)),
        top_p=cycle(1, 0.95, 0.9, 1, 1),
        min_p=cycle(0, 0.01, 0, 0, 0.02),
    )
    return numbers((rows, sizes.vocab), F32, 1, 3.0), seen, SEEDS[:rows], PLACES[:rows], controls


def _extending(sizes: Sizes, dtype: np.dtype) -> Operands:
    """Texts some of which have ended, and all of which have tokens that end them."""
    logits, seen, seeds, positions, controls = _drawing(sizes, dtype)
    rows = np.arange(len(logits), dtype=np.int32)
    ends = np.random.default_rng(15).integers(0, sizes.vocab, (len(rows), 8), np.int32)
    texts = ops.Texts(tokens=rows % sizes.vocab, positions=positions - np.int32(1), left=rows % 3, seen=seen)
    return logits, texts, ends, seeds, controls


# The truths.


def random_bits(rng: np.ndarray, site: int, grid: tuple[int, int, int]) -> np.ndarray:
    """The 16 bits of each element of a (batch, rows, columns) grid: `philox.random_uint16`, written again for numpy."""
    mask, (batch, rows, columns) = np.uint64(0xFFFFFFFF), grid
    blocks = -(-columns // 8)
    c2, c1, c0 = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in (batch, rows, blocks)), indexing="ij")
    c3 = np.full_like(c0, rng[1])
    k0, k1 = np.uint64(rng[0]), np.uint64(site)
    for _ in range(7):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & mask,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    words = np.stack([c0, c1, c2, c3], axis=-1).astype("<u4")
    return words.view("<u2").reshape(batch, rows, blocks * 8)[:, :, :columns]


def _drop(y: jax.Array, rate: float, site: int, grid: tuple[int, int, int] | None = None) -> jax.Array:
    """Dropout by RNG, which is what every case with dropout draws from."""
    grid = grid or (1, math.prod(y.shape[:-1]), math.prod(y.shape[-1:]))
    threshold = round(rate * 2**16)
    kept = random_bits(RNG, site, grid).reshape(y.shape) >= threshold
    return jnp.where(kept, y * (2**16 / (2**16 - threshold)), 0.0)


def _layer_norm(x, scale, bias, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return (normed * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape),)


def _residual_layer_norm(x, branch, scale, bias, rng=None, dropout_rate=0.0, site=0):
    total = x + (branch if rng is None else _drop(branch, dropout_rate, site))
    return total, *_layer_norm(total, scale, bias)


def _gelu(x):
    return (0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)


def _matmul(x, w, bias=None, activation=None, residual=None, rng=None, dropout_rate=0.0, site=0, transposed=False):
    y = jnp.einsum("...k,kn->...n", x, w.T if transposed else w)
    y = y if bias is None else y + jnp.broadcast_to(bias, y.shape)
    y = y if activation is None else _gelu(y)[0]
    y = y if rng is None else _drop(y, dropout_rate, site)
    return (y if residual is None else residual + y,)


def _norm_matmul(x, branch, scale, shift, w, bias=None, activation=None):
    total, norm = _residual_layer_norm(x, branch, scale, shift)
    return total, *_matmul(norm, w, bias, activation, transposed=True)


def _attention(q, k, v, rng=None, scale=None, cap=None, dropout_rate=0.0, site=0):
    batch, length, heads, head_dim = q.shape
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (1 / math.sqrt(head_dim) if scale is None else scale)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e300), axis=-1)
    if rng is not None:
        weights = _drop(weights, dropout_rate, site, (batch * heads, length, length))
    return (jnp.einsum("bhqk,bkhd->bqhd", weights, v),)


def _decode_attention(qkv, cache, positions, scale=None, cap=None):
    length, head_dim = cache.shape[1], cache.shape[-1]
    places = jnp.arange(length, dtype=jnp.int32)[None]  # (1, T)
    new = (places == positions[:, None])[..., None, None, None]
    cache = jnp.where(jnp.broadcast_to(new, cache.shape), jnp.broadcast_to(qkv[:, None, 1:], cache.shape), cache)
    scores = jnp.einsum("bhd,bkhd->bhk", qkv[:, 0], cache[:, :, 0]) * (
        1 / math.sqrt(head_dim) if scale is None else scale
    )
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where((places <= positions[:, None])[:, None], scores, -1e300), axis=-1)
    return jnp.einsum("bhk,bkhd->bhd", weights, cache[:, :, 1]), cache


def _fill_cache(qkv, cache, slot):
    slots, places = (jnp.arange(size, dtype=jnp.int32) for size in cache.shape[:2])
    places = (slots == slot)[:, None] & (places < len(qkv))[None]  # (B, block)
    filled = jnp.pad(qkv[:, 1:], [(0, cache.shape[1] - len(qkv)), (0, 0), (0, 0), (0, 0)])
    return (jnp.where(jnp.broadcast_to(places[:, :, None, None, None], cache.shape), filled[None], cache),)


def _embedding(table, ids):
    inside = (ids >= 0) & (ids < len(table))
    return (jnp.where(inside[..., None], table[jnp.where(inside, ids, 0)], jnp.nan),)


def _linear_cross_entropy(x, w, targets, transposed=False):
    logits = x @ (w.T if transposed else w)
    hit = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return (jnp.where(targets < 0, 0.0, jax.nn.logsumexp(logits, axis=-1) - hit),)


def _draw_tokens(logits, seen, seeds, positions, controls):
    """By sorting. The noise is that of SEEDS and PLACES."""
    logprobs = jax.nn.log_softmax(logits)
    controls = ops.Controls(*(x[:, None] for x in controls))
    repetition, temperature, k, p = (
        *(controls.repetition_penalty, jnp.maximum(controls.temperature, 1e-30)),
        *(controls.top_k, controls.top_p),
    )
    scores = jnp.where(seen > 0, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    times = (seen // 2).astype(scores.dtype)
    scores = scores - jnp.where(times > 0, controls.presence_penalty, 0) - controls.frequency_penalty * times
    scores = (scores - scores.max(-1, keepdims=True)) / temperature
    descending = -jnp.sort(-scores)
    kth = jnp.take_along_axis(descending, jnp.where(k > 0, k, scores.shape[-1]) - 1, axis=-1)
    scores = jnp.where(scores >= kth, scores, -jnp.inf)
    probabilities = jax.nn.softmax(descending, where=descending >= kth)
    is_out = (jnp.cumsum(probabilities, axis=-1) - probabilities >= p) & (p < 1)
    smallest = jnp.where(is_out, jnp.inf, descending).min(-1, keepdims=True)
    kept = (scores >= smallest) & (scores >= jnp.log(controls.min_p))
    noise = jnp.where(controls.temperature > 0, _gumbel(len(seeds), logits.shape[-1]), 0)
    tokens = jnp.where(kept, scores + noise, -jnp.inf).argmax(-1)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def _extend_texts(logits, texts, ends, seeds, controls):
    tokens, logprobs = _draw_tokens(logits, texts.seen, seeds, texts.positions + 1, controls)
    tokens = tokens.astype(jnp.int32)
    had_ended = texts.left == 0
    left = jnp.where(had_ended | (tokens[:, None] == ends).any(-1), 0, texts.left - 1)
    counted = texts.seen + 2 * jax.nn.one_hot(tokens, logits.shape[-1], dtype=texts.seen.dtype)
    return (
        jnp.where(had_ended, -1, tokens),
        logprobs,
        jnp.where(left == 0, texts.tokens, tokens),
        jnp.where(left == 0, texts.positions, texts.positions + 1),
        left,
        counted,
    )


def _gumbel(rows: int, columns: int) -> np.ndarray:
    """Standard Gumbel noise of the first rows of SEEDS and PLACES, by 32 bits a token."""
    groups = -(-columns // 256)
    noise = []
    for seed, place in zip(SEEDS[:rows], PLACES[:rows], strict=True):
        bits = random_bits(np.array([seed, 0]), 0x44524157, (2, place + 1, groups * 256))[:, place]
        # Blocks of 8 neighbours here, of 8 that are 32 apart there.
        upper, lower = bits.reshape(2, groups, 32, 8).transpose(0, 1, 3, 2).reshape(2, -1)[:, :columns].astype(np.int64)
        v = np.minimum((upper * 2**16 + (lower | 1)) / 2**32, 1 - 2**-24)
        noise.append(-np.log(-np.log1p(-v)))
    return np.array(noise)


def _norm(*arrays):
    return (jnp.sqrt(sum((jnp.sum(x * x) for x in arrays), start=jnp.zeros(()))),)


def _adamw(*operands, decay, b1, b2, epsilon, weight_decay, clip_norm, shadow=False):
    size = len(decay)
    old, (count, learning_rate, loss) = operands[: 4 * size], operands[4 * size :]
    params, grads, mus, nus = (old[i * size : (i + 1) * size] for i in range(4))
    (norm,) = _norm(*grads)
    clip = 1.0 if clip_norm is None else clip_norm / jnp.maximum(norm, clip_norm)
    grads = [g * clip for g in grads]
    mus = [b1 * mu + (1 - b1) * g for mu, g in zip(mus, grads, strict=True)]
    nus = [b2 * nu + (1 - b2) * g * g for nu, g in zip(nus, grads, strict=True)]
    count, next_count = count.astype(norm.dtype), (count + 1).astype(norm.dtype)
    steps = [
        mu / (1 - b1**next_count) / (jnp.sqrt(nu / (1 - b2**next_count)) + epsilon)
        + (weight_decay if decays else 0.0) * p
        for mu, nu, p, decays in zip(mus, nus, params, decay, strict=True)
    ]
    params = [p - learning_rate * step for p, step in zip(params, steps, strict=True)]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    old = *old[:size], *old[2 * size :], count  # without the gradients
    new = [jnp.where(finite, x, y) for x, y in zip((*params, *mus, *nus, next_count), old, strict=True)]
    return *new, norm, finite.astype(norm.dtype), *(new[:size] if shadow else ())


def _decode_operands(sizes: Sizes, dtype: np.dtype) -> Operands:
    """Texts that are empty, full, and of lengths between."""
    head_dim, texts = sizes.width // sizes.heads, sizes.batch
    qkv = numbers((texts, 3, sizes.heads, head_dim), dtype, 1)
    cache = numbers((texts, sizes.length, 2, sizes.heads, head_dim), dtype, 2)
    return qkv, cache, np.linspace(0, sizes.length - 1, texts).astype(np.int32)


def _fill_operands(sizes: Sizes, dtype: np.dtype) -> Operands:
    """A text of half the block, and the last slot but one."""
    qkv, cache, _ = _decode_operands(sizes, dtype)
    tokens = numbers((sizes.length // 2, *qkv.shape[1:]), dtype, 1)
    return tokens, cache, np.int32(max(sizes.batch - 2, 0))


_DROPOUT = {"dropout_rate": 0.1, "site": 3}

CASES = (
    OpCase(
        "matmul",
        "product",
        lambda s, t: (_hidden(s, t, 1), _weights(s.width, 3 * s.width, t, 2)),
        _matmul,
        differentiable=(0, 1),
    ),
    OpCase(
        "matmul",
        "bias, gelu",
        lambda s, t: (_hidden(s, t, 1), _weights(s.width, 4 * s.width, t, 2), numbers((4 * s.width,), t, 3)),
        _matmul,
        {"activation": "gelu"},
        differentiable=(0, 1, 2),
    ),
    OpCase(
        "matmul",
        "bias, dropout, residual",
        lambda s, t: (
            _hidden(s, t, 1),
            _weights(s.width, s.width, t, 2),
            numbers((s.width,), t, 3),
            _hidden(s, t, 4),
            RNG,
        ),
        _matmul,
        _DROPOUT,
        differentiable=(0, 1, 2, 3),
        keywords=("residual", "rng"),
    ),
    OpCase(
        "matmul",
        "transposed",
        lambda s, t: (_hidden(s, t, 1), _weights(s.width, 3 * s.width, t, 2).T.copy(), numbers((3 * s.width,), t, 3)),
        _matmul,
        {"transposed": True},
        differentiable=(0, 1, 2),
    ),
    OpCase(
        "matmul",
        "few rows, bias, gelu",
        lambda s, t: (
            _hidden(s, t, 1)[:, 0],
            _weights(s.width, 4 * s.width, t, 2).T.copy(),
            numbers((4 * s.width,), t, 3),
        ),
        _matmul,
        {"activation": "gelu", "transposed": True},
        differentiable=(0, 1, 2),
    ),
    OpCase(
        "layer_norm",
        "",
        lambda s, t: (_hidden(s, t, 1), *_parameters(s)),
        _layer_norm,
        differentiable=(0, 1, 2),
    ),
    OpCase(
        "residual_layer_norm",
        "dropout",
        lambda s, t: (_hidden(s, t, 1), _hidden(s, t, 2), *_parameters(s), RNG),
        _residual_layer_norm,
        _DROPOUT,
        differentiable=(0, 1, 2, 3),
    ),
    OpCase(
        "attention",
        "",
        _qkv,
        _attention,
        differentiable=(0, 1, 2),
    ),
    OpCase(
        "attention",
        "cap, dropout",
        lambda s, t: (*_qkv(s, t), RNG),
        _attention,
        {"cap": 30.0, **_DROPOUT},
        differentiable=(0, 1, 2),
    ),
    OpCase(
        "packed_attention",
        "cap, dropout",
        lambda s, t: (np.stack(_qkv(s, t), axis=2), RNG),
        lambda qkv, *rest, **options: _attention(*jnp.moveaxis(qkv, 2, 0), *rest, **options),
        {"cap": 30.0, **_DROPOUT},
        differentiable=(0,),
    ),
    OpCase(
        "norm_matmul",
        "few rows, gelu",
        lambda s, t: (
            *(_hidden(s, t, i)[:, 0] for i in (1, 4)),
            *_parameters(s),
            _weights(s.width, 4 * s.width, t, 2).T.copy(),
        ),
        _norm_matmul,
        {"activation": "gelu"},
    ),
    OpCase(
        "norm_matmul",
        "a row, bias",
        lambda s, t: (
            *(_hidden(s, t, i)[0, :1] for i in (1, 4)),
            *_parameters(s),
            _weights(s.width, 4 * s.width, t, 2).T.copy(),
            numbers((4 * s.width,), t, 3),
        ),
        _norm_matmul,
    ),
    OpCase("decode_attention", "cap", _decode_operands, _decode_attention, {"cap": 30.0}),
    OpCase("fill_cache", "", _fill_operands, _fill_cache),
    OpCase("gelu", "", lambda s, t: (_hidden(s, t, 1),), _gelu, differentiable=(0,)),
    OpCase(
        "dropout",
        "",
        lambda s, t: (_hidden(s, t, 1), RNG),
        lambda x, rng, rate, site: (_drop(x, rate, site),),
        {"rate": 0.1, "site": 3},
        differentiable=(0,),
    ),
    OpCase(
        "embedding",
        "",
        lambda s, t: (numbers((s.vocab, s.width), t, 1), _ids(s)),
        _embedding,
        differentiable=(0,),
    ),
    OpCase(
        "linear_cross_entropy",
        "",
        lambda s, t: (
            numbers((s.batch * s.length, s.width), t, 1),
            _weights(s.width, s.vocab, t, 2),
            _targets(s),
        ),
        _linear_cross_entropy,
        differentiable=(0, 1),
    ),
    OpCase(
        "linear_cross_entropy",
        "transposed",
        lambda s, t: (
            numbers((s.batch * s.length, s.width), t, 1),
            _weights(s.width, s.vocab, t, 2).T.copy(),
            _targets(s),
        ),
        _linear_cross_entropy,
        {"transposed": True},
        differentiable=(0, 1),
    ),
    OpCase("draw_tokens", "", _drawing, _draw_tokens),
    OpCase("extend_texts", "", _extending, _extend_texts),
    OpCase(
        "global_norm",
        "",
        lambda s, t: tuple(numbers(shape, t, i) for i, shape in enumerate(_model_parameters(s))),
        _norm,
    ),
    OpCase("adamw", "", _adamw_operands, _adamw, {**ADAMW, "decay": (True, True, False)}),
)
