"""Drawing tokens on Vulkan: the kernel's tokens are the reference's, whatever the logits and the controls."""

import jax
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.ops.draw_tokens import draw_tokens_reference

pytestmark = [needs_vulkan, pytest.mark.timeout(300)]

# repetition, presence, frequency, temperature, top_k, top_p, min_p
ROWS = [
    (1, 0, 0, 1, 0, 1, 0),
    (1, 0, 0, 0, 0, 1, 0),
    (1, 0, 0, 1, 5, 1, 0),
    (1, 0, 0, 1, 1, 1, 0),
    (1, 0, 0, 0.7, 300, 1, 0),  # more than there is room for in shared memory, where many are equal
    (1, 0, 0, 3, 700, 0.8, 0.01),
    (1, 0, 0, 1, 0, 0.9, 0),
    (1, 0, 0, 2, 0, 0.3, 0),
    (1, 0, 0, 1, 0, 1e-30, 0),
    (1, 0, 0, 1, 40, 0.9, 0),
    (1, 0, 0, 1, 0, 1, 0.05),
    (1, 0, 0, 1, 0, 1, 1),
    (1.3, 0.5, -0.2, 1, 0, 0.95, 0),
    (1, 0, 0, 1e-30, 0, 1, 0),
    (1, 0, 0, 1e30, 0, 1, 0),
]


def drawing(vocab, scale, seed):
    """Operands of twice as many rows as ROWS: the second half full of ties, NaN and infinities."""
    rng, rows = np.random.default_rng(seed), 2 * len(ROWS)
    logits = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
    odd = logits[len(ROWS) :]
    odd[:] = np.round(odd * 2) / 2
    for value, share in ((-np.inf, 0.1), (np.nan, 0.02), (3e38, 0.01), (np.inf, 0.01)):
        odd[rng.random(odd.shape) < share] = value
    seen = (rng.integers(0, 6, logits.shape) * (rng.random(logits.shape) < 0.2)).astype(np.int32)
    columns = np.array(ROWS * 2, np.float32).T
    controls = ops.Controls(*columns[:4], columns[4].astype(np.int32), *columns[5:])
    seeds, positions = rng.integers(0, 2**32, rows, np.uint32), rng.integers(0, 1000, rows, np.int32)
    return logits, seen, seeds, positions, controls


def draw_on_vulkan(*operands):
    with vk_kernels.use("vulkan", device=SELECTOR):
        return jax.jit(ops.draw_tokens)(*operands)


@pytest.mark.parametrize(("vocab", "scale"), [(1, 1.0), (2, 0.01), (53, 3.0), (600, 0.01), (2500, 3.0), (2500, 0.01)])
def test_the_tokens_are_those_of_the_reference(vocab, scale):
    operands = drawing(vocab, scale, seed=vocab)
    expected = jax.jit(draw_tokens_reference)(*operands)
    found = draw_on_vulkan(*operands)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)


def test_under_vmap_a_batch_is_more_rows():
    operands = drawing(53, 3.0, seed=1)
    halves = jax.tree.map(lambda x: x.reshape(2, len(ROWS), *x.shape[1:]), operands)
    expected = draw_on_vulkan(*operands)
    with vk_kernels.use("vulkan", device=SELECTOR):
        found = jax.jit(jax.vmap(ops.draw_tokens))(*halves)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(b.shape), b), found, expected)


def test_a_row_without_a_possible_token_ends():
    logits, *rest = drawing(9, 1.0, seed=0)
    logits[::2], logits[1::2] = -np.inf, np.nan
    assert not np.asarray(draw_on_vulkan(logits, *rest).tokens).any()


def test_nonsense_in_the_controls_ends_too():
    logits, seen, seeds, positions, controls = drawing(300, 1.0, seed=0)
    rng = np.random.default_rng(0)
    odd = np.float32([np.nan, -np.inf, -1, 0, 1e-45, np.inf])
    nonsense = ops.Controls(*(rng.choice(odd, len(seeds)) for _ in controls))._replace(top_k=-positions)
    tokens = np.asarray(draw_on_vulkan(logits, seen, seeds, positions, nonsense).tokens)
    assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros(3, np.float32)}, r"logits must be \(B, V\), found \(3,\)"),
        ({"seen": np.zeros((30, 9), np.uint32)}, r"seen must be int32\[30,9\], found uint32\[30,9\]"),
        ({"seeds": np.zeros(30, np.int32)}, r"seeds must be uint32\[30\], found int32\[30\]"),
        ({"top_p": np.zeros(1, np.float32)}, r"top_p must be float32\[30\], found float32\[1\]"),
        ({"top_k": np.zeros(30, np.float32)}, r"top_k must be int32\[30\], found float32\[30\]"),
    ],
)
def test_bad_operands_are_refused_by_name(change, message):
    logits, seen, seeds, positions, controls = drawing(9, 1.0, seed=0)
    operands = {"logits": logits, "seen": seen, "seeds": seeds, "positions": positions}
    operands |= {"controls": controls._replace(**{k: v for k, v in change.items() if k in controls._fields})}
    operands |= {k: v for k, v in change.items() if k in operands}
    with pytest.raises(ValueError, match=f"draw_tokens: {message}"):
        draw_on_vulkan(*operands.values())
