"""Drawing a token and taking it in: kernel and reference, texts that go on, end now and have ended."""

import jax
import numpy as np
import pytest
from run_plan import BF16, F32
from test_draw_tokens import ROWS, drawing
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.ops.draw_tokens import GENERATED, draw_tokens_reference
from vk_kernels.ops.extend_texts import UNDRAWN, Texts, extend_texts_reference

pytestmark = [needs_vulkan, pytest.mark.timeout(300)]


def extending(vocab, most_ends=3, dtype=F32):
    """Operands of as many rows as ROWS has, twice; of each three one text has ended, and one ends now if it may."""
    logits, seen, seeds, positions, controls = drawing(vocab, 3.0, seed=vocab)
    rows, logits = np.arange(len(logits)), logits.astype(dtype)
    drawn = np.asarray(draw_tokens_reference(logits.astype(F32), seen, seeds, positions + 1, controls).tokens)
    left = (rows % 3).astype(np.int32)
    ends = np.full((len(rows), most_ends), UNDRAWN, np.int32)
    if most_ends:
        ends[rows % 4 == 1, -1] = drawn[rows % 4 == 1]
    texts = Texts(tokens=(rows % vocab).astype(np.int32), positions=positions, left=left, seen=seen)
    return logits, texts, ends, seeds, controls


def extend(*operands):
    with vk_kernels.use("vulkan", device=SELECTOR):
        return jax.jit(ops.extend_texts)(*operands)


@pytest.mark.parametrize(("vocab", "most_ends", "dtype"), [(53, 3, F32), (2500, 0, BF16)])
def test_texts_are_extended_as_by_the_reference(vocab, most_ends, dtype):
    operands = extending(vocab, most_ends, dtype)
    (drawn, texts) = expected = jax.jit(extend_texts_reference)(*operands)
    found = extend(*operands)
    for one, right in zip((found[0].tokens, *found[1]), (drawn.tokens, *texts), strict=True):
        np.testing.assert_array_equal(one, right)
    np.testing.assert_allclose(found[0].logprobs, expected[0].logprobs, rtol=1e-6, atol=2e-6)


def test_the_reference_by_hand():
    """Three texts draw token 2: one goes on, one ends by it, one had ended."""
    logits = np.float32([[0, 1, 9]] * 3)
    before = Texts(*np.int32([[1, 1, 1], [4, 5, 6], [3, 3, 0]]), seen=np.zeros((3, 3), np.int32))
    ends = np.int32([[UNDRAWN, 0], [2, UNDRAWN], [UNDRAWN, UNDRAWN]])
    greedy = ops.Controls(
        *np.float32([[1] * 3, [0] * 3, [0] * 3, [0] * 3]), np.int32([0] * 3), *np.float32([[1] * 3, [0] * 3])
    )
    drawn, texts = ops.extend_texts(logits, before, ends, np.zeros(3, np.uint32), greedy)
    assert drawn.tokens.tolist() == [2, 2, UNDRAWN]
    assert [x.tolist() for x in texts[:3]] == [[2, 1, 1], [5, 5, 6], [2, 0, 0]]
    assert texts.seen.tolist() == [[0, 0, GENERATED]] * 3


def test_what_was_seen_is_counted_where_it_lies_and_all_of_a_token_is_one_dispatch():
    operands = extending(53)

    def twice(seen, logits, texts, *rest):
        first, texts = ops.extend_texts(logits, texts._replace(seen=seen), *rest)
        second, texts = ops.extend_texts(logits, texts, *rest)
        return texts.seen, texts[:3], first, second

    logits, texts, *rest = operands
    with vk_kernels.use("vulkan", device=SELECTOR):
        step = vk_kernels.jit(twice, donate_argnums=0)
        text = step.lower(texts.seen, logits, texts._replace(seen=None), *rest).as_text()
        found = step(texts.seen, logits, texts._replace(seen=None), *rest)
    assert text.startswith("2 dispatches")
    expected = jax.jit(twice)(texts.seen, logits, texts._replace(seen=None), *rest)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[3].tokens, expected[3].tokens)


def test_rows_of_texts_beyond_are_left_alone():
    logits, texts, ends, seeds, controls = extending(53)
    few = jax.tree.map(lambda x: x[:5], (texts._replace(seen=()), ends, seeds, controls))
    _, found = extend(logits[:5], few[0]._replace(seen=texts.seen), *few[1:])
    np.testing.assert_array_equal(found.seen[:5], extend(logits, texts, ends, seeds, controls)[1].seen[:5])
    np.testing.assert_array_equal(found.seen[5:], texts.seen[5:])


def test_a_column_more_or_less_is_refused():
    logits, texts, ends, seeds, controls = extending(53)
    assert len(logits) == 2 * len(ROWS)
    for changed in (texts._replace(seen=texts.seen[:, 1:]), texts._replace(left=texts.left[1:])):
        with pytest.raises(ValueError, match=r"extend_texts: .* must be"), vk_kernels.use("vulkan", device=SELECTOR):
            ops.extend_texts(logits, changed, ends, seeds, controls)
