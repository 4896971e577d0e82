"""The kernels of the fused output layer and cross entropy, against float64 and the reference."""

import functools

import jax
import numpy as np
import pytest
from run_plan import BF16, DTYPES, F32, assert_accurate, normal, run, same_bits
from vulkan_devices import needs_vulkan

from vk_kernels.errors import FeatureError
from vk_kernels.ops.cross_entropy.planner import (
    plan_linear_cross_entropy_backward,
    plan_linear_cross_entropy_both_passes,
    plan_linear_cross_entropy_forward,
)
from vk_kernels.ops.cross_entropy.reference import (
    linear_cross_entropy_backward_reference,
    linear_cross_entropy_both_passes_reference,
    linear_cross_entropy_forward_reference,
    linear_cross_entropy_reference,
)
from vk_kernels.ops.matmul.gemm import VARIANTS, choose_variant
from vk_kernels.runtime.array_spec import ArraySpec

pytestmark = [needs_vulkan, pytest.mark.usefixtures("strict_dtypes")]

FORWARD = plan_linear_cross_entropy_forward, linear_cross_entropy_forward_reference
BACKWARD = plan_linear_cross_entropy_backward, linear_cross_entropy_backward_reference
BOTH = plan_linear_cross_entropy_both_passes, linear_cross_entropy_both_passes_reference


def problem(tokens, width, vocab, dtype=F32):
    """x, w, targets with every fifth ignored."""
    targets = np.random.default_rng(0).integers(0, vocab, (tokens,)).astype(np.int32)
    targets[1::5] = -1
    return normal(tokens, width, dtype=dtype), normal(width, vocab, seed=1, dtype=dtype), targets


def exact(x, w, targets, dlosses):
    """(losses, log normalizers, dx, dw) in float64."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    logits = x @ w
    top = logits.max(-1)
    normalizers = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    rows, kept = np.arange(len(x)), np.where(targets < 0, 0.0, 1.0)
    at = np.maximum(targets, 0)
    dlogits = np.exp(logits - normalizers[:, None])
    dlogits[rows, at] -= 1
    dlogits *= (kept * dlosses)[:, None]
    return kept * (normalizers - logits[rows, at]), normalizers, dlogits @ w.T, x.T @ dlogits


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "chunk_rows", "transposed"),
    [
        (1, 1, 1, None, False),
        (33, 7, 257, 8, False),
        (33, 7, 257, 8, True),
        (70, 24, 1000, 32, False),
        (64, 64, 1003, None, False),  # whole tiles, but for the vocabulary
        (64, 64, 1003, None, True),
    ],
)
@pytest.mark.parametrize(("dtype", "variant"), [(F32, "plain"), *((BF16, variant) for variant in VARIANTS)], ids=str)
def test_losses_and_gradients(device, tokens, width, vocab, chunk_rows, transposed, dtype, variant):
    try:
        choose_variant(device.info, dtype, variant)
    except FeatureError as error:
        pytest.skip(str(error))
    x, w, targets = problem(tokens, width, vocab, dtype)
    dlosses = normal(tokens, seed=2)
    losses, normalizers, dx, dw = exact(x, w, targets, dlosses)
    w, dw = (w.T.copy(), dw.T) if transposed else (w, dw)
    layout = {"transposed": transposed}
    options = {"variant": variant, "chunk_rows": chunk_rows}

    actual = run(device, *FORWARD, x, w, targets, **layout, **options)
    plain = jax.jit(functools.partial(linear_cross_entropy_forward_reference, **layout))(x, w, targets)
    assert_accurate(actual[0], plain[0], losses, what="losses")
    assert_accurate(actual[1], plain[1], normalizers, what="log normalizers")
    assert not actual[0][targets < 0].any()

    found = run(device, *BACKWARD, x, w, targets, actual[1], dlosses, **layout, **options)
    loss = functools.partial(linear_cross_entropy_reference, targets=targets, **layout)
    plain = jax.jit(lambda x, w: jax.vjp(loss, x, w)[1](dlosses))(x, w)
    assert_accurate(found[0], plain[0], dx, 3, "dx")
    assert_accurate(found[1], plain[1], dw, 3, "dw")
    assert not found[0][targets < 0].any()

    both = run(device, *BOTH, x, w, targets, dlosses, **layout, **options)
    assert same_bits(both[:2], actual)
    assert_accurate(both[2], plain[0], dx, 3, "dx of both passes")
    assert_accurate(both[3], plain[1], dw, 3, "dw of both passes")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_backward_reference_is_the_gradient_of_the_forward_one(transposed):
    x, w, targets = problem(9, 5, 11)
    w, dlosses = w.T if transposed else w, normal(9, seed=2)
    _, normalizers = linear_cross_entropy_forward_reference(x, w, targets, transposed=transposed)
    loss = functools.partial(linear_cross_entropy_reference, targets=targets, transposed=transposed)
    expected = jax.vjp(loss, x, w)[1](dlosses)
    found = linear_cross_entropy_backward_reference(x, w, targets, normalizers, dlosses, transposed=transposed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_more_rows_than_one_axis_of_workgroups_takes(device):
    x, w, targets = problem(70_000, 1, 2)
    actual = run(device, *FORWARD, x, w, targets, chunk_rows=70_000)
    losses, normalizers, *_ = exact(x, w, targets, 1.0)
    np.testing.assert_allclose(actual[0], losses, atol=1e-5)
    np.testing.assert_allclose(actual[1], normalizers, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_show_in_what_they_do_not_sum(device, dtype):
    """Losses and dx are those of a single chunk bit for bit; dw, a sum over chunks, nearly."""
    x, w, targets = problem(64, 16, 90, dtype)
    dlosses = normal(64, seed=2)
    forward = [run(device, *FORWARD, x, w, targets, chunk_rows=rows) for rows in (64, 16)]
    assert same_bits(*forward)
    whole, parts = (run(device, *BACKWARD, x, w, targets, forward[0][1], dlosses, chunk_rows=rows) for rows in (64, 16))
    assert same_bits(whole[:1], parts[:1])
    both = [run(device, *BOTH, x, w, targets, dlosses, chunk_rows=rows) for rows in (64, 16)]
    assert same_bits(both[0][:3], both[1][:3])
    for some, others in ((whole[1], parts[1]), (both[0][3], both[1][3])):
        dws = (some.astype(np.float32), others.astype(np.float32))
        np.testing.assert_allclose(*dws, rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-5)


def test_the_same_every_time(device):
    x, w, targets = problem(100, 24, 300)
    normalizers = run(device, *FORWARD, x, w, targets)[1]
    inputs = (x, w, targets, normalizers, normal(100, seed=2))
    assert same_bits(run(device, *BACKWARD, *inputs), run(device, *BACKWARD, *inputs))


def test_large_logits(device):
    """Differences of 1,000 neither overflow nor lose the loss."""
    x = np.array([[1000.0], [-1000.0], [1e30]], np.float32)
    w, targets = np.array([[1.0, 0.0, 0.999]], np.float32), np.array([0, 0, 1], np.int32)
    losses, normalizers = run(device, *FORWARD, x, w, targets)
    np.testing.assert_allclose(losses, [np.log1p(np.exp(-1)), 1000, 1e30], rtol=1e-5)
    dx, dw = run(device, *BACKWARD, x, w, targets, normalizers, np.ones(3, np.float32))
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()


def test_nan_and_infinity_stay_in_their_row(device):
    x, w, targets = problem(6, 4, 50)
    targets[:] = 3
    x[1, 2], x[4, 0] = np.nan, np.inf
    losses, normalizers = run(device, *FORWARD, x, w, targets)
    plain = linear_cross_entropy_forward_reference(x, w, targets)
    np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
    np.testing.assert_allclose(normalizers, plain[1], rtol=1e-5)
    assert np.isfinite(losses).tolist() == [True, False, True, True, False, True]
    dx, _ = run(device, *BACKWARD, x, w, targets, normalizers, np.ones(6, np.float32))
    assert np.isfinite(dx).all(axis=1).tolist() == [True, False, True, True, False, True]


def test_a_target_past_the_vocabulary_gives_nan(device):
    x, w, targets = problem(4, 5, 9)
    targets[:] = [0, 9, 8, -1]
    losses, _ = run(device, *FORWARD, x, w, targets)
    assert np.isnan(losses).tolist() == [False, True, False, False]
    assert np.isnan(linear_cross_entropy_reference(x, w, targets)).tolist() == [False, True, False, False]


def test_no_tokens(device):
    x, w, targets = problem(0, 5, 9)
    losses, normalizers = run(device, *FORWARD, x, w, targets)
    assert losses.shape == normalizers.shape == (0,)
    for dx, dw in (
        run(device, *BACKWARD, x, w, targets, normalizers, losses),
        run(device, *BOTH, x, w, targets, losses)[2:],
    ):
        assert dx.shape == (0, 5)
        np.testing.assert_array_equal(dw, np.zeros((5, 9)))


def test_logits_are_never_all_in_memory(device):
    tokens, width, vocab = 16384, 768, 50257
    x, w, losses = ArraySpec((tokens, width), F32), ArraySpec((width, vocab), F32), ArraySpec((tokens,), F32)
    targets = ArraySpec((tokens,), np.dtype(np.int32))
    for planner, inputs, outputs in (
        (FORWARD[0], [x, w, targets], [losses, losses]),
        (BACKWARD[0], [x, w, targets, losses, losses], [x, w]),
        (BOTH[0], [x, w, targets, losses], [losses, losses, x, w]),
    ):
        plan = planner(device.info, inputs, outputs)
        limit = min(device.limits.storage_buffer_range, 256 << 20)
        assert sum(plan.scratch) <= 2 * limit
        assert max(plan.scratch) <= limit
    with pytest.raises(ValueError, match=r"a row of .* logits does not fit a buffer"):
        FORWARD[0](device.info, [ArraySpec((1, 1), F32), ArraySpec((1, 1 << 31), F32), targets], [losses, losses])
