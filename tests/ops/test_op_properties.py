"""Every operation on drawn shapes, dtypes and options: kernels against float64, forward and backward.

HYPOTHESIS_PROFILE=night draws many more of them (see profiles.py).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from profiles import NIGHT, PROFILE
from test_matmul import assert_exact, exact_product, execute_plan, integers
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.errors import FeatureError
from vk_kernels.ops.attention.planner import MAX_HEAD_DIM
from vk_kernels.ops.matmul.gemm import VARIANTS, Matrix, choose_variant, plan_gemm
from vk_kernels.tools.check_ops import QUICK_TO_COMPILE, compare
from vk_kernels.tools.op_cases import BF16, CASES, F32, RNG, SIZES, Operands, Sizes, numbers, random_bits

pytestmark = [needs_vulkan, pytest.mark.timeout(3600), pytest.mark.usefixtures("strict_dtypes")]

DRAWS = 3  # of the numbers for each shape: the worst of a few elements alone says little about XLA's own error

BASE = {case.op: case for case in CASES}  # of an operation's cases the last, which has the most operands

# Columns, head dims and options choose the kernel, and a CPU driver takes a second or more to compile one: there the
# few examples of CI keep to few kernels, and draw all else.
FREELY = NIGHT or SELECTOR != "cpu"

dtypes = st.sampled_from([F32, BF16])
rows = st.integers(0, 40)
columns = (
    st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 65, 100, 128, 130, 257]))
    if FREELY
    else st.sampled_from([33, 36, 51, 64])
)
# A layer norm's kernels are dear: the columns of CASES, which test_api.py compiles; test_rowwise.py has the others.
norm_columns = columns if FREELY else st.just(SIZES["tiny"].width)
leading = st.lists(st.integers(0, 5), max_size=3).map(tuple)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dropping_rates = st.floats(0.0001, 0.9)
rates = st.one_of(st.just(0.0), dropping_rates)
sites = st.integers(0, 2**32 - 1)
caps = st.floats(1, 50)
head_dims = st.integers(1, MAX_HEAD_DIM) if FREELY else st.sampled_from([4, 12, 28, 32])
caps_and_rates = st.one_of(  # of attention
    st.just((None, 0.0)),
    st.tuples(st.one_of(st.none(), caps) if FREELY else caps, rates if FREELY else dropping_rates),
)


def assert_accurate(op: str, operands: Callable[[int], Operands], **fields: Any) -> None:
    """The contract of check_ops.py for each variant: `operands` of a seed, `fields` of the case."""
    draws = [operands(10 * draw) for draw in range(DRAWS)]
    case = dataclasses.replace(BASE[op], name="drawn", **fields)
    variants = ("plain",) if SELECTOR == "cpu" else VARIANTS
    options = {"unit": 1.0, "few": True, "compiler_options": QUICK_TO_COMPILE}
    found = list(compare(case, draws, SELECTOR, variants=variants, **options))
    assert found
    failed = [difference for difference in found if not difference.error <= difference.allowed]
    assert not failed, "\n".join(map(str, failed))


def present(*operands: Any) -> Operands:
    return tuple(x for x in operands if x is not None)


@PROFILE
@given(
    lead=leading,
    k=st.one_of(st.just(0), columns),
    n=columns,
    dtype=dtypes,
    has_bias=st.booleans(),
    activation=st.sampled_from([None, "gelu"]),
    has_residual=st.booleans(),
    rate=rates,
    site=sites,
)
def test_matmul(lead, k, n, dtype, has_bias, activation, has_residual, rate, site):
    def operands(seed):
        return present(
            numbers((*lead, k), dtype, seed),
            numbers((k, n), dtype, seed + 1, 1 / math.sqrt(max(k, 1))),
            numbers((n,), dtype, seed + 2) if has_bias else None,
            numbers((*lead, n), dtype, seed + 3) if has_residual else None,
            RNG,
        )

    assert_accurate(
        "matmul",
        operands,
        parameters={"activation": activation, "dropout_rate": rate, "site": site},
        differentiable=tuple(range(2 + has_bias + has_residual)),
        keywords=present("residual" if has_residual else None, "rng"),
    )


@PROFILE
@given(data=st.data(), transpose_a=st.booleans(), transpose_b=st.booleans(), batch=st.integers(0, 3))
def test_products_of_small_integers_are_exact(device, data, transpose_a, transpose_b, batch):
    """Matrices of any layout, within larger matrices, k split or not: whatever is read or written askew shows."""
    m, n = data.draw(columns, "m"), data.draw(columns, "n")
    k = data.draw(st.one_of(st.just(0), columns, st.integers(256, 700)), "k")
    dtype, splits = data.draw(dtypes, "dtype"), data.draw(st.sampled_from([None, 1, 2, 5]), "splits")
    out = data.draw(st.sampled_from([F32, dtype]), "out")
    sizes = ((k, m) if transpose_a else (m, k), (n, k) if transpose_b else (k, n), (m, n))
    arrays, places = [], []
    for i, ((height, width), kind) in enumerate(zip(sizes, (dtype, dtype, out), strict=True)):
        before, beside = (data.draw(st.sampled_from([0, 3, 8]), name) for name in ("before", "beside"))
        whole = integers(batch, height, before + width + beside, dtype=kind, seed=i)
        arrays.append(whole)
        places.append(Matrix(i, kind, height, width, stride=whole.shape[2], offset=before, batch_stride=whole[:1].size))
    windows = [x[:, :, place.offset : place.offset + place.columns] for x, place in zip(arrays, places, strict=True)]
    expected = exact_product(*windows[:2], transpose_a, transpose_b)
    ran = 0
    for variant in VARIANTS:
        try:
            choose_variant(device.info, dtype, variant)
            options = {"transpose_a": transpose_a, "transpose_b": transpose_b, "batch": batch, "splits": splits}
            plan = plan_gemm(device.info, *places, **options, scratch=3, variant=variant)
        except (FeatureError, ValueError):  # a cooperative family that the device lacks, or that wants other places
            assert variant != "plain"
            continue
        (result,) = execute_plan(device, plan, arrays[:2], arrays[2])
        after = arrays[2].copy()
        after[:, :, places[2].offset : places[2].offset + n] = expected.astype(out)
        assert_exact(result, after)
        ran += 1
    assert ran


@PROFILE
@given(lead=leading, d=norm_columns, dtype=dtypes, epsilon=st.sampled_from([1e-5, 1e-6, 1e-2]))
def test_layer_norm(lead, d, dtype, epsilon):
    def operands(seed):
        return numbers((*lead, d), dtype, seed), 1 + numbers((d,), F32, seed + 1, 0.1), numbers((d,), F32, seed + 2)

    assert_accurate("layer_norm", operands, parameters={"epsilon": epsilon})


@PROFILE
@given(lead=leading, d=norm_columns, dtype=dtypes, rate=rates, site=sites)
def test_residual_layer_norm(lead, d, dtype, rate, site):
    def operands(seed):
        x, branch = (numbers((*lead, d), dtype, seed + i) for i in range(2))
        return x, branch, 1 + numbers((d,), F32, seed + 2, 0.1), numbers((d,), F32, seed + 3), RNG

    assert_accurate("residual_layer_norm", operands, parameters={"dropout_rate": rate, "site": site})


@PROFILE
@given(
    batch=st.integers(0, 3),
    length=st.one_of(rows, st.sampled_from([63, 64, 65, 130])),
    heads=st.integers(0, 3),
    head_dim=st.one_of(head_dims, st.sampled_from([0, MAX_HEAD_DIM + 1])),
    dtype=dtypes,
    scale=st.one_of(st.none(), st.floats(0.01, 1)),
    cap_and_rate=caps_and_rates,
    site=sites,
    packed=st.booleans(),
)
def test_attention(batch, length, heads, head_dim, dtype, scale, cap_and_rate, site, packed):
    cap, rate = cap_and_rate
    op, operation = ("packed_attention", ops.packed_attention) if packed else ("attention", ops.attention)

    def operands(seed):
        qkv = [numbers((batch, length, heads, head_dim), dtype, seed + i) for i in range(3)]
        return (np.stack(qkv, axis=2), RNG) if packed else (*qkv, RNG)

    parameters = {"scale": scale, "cap": cap, "dropout_rate": rate, "site": site}
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        event("refused")
        assert_refused(lambda: operation(*operands(0), **parameters), f"from 1 to 128, found {head_dim}")
        return
    assert_accurate(op, operands, parameters=parameters)


@PROFILE
@given(shape=shapes, dtype=dtypes, spread=st.sampled_from([0.1, 1.0, 8.0]))
def test_gelu(shape, dtype, spread):
    assert_accurate("gelu", lambda seed: (numbers(shape, dtype, seed, spread),))


@PROFILE
@given(shape=shapes, dtype=dtypes, rate=dropping_rates, site=sites)
def test_dropout(shape, dtype, rate, site):
    assert_accurate(
        "dropout",
        lambda seed: (numbers(shape, dtype, seed), RNG),
        parameters={"rate": rate, "site": site},
    )


@PROFILE
@given(
    table_rows=st.one_of(st.integers(1, 20), st.sampled_from([255, 256, 257, 700])),
    d=columns,
    lead=leading,
    dtype=dtypes,
    ids_dtype=st.sampled_from([np.int32, np.uint32]),
)
def test_embedding(table_rows, d, lead, dtype, ids_dtype):
    """Ids outside the table among them."""

    def operands(seed):
        ids = np.random.default_rng(seed).integers(-1, table_rows + 2, lead)
        return numbers((table_rows, d), dtype, seed), ids.astype(ids_dtype)

    assert_accurate("embedding", operands)


@PROFILE
@given(
    n=rows,
    d=st.one_of(st.just(0), columns),
    vocab=columns,
    dtype=dtypes,
    ignored=st.floats(0, 1),
    transposed=st.booleans(),
)
def test_linear_cross_entropy(n, d, vocab, dtype, ignored, transposed):
    def operands(seed):
        random = np.random.default_rng(seed)
        targets = np.where(random.random(n) < ignored, ops.IGNORED, random.integers(0, vocab, n))
        x, w = numbers((n, d), dtype, seed), numbers((d, vocab), dtype, seed + 1, 1 / math.sqrt(max(d, 1)))
        return x, w.T.copy() if transposed else w, targets.astype(np.int32)

    assert_accurate("linear_cross_entropy", operands, parameters={"transposed": transposed})


@PROFILE
@given(arrays=st.lists(st.tuples(shapes, dtypes), max_size=20), spread=st.sampled_from([1e-3, 1.0, 1e3]))
def test_global_norm(arrays, spread):
    assert_accurate(
        "global_norm",
        lambda seed: tuple(numbers(shape, dtype, seed + i, spread) for i, (shape, dtype) in enumerate(arrays)),
    )


@PROFILE
@given(
    parameters=st.lists(st.tuples(shapes, st.booleans()), max_size=4),
    dtype=dtypes,
    clip_norm=st.one_of(st.none(), st.floats(0.01, 100)),
    betas=st.tuples(st.floats(0.5, 0.99), st.floats(0.5, 0.999)),
    weight_decay=st.floats(0, 0.5),
    count=st.integers(0, 100_000),
    loss=st.sampled_from([2.5, math.nan, math.inf]),
    shadow=st.booleans(),
)
def test_adamw(parameters, dtype, clip_norm, betas, weight_decay, count, loss, shadow):
    def operands(seed):
        kinds = ((F32, 0.1), (dtype, 1.0), (F32, 0.1), (F32, 0.1))  # parameters, gradients, moments
        arrays = [
            numbers(shape, kind, seed + i, spread) for i, (kind, spread) in enumerate(kinds) for shape, _ in parameters
        ]
        nus = 3 * len(parameters)
        scalars = np.int32(count), np.float32(1e-3), np.float32(loss)
        return (*arrays[:nus], *map(np.square, arrays[nus:]), *scalars)

    static = {"b1": betas[0], "b2": betas[1], "epsilon": 1e-8, "weight_decay": weight_decay, "clip_norm": clip_norm}
    decay = tuple(decays for _, decays in parameters)
    assert_accurate("adamw", operands, parameters={**static, "decay": decay, "shadow": shadow})


# Dropout draws the documented bits, in every operation that drops, for any seed, step, site and rate.


def dropped_ones(x, rng, rate, site):
    return ops.dropout(x, rng, rate=rate, site=site)


def product_with_identity(x, rng, rate, site):
    return ops.matmul(x, jnp.eye(x.shape[1]), rng=rng, dropout_rate=rate, site=site)


def branch_alone(x, rng, rate, site):
    scale = jnp.ones(x.shape[1])
    return ops.residual_layer_norm(jnp.zeros_like(x), x, scale, scale, rng, dropout_rate=rate, site=site)[0]


def weights_of_attention(v, rng, rate, site):
    """The weights: the result where v is the identity, and, transposed, v's gradient where the result's is."""
    zeros = jnp.zeros_like(v)
    return ops.attention(zeros, zeros, v, rng, cap=30.0, dropout_rate=rate, site=site)


def assert_drops(implementation, function, x, kept, rng, rate, site, transposed=None):
    """`function` and its gradient are zero where the documented bits of the grid of `kept` say so."""

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def both(x, rng):
        y, pullback = jax.vjp(lambda x: function(x, rng, rate, site), x)
        return y, *pullback(x)

    with use(implementation):
        y, gradient = both(x, np.array(rng, np.uint32))
    np.testing.assert_array_equal(np.asarray(y) != 0, kept)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, kept if transposed is None else transposed)


def kept_bits(rng, rate, site, grid):
    return random_bits(np.array(rng, np.uint32), site, grid) >= min(round(rate * 2**16), 2**16 - 1)


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["vulkan", "xla"])
drawings = st.tuples(st.tuples(sites, sites), st.floats(0.0001, 0.99999), sites)  # rng, rate, site


@IMPLEMENTATIONS
@PROFILE
@given(
    function=st.sampled_from([dropped_ones, product_with_identity, branch_alone]),
    shape=st.tuples(st.integers(1, 40), columns),
    drawing=drawings,
)
def test_masks_are_exact(implementation, function, shape, drawing):
    kept = kept_bits(*drawing, (1, *shape))[0]
    assert_drops(implementation, function, np.ones(shape, np.float32), kept, *drawing)


@IMPLEMENTATIONS
@PROFILE
@given(batch=st.integers(1, 2), heads=st.integers(1, 3), length=head_dims, drawing=drawings)
def test_masks_of_attention_are_exact(implementation, batch, heads, length, drawing):
    identity = np.broadcast_to(np.eye(length, dtype=np.float32)[:, None], (batch, length, heads, length))
    kept = kept_bits(*drawing, (batch * heads, length, length)) & np.tril(np.ones((1, length, length), bool))
    by_query = kept.reshape(batch, heads, length, length).transpose(0, 2, 1, 3)  # (batch, query, head, key)
    by_key = kept.reshape(batch, heads, length, length).transpose(0, 3, 1, 2)
    assert_drops(implementation, weights_of_attention, identity, by_query, *drawing, transposed=by_key)


# What does not fit is refused.


def use(implementation: str):
    return vk_kernels.use(implementation, device=SELECTOR if implementation == "vulkan" else None)


def assert_refused(call: Callable[[], Any], words: str) -> None:
    """One line that names what is wrong."""
    with use("vulkan"), pytest.raises(ValueError, match=re.escape(words)) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def longer(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.zeros([n + (i == axis % x.ndim) for i, n in enumerate(x.shape)], x.dtype)


def more_axes(x: np.ndarray) -> np.ndarray:
    return x[None]


def other_dtype(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int16 if x.dtype.kind in "iu" else np.float16)


ANY = (longer(0), longer(-1), more_axes, other_dtype)

# By operation, the indices of operands, each with the changes that make it not fit the others.
SPOILS = {
    "matmul": {0: (longer(-1), other_dtype), 1: (longer(0), *ANY), 2: (longer(0), more_axes), 3: ANY, 4: ANY},
    "layer_norm": {0: (longer(-1), other_dtype), 1: (longer(0), more_axes), 2: (longer(0), more_axes)},
    "residual_layer_norm": {0: ANY, 1: ANY, 2: (longer(0), more_axes), 3: (longer(0), more_axes), 4: ANY},
    "attention": {0: ANY, 1: ANY, 2: ANY, 3: ANY},
    "packed_attention": {0: (more_axes, other_dtype), 1: ANY},
    "gelu": {0: (other_dtype,)},
    "dropout": {0: (other_dtype,), 1: ANY},
    "embedding": {0: (more_axes, other_dtype), 1: (other_dtype,)},
    "linear_cross_entropy": {0: ANY, 1: (longer(-1), more_axes, other_dtype), 2: ANY},
    "global_norm": {0: (other_dtype,)},
    "adamw": dict.fromkeys(range(12), ANY) | dict.fromkeys(range(12, 15), (more_axes, other_dtype)),
}


@settings(PROFILE, max_examples=5 * PROFILE.max_examples)
@given(data=st.data(), op=st.sampled_from(sorted(SPOILS)), dtype=dtypes, sizes=st.tuples(*[st.integers(2, 9)] * 5))
def test_an_operand_that_does_not_fit_is_refused(data, op, dtype, sizes):
    batch, length, head_dim, heads, vocab = sizes
    case = BASE[op]
    operands = list(case.operands(Sizes(batch, length, heads * head_dim, heads, vocab), dtype))
    index = data.draw(st.sampled_from(sorted(SPOILS[op])), "operand")
    change = data.draw(st.sampled_from(SPOILS[op][index]), "change")
    operands[index] = change(operands[index])
    assert_refused(lambda: jax.jit(lambda *operands: case.run(operands)).lower(*operands), op)
