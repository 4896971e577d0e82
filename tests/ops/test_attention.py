"""The attention kernels against float64 and the reference: tiles, heads, soft cap, dropout, gradients, odd inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from profiles import night
from run_plan import BF16, F32, assert_accurate, normal, run, same_bits
from vulkan_devices import needs_vulkan

from vk_kernels.errors import FeatureError
from vk_kernels.ops import planning
from vk_kernels.ops.attention.planner import (
    VARIANTS,
    choose_variant,
    dense,
    packed,
    plan_attention_backward,
    plan_attention_forward,
)
from vk_kernels.ops.attention.reference import attention_backward_reference, attention_forward_reference
from vk_kernels.ops.dropout import dropout_mask, dropout_scale, dropout_threshold
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import execute
from vk_kernels.runtime.features import CooperativeMatrix, Features
from vk_kernels.runtime.kernel import manifest
from vk_kernels.runtime.physical_device import list_devices
from vk_kernels.tools.op_cases import random_bits

pytestmark = [needs_vulkan, pytest.mark.usefixtures("strict_dtypes")]

RNG = np.array([1234, 77], np.uint32)
NOTHING = {}
CAP = {"cap": 3.0}
DROPOUT = {"dropout_rate": 0.3, "site": 9}

# (B, T, H, D) and options: every length and head dim at a tile's edges, in few kernels (each takes lavapipe seconds).
# 4 texts of 17 tokens: of one alone, XLA's error is small by chance.
CASES = [
    *(((2, 1, 3, 1), CAP | DROPOUT), ((2, 3, 2, 5), CAP | DROPOUT), ((4, 17, 3, 5), CAP | DROPOUT)),
    *(((1, 16, 2, 8), DROPOUT), ((2, 130, 2, 32), DROPOUT), ((1, 128, 2, 32), CAP | DROPOUT)),
    *(((1, 64, 2, 64), CAP), ((1, 65, 1, 48), CAP), ((1, 130, 1, 128), CAP | DROPOUT)),
]
# More for cooperative matrices: head dims between theirs, and softmax with and without the largest score.
COOPERATIVE_CASES = [
    *CASES,
    *(((2, 70, 2, 27), NOTHING), ((1, 130, 2, 40), {"cap": 60.0} | DROPOUT), ((2, 31, 3, 60), CAP | DROPOUT)),
    *(((1, 257, 2, 64), DROPOUT), ((1, 192, 1, 33), {"cap": 50.0}), ((1, 100, 1, 100), {"cap": 60.0})),
]
CASES, COOPERATIVE_CASES = (
    [pytest.param(*case, id="x".join(map(str, case[0]))) for case in cases] for cases in (CASES, COOPERATIVE_CASES)
)

COOPERATIVE = VARIANTS[:-1]
KINDS = [pytest.param(BF16, variant, id=variant) for variant in COOPERATIVE]
KINDS = [pytest.param(F32, "plain", id="plain"), *KINDS]


def operands(shape, dtype=F32, scale=1.0):
    """q, k, v and the gradient of out."""
    q, k, v, d_out = (normal(*shape, seed=seed).astype(dtype) for seed in range(4))
    return (q * scale).astype(dtype), (k * scale).astype(dtype), v, d_out


def drawing(options):
    return (RNG,) if "dropout_rate" in options else ()


def kept(shape, options):
    """The scaled mask of the weights, float64 (B, H, T, T)."""
    batch, length, heads, _ = shape
    if "dropout_rate" not in options:
        return np.ones((batch, heads, length, length))
    rate = options["dropout_rate"]
    bits = random_bits(RNG, options["site"], (batch * heads, length, length))
    return (bits >= dropout_threshold(rate)).reshape(batch, heads, length, length) * dropout_scale(rate)


def exact(q, k, v, d_out, options):
    """(out, lse, dq, dk, dv) in float64."""
    shape = q.shape
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    scale, cap = options.get("scale", shape[-1] ** -0.5), options.get("cap")
    scores, slopes = scale * np.einsum("bqhd,bkhd->bhqk", q, k), 1.0
    if cap is not None:
        tanh = np.tanh(scores / cap)
        scores, slopes = cap * tanh, 1 - tanh**2
    scores = np.where(sees(shape[1]), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    lse = np.log(np.exp(scores - top).sum(-1, keepdims=True)) + top
    weights, mask = np.exp(scores - lse), kept(shape, options)
    out = np.einsum("bhqk,bkhd->bqhd", weights * mask, v)
    d_weights = mask * np.einsum("bqhd,bkhd->bhqk", d_out, v)
    dots = np.einsum("bqhd,bqhd->bhq", out, d_out)[..., None]
    d_scores = weights * (d_weights - dots) * slopes * scale
    dq, dk = np.einsum("bhqk,bkhd->bqhd", d_scores, k), np.einsum("bhqk,bqhd->bkhd", d_scores, q)
    return out, lse[..., 0], dq, dk, np.einsum("bhqk,bqhd->bkhd", weights * mask, d_out)


def forward(device, q, k, v, options, **choice):
    return run(device, planner(plan_attention_forward, choice), attention_forward_reference, q, k, v, *drawing(options),
               **options)  # fmt: skip


def backward(device, q, k, v, out, lse, d_out, options, **choice):
    return run(device, planner(plan_attention_backward, choice), attention_backward_reference, q, k, v, out, lse, d_out,
               *drawing(options), **options)  # fmt: skip


def planner(plan, choice):
    """`plan` with a choice of kernels, or for a `kind` of device, which the references know nothing of."""
    variant = {name: value for name, value in choice.items() if name != "kind"}

    def chosen(info, inputs, outputs, **options):
        info = dataclasses.replace(info, kind=choice.get("kind", info.kind))
        return plan(info, inputs, outputs, **options, **variant)

    return chosen


def sees(length):
    """The causal mask."""
    return np.tri(length, dtype=bool)


@functools.partial(jax.jit, static_argnames=("scale", "cap", "dropout_rate", "site"))
def by_xla(q, k, v, d_out, rng, **options):
    """(out, lse, dq, dk, dv), the gradients by JAX's own differentiation."""
    out, pull, lse = jax.vjp(
        lambda q, k, v: attention_forward_reference(q, k, v, rng, **options), q, k, v, has_aux=True
    )
    return out, lse, *pull(d_out)


def check(device, q, k, v, d_out, options, **choice):
    """Outputs and gradients against float64, next to those of XLA; gives what the kernels gave."""
    out, lse = forward(device, q, k, v, options, **choice)
    gradients = backward(device, q, k, v, out, lse, d_out, options, **choice)
    exactly = exact(q, k, v, d_out, options)
    plain, plain_lse, *plain_gradients = by_xla(q, k, v, d_out, RNG, **options)
    assert_accurate(out, plain, exactly[0], what="out")
    assert_accurate(lse, plain_lse, exactly[1], what="lse")
    for name, found, xla, wanted in zip(("dq", "dk", "dv"), gradients, plain_gradients, exactly[2:], strict=True):
        assert_accurate(found, xla, wanted, factor=3, what=name)
    return out, lse, *gradients


def require(device, dtype, head_dim, variant):
    try:
        choose_variant(device.info, dtype, 16, head_dim, variant)
    except FeatureError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_outputs_and_gradients(device, shape, options):
    check(device, *operands(shape, scale=1.5), options)


def test_bf16(device):
    check(device, *operands((2, 70, 3, 32), BF16), CAP | DROPOUT, variant="plain")
    q, k, v, d_out = operands((1, 20, 1, 5), BF16)  # rows of an odd number of bytes / 2
    out, _ = forward(device, q, k, v, NOTHING, variant="plain")
    exactly = exact(q, k, v, d_out, NOTHING)[0]
    assert_accurate(out, by_xla(q, k, v, d_out, RNG)[0], exactly, what="out")


@pytest.mark.parametrize("variant", COOPERATIVE)
@pytest.mark.parametrize(("shape", "options"), COOPERATIVE_CASES)
def test_cooperative_matrices(device, variant, shape, options):
    require(device, BF16, 8, variant)
    inputs = operands(shape, BF16, scale=1.5)
    if shape[1] < 16:
        with pytest.raises(ValueError, match="takes 16 tokens or more"):
            check(device, *inputs, options, variant=variant)
    elif variant == "coop2" and shape[-1] > 64:
        with pytest.raises(ValueError, match="takes a head dim of up to 64"):
            check(device, *inputs, options, variant=variant)
    else:
        check(device, *inputs, options, variant=variant)


# lavapipe has 32 KiB of shared memory, enough for forward and dkv, for dq, for forward. Its compiler takes long.
@night
@pytest.mark.parametrize("head_dim", [24, 60, 128])
def test_the_tiles_of_a_gpu(device, head_dim):
    check(device, *operands((1, 70, 2, head_dim)), DROPOUT, kind="discrete")


@pytest.mark.parametrize(
    ("limits", "absent", "small"),
    [
        ({}, set(), []),
        ({"shared_memory": 31 << 10}, set(), ["attention_forward"]),
        ({"subgroup_size_range": (4, 32)}, set(), ["attention_forward"]),
        ({}, {"subgroupShuffle"}, ["attention_forward"]),
        ({}, {"computeFullSubgroups"}, ["attention_forward"]),
        ({"shared_memory": 16 << 10}, set(), ["attention_forward", "attention_dkv", "attention_dq"]),
    ],
    ids=["all", "31 KiB", "subgroups of 4", "no shuffles", "no full subgroups", "16 KiB"],
)
def test_a_gpu_gets_small_tiles_where_it_lacks_something(device, limits, absent, small):
    limits = {"shared_memory": 48 << 10, "subgroup_size_range": (8, 64)} | limits
    names = device.features.names | {"subgroupBasic", "subgroupShuffle", "computeFullSubgroups"}
    info = dataclasses.replace(
        device.info,
        kind="discrete",
        limits=dataclasses.replace(device.limits, **limits),
        features=dataclasses.replace(device.features, names=names - absent),
    )
    array, lse = ArraySpec((1, 70, 1, 32), F32), ArraySpec((1, 1, 70), F32)
    plans = [
        plan_attention_forward(info, [array] * 3, [array, lse]),
        plan_attention_backward(info, [*[array] * 4, lse, array], [array] * 3),
    ]
    variants = {made.kernel: (made.variant, made.groups[0]) for plan in plans for made in plan.dispatches}
    del variants["attention_dots"]
    tiles = dict.fromkeys(("attention_forward", "attention_dkv"), ("f32_32", 2)) | {"attention_dq": ("f32_32", 3)}
    fallback = {kernel: ("f32_32_small", 2 if kernel == "attention_dkv" else 5) for kernel in small}
    assert variants == tiles | fallback


@pytest.mark.parametrize(("dtype", "variant"), KINDS)
def test_masks_are_those_of_the_reference(device, dtype, variant):
    """Values that pick one key each show which weights are left."""
    length, heads, options = 130, 2, CAP | DROPOUT
    head_dim = 64 if variant == "coop2" else 128
    require(device, dtype, head_dim, variant)
    shape = (1, length, heads, head_dim)
    q, k, *_ = operands(shape, dtype)
    left = np.zeros((heads, length, length), bool)
    for start in range(0, length, head_dim):
        keys = range(start, min(start + head_dim, length))
        v = np.zeros(shape, dtype)
        v[0, keys, :, range(len(keys))] = 1
        out, _ = forward(device, q, k, v, options, variant=variant)
        left[:, :, keys] = np.moveaxis(out[0, :, :, : len(keys)], 1, 0) != 0
    mask = dropout_mask(jnp.asarray(RNG), options["site"], options["dropout_rate"], (heads, length, length))
    np.testing.assert_array_equal(left, np.asarray(mask) & sees(length))

    # In the gradient of v, d_out that picks a query shows its row.
    d_out = np.zeros(shape, dtype)
    d_out[0, range(head_dim), :, range(head_dim)] = 1
    lse = forward(device, q, k, v, options, variant=variant)[1]
    _, _, dv = backward(device, q, k, v, out, lse, d_out, options, variant=variant)
    rows = np.moveaxis(dv[0], 0, -1) != 0  # (H, query, key)
    np.testing.assert_array_equal(rows, left[:, :head_dim])


@pytest.mark.parametrize(("head_dim", "options"), [(8, DROPOUT), (5, CAP | DROPOUT)], ids=["uncapped", "capped"])
def test_large_scores_stay_finite(device, head_dim, options):
    """|scores| up to 10,000, which softmax turns into zeros and ones, and the soft cap into plateaus."""
    length = 33
    q, k, v, d_out = operands((1, length, 1, head_dim))
    options = options | {"scale": 1.0}
    q *= 1e4 / np.abs(np.einsum("bqhd,bkhd->bhqk", q, k)).max()
    out, lse = forward(device, q, k, v, options)
    wanted, wanted_lse, *gradients = exact(q, k, v, d_out, options)
    plain, plain_lse = jax.jit(functools.partial(attention_forward_reference, **options))(q, k, v, RNG)
    assert_accurate(out, plain, wanted, what="out")
    assert_accurate(lse, plain_lse, wanted_lse, what="lse")
    # XLA sums p dp, the kernels out d_out: the same but for rounding, which q this large makes visible in dk.
    rounding = np.finfo(F32).eps * np.abs(np.einsum("bqhd,bkhd->bhqk", d_out, v)).max() * length * np.abs(q).max()
    for found, exactly in zip(backward(device, q, k, v, out, lse, d_out, options), gradients, strict=True):
        np.testing.assert_allclose(found, exactly, rtol=1e-3, atol=rounding)


@pytest.mark.parametrize("variant", ["plain", *COOPERATIVE])
@pytest.mark.parametrize("cap", [None, 3.0, 50.0, 60.0])
def test_large_scores_of_bf16_stay_finite(device, variant, cap):
    """|scores| up to 10,000, far above the soft cap if there is one."""
    length, head_dim = 70, 32
    require(device, BF16, head_dim, variant)
    q, k, v, d_out = operands((1, length, 1, head_dim), BF16)
    q = (q * (1e4 / np.abs(np.einsum("bqhd,bkhd->bhqk", q.astype(F32), k.astype(F32))).max())).astype(BF16)
    options = {"scale": 1.0, "cap": cap} | DROPOUT
    out, lse = forward(device, q, k, v, options, variant=variant)
    wanted, wanted_lse, *exactly = exact(q, k, v, d_out, options)
    plain, plain_lse = jax.jit(functools.partial(attention_forward_reference, **options))(q, k, v, RNG)
    assert_accurate(out, plain, wanted, what="out")
    assert_accurate(lse, plain_lse, wanted_lse, what="lse")
    # XLA's gradients from the same rounded out, which large q and k make visible.
    gradients = jax.jit(functools.partial(attention_backward_reference, **options))(q, k, v, out, lse, d_out, RNG)
    found = backward(device, q, k, v, out, lse, d_out, options, variant=variant)
    for name, some, xla, truth in zip(("dq", "dk", "dv"), found, gradients, exactly, strict=True):
        assert_accurate(some, xla, truth, factor=3, what=name)


@pytest.mark.parametrize(("dtype", "variant"), KINDS)
def test_a_nan_stays_in_its_row(device, dtype, variant):
    require(device, dtype, 8, variant)
    q, k, v, d_out = operands((2, 70, 2, 8), dtype)
    q[1, 40, 1, 3] = np.nan
    out, lse = forward(device, q, k, v, DROPOUT, variant=variant)
    dq, dk, dv = backward(device, q, k, v, out, lse, d_out, DROPOUT, variant=variant)
    wanted = np.zeros((2, 70, 2), bool)
    wanted[1, 40, 1] = True
    for found in (out, lse.swapaxes(1, 2)[..., None], dq):
        np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(wanted[..., None], found.shape))
    # Keys that the row sees, and for dv keeps, have it too; for dk, 0 NaN is NaN for more keys of the same head.
    assert np.isnan(dk[1, :41, 1]).all()
    for found in (dk, dv):
        assert np.isfinite(found[0]).all()
        assert np.isfinite(found[1, :, 0]).all()
    seen = (kept(q.shape, DROPOUT)[1, 1, 40] != 0) & sees(70)[40]
    np.testing.assert_array_equal(np.isnan(dv[1, :, 1]), np.broadcast_to(seen[:, None], (70, 8)))


@pytest.mark.parametrize(("dtype", "variant"), KINDS)
@pytest.mark.parametrize("options", [CAP, NOTHING], ids=["capped", "uncapped"])
def test_nan_keys_reach_everything(device, dtype, variant, options):
    """A NaN stays one in whatever bits arithmetic leaves it; head dims are those of other tests' kernels."""
    head_dim = 64 if "cap" in options and dtype == F32 else 8
    require(device, dtype, head_dim, variant)
    q, k, v, d_out = operands((1, 40, 2, head_dim), dtype)
    k[:] = np.nan
    out, lse = forward(device, q, k, v, options, variant=variant)
    for found in (out, lse, *backward(device, q, k, v, out, lse, d_out, options, variant=variant)):
        assert np.isnan(found).all()


def run_both(device, shape, dtype, options, variant):
    """(out, lse, dq, dk, dv)."""
    q, k, v, d_out = operands(shape, dtype)
    out, lse = forward(device, q, k, v, options, variant=variant)
    return out, lse, *backward(device, q, k, v, out, lse, d_out, options, variant=variant)


@pytest.mark.parametrize(("dtype", "variant"), KINDS)
def test_two_runs_give_the_same_bits(device, dtype, variant):
    require(device, dtype, 5, variant)
    first, second = (run_both(device, (2, 40, 3, 5), dtype, CAP | DROPOUT, variant) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize(("dtype", "variant"), KINDS)
def test_more_tiles_than_workgroups_along_an_axis(device, monkeypatch, dtype, variant):
    require(device, dtype, 5, variant)
    shape = (2, 70, 2, 5)
    along_one = run_both(device, shape, dtype, CAP | DROPOUT, variant)
    monkeypatch.setattr(planning, "MAX_GROUPS", 3)
    assert same_bits(run_both(device, shape, dtype, CAP | DROPOUT, variant), along_one)


def test_workgroups_fold_over_two_axes(device):
    info = dataclasses.replace(device.info, kind="cpu")  # tiles of 16 queries or 64 keys
    array, lse = ArraySpec((4096, 1024, 25, 64), BF16), ArraySpec((4096, 25, 1024), F32)
    forward_plan = plan_attention_forward(info, [array] * 3, [array, lse], variant="plain")
    backward_plan = plan_attention_backward(info, [*[array] * 4, lse, array], [array] * 3, variant="plain")
    for dispatch, tiles in zip((*forward_plan.dispatches, *backward_plan.dispatches[1:]), (64, 16, 64), strict=True):
        x, y, z = dispatch.groups
        assert max(x, y) <= 65_535
        assert z == 1
        assert 0 <= x * y - 4096 * 25 * tiles < x


@pytest.mark.parametrize(("dtype", "variant"), KINDS)
@pytest.mark.parametrize("head_dim", [8, 20])
def test_q_k_and_v_in_one_buffer(device, dtype, variant, head_dim):
    """Views of (B, T, 3, H, D), for the operands and for their gradients."""
    require(device, dtype, head_dim, variant)
    shape = (2, 35, 3, head_dim)
    q, k, v, d_out = operands(shape, dtype)
    out, lse, *gradients = run_both(device, shape, dtype, DROPOUT, variant)
    assert packed(shape)[0] != dense(shape)

    together, rng = ArraySpec((2, 35, 3, 3, head_dim), dtype), ArraySpec((2,), np.dtype(np.uint32))
    outputs = [ArraySpec(shape, dtype), ArraySpec((2, 3, 35), F32)]
    qkv, drawn = device.upload(np.stack([q, k, v], axis=2)), device.upload(RNG)
    results = [device.buffer(output.nbytes) for output in outputs]
    options = DROPOUT | {"views": packed(shape), "variant": variant}
    plan = plan_attention_forward(device.info, [*[together] * 3, rng], outputs, **options)
    execute(device, plan, [*[qkv] * 3, drawn], results)
    found = [result.read(output.dtype, output.shape) for result, output in zip(results, outputs, strict=True)]
    assert same_bits(found, (out, lse))

    d_qkv = device.upload(np.full(together.shape, np.nan, dtype))
    inputs = [*[together] * 3, *outputs, outputs[0], rng]
    plan = plan_attention_backward(device.info, inputs, [together] * 3, **options)
    execute(device, plan, [*[qkv] * 3, *results, device.upload(d_out), drawn], [d_qkv] * 3)
    assert same_bits([d_qkv.read(dtype, together.shape)], [np.stack(gradients, axis=2)])


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)])
def test_nothing_to_do(device, shape):
    q, k, v, d_out = operands(shape)
    out, lse = forward(device, q, k, v, DROPOUT)
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[2], shape[1])
    assert [x.shape for x in backward(device, q, k, v, out, lse, d_out, DROPOUT)] == [shape] * 3


@pytest.mark.parametrize(
    ("head_dim", "dtype", "choice", "message"),
    [
        (129, F32, {}, "the head dim of attention must be from 1 to 128, found 129"),
        (0, F32, {}, "the head dim of attention must be from 1 to 128, found 0"),
        (8, np.dtype(np.float16), {}, r"the kernels take float32 or bfloat16, found float16\[1,2,1,8\]"),
        (8, F32, {"variant": "fast"}, "attention variant must be one of coop2, coop1, plain, found 'fast'"),
        (8, F32, {"variant": "coop1"}, "attention variant 'coop1' multiplies bfloat16, found float32"),
        (8, F32, {"variant": "coop2"}, "attention variant 'coop2' multiplies bfloat16, found float32"),
        (8, F32, {"dropout_rate": 1.0}, r"dropout rate must be in \[0, 1\), found 1.0"),
    ],
)
def test_what_there_is_no_kernel_for(device, head_dim, dtype, choice, message):
    array, lse = ArraySpec((1, 2, 1, head_dim), dtype), ArraySpec((1, 1, 2), F32)
    rng = ArraySpec((2,), np.dtype(np.uint32))
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan_attention_forward(device.info, [array] * 3 + [rng], [array, lse], **{"scale": 1.0} | choice)
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan_attention_backward(device.info, [*[array] * 4, lse, array, rng], [array] * 3, **{"scale": 1.0} | choice)


def test_a_variant_that_the_device_lacks():
    info = next((info for info in list_devices() if "cooperativeMatrix" not in info.features), None)
    if info is None:
        pytest.skip("every device here has cooperative matrices")
    assert choose_variant(info, BF16, 16, 64) == "plain"
    for variant in COOPERATIVE:
        with pytest.raises(FeatureError, match=rf"attention variant '{variant}': .* lacks .*cooperativeMatrix"):
            choose_variant(info, BF16, 16, 64, variant)


def imagined(info, lacks=(), sizes=(16, 16, 16), flexible=(16, 16, 16), subgroups=(32, 32), shared_memory=48 << 10):
    """A device with everything for cooperative matrices but `lacks`, with products of `sizes`, or multiples of
    `flexible`, by a subgroup."""
    types = ("bf16", "bf16", "f32", "f32", "subgroup", 0)
    needed = {
        feature
        for name, record in manifest().items()
        if name.startswith("attention") and "coop" in name
        for feature in record["features"]
    }
    features = Features(
        frozenset(info.features.names | needed | {"cooperativeMatrixFlexibleDimensions"}) - set(lacks),
        (CooperativeMatrix(*sizes, *types),),
        (CooperativeMatrix(*flexible, *types),),
    )
    limits = {"subgroup_size_range": subgroups, "shared_memory": shared_memory}
    return dataclasses.replace(info, features=features, limits=dataclasses.replace(info.limits, **limits))


@pytest.mark.parametrize(
    ("there", "length", "head_dim", "wanted"),
    [
        ({}, 16, 64, "coop2"),
        ({}, 16, 1, "coop2"),
        ({}, 15, 64, "plain"),
        ({}, 16, 65, "coop1"),
        ({"flexible": (16, 8, 16)}, 16, 64, "coop2"),
        ({"flexible": (32, 16, 16)}, 16, 64, "coop1"),
        ({"sizes": (16, 8, 16)}, 16, 128, "plain"),
        ({"lacks": {"cooperativeMatrixFlexibleDimensions"}}, 16, 64, "coop1"),
        ({"lacks": {"cooperativeMatrixReductions"}}, 16, 64, "coop1"),
        ({"lacks": {"shaderBFloat16CooperativeMatrix"}}, 16, 64, "plain"),
        ({"subgroups": (64, 64)}, 16, 64, "plain"),
        ({"shared_memory": 16 << 10}, 16, 64, "plain"),
        ({"shared_memory": 32 << 10}, 16, 64, "plain"),
        ({"shared_memory": 32 << 10}, 16, 32, "coop2"),
        ({"shared_memory": 48 << 10}, 16, 64, "coop2"),
    ],
)
def test_the_variant_that_a_device_gets(device, there, length, head_dim, wanted):
    info = imagined(device.info, **there)
    assert choose_variant(info, BF16, length, head_dim) == wanted
    assert choose_variant(info, F32, length, head_dim) == "plain"


@pytest.mark.parametrize(("cap", "bounded"), [(None, False), (50.0, True), (60.0, False)])
def test_the_plans_of_cooperative_matrices(device, cap, bounded):
    info = imagined(device.info)
    array, lse = ArraySpec((2, 100, 3, 64), BF16), ArraySpec((2, 3, 100), F32)
    for variant in COOPERATIVE:
        (only,) = plan_attention_forward(info, [array] * 3, [array, lse], cap=cap, variant=variant).dispatches
        assert only.variant == f"{variant}_64"
        wanted = {"ALIGNED": True, "SOFT_CAP": cap is not None, "DROPOUT": False, "BOUNDED": bounded}
        assert dict(only.spec) == wanted | ({"WHOLE": False} if variant == "coop2" else {})
        assert (only.groups, only.subgroup_size) == ((2 * 3 * (1 if variant == "coop2" else 2), 1, 1), 32)
        plan = plan_attention_backward(
            info, [*[array] * 4, lse, array], [array] * 3, cap=cap, variant=variant, views=packed((2, 100, 3, 62))
        )
        assert plan.scratch == (4 * 2 * 3 * 100,)
        kernels = [made.kernel for made in plan.dispatches]
        assert kernels == (["attention_dq", "attention_dkv"] if variant == "coop2" else
                           ["attention_dots", "attention_dkv", "attention_dq"])  # fmt: skip
        assert not dict(plan.dispatches[-1].spec)["ALIGNED"]  # rows of 186 elements
        dots = 9
        for made in plan.dispatches:
            record = manifest()[f"{made.kernel}.{made.variant}"]
            names = {binding["binding"]: binding["writable"] for binding in record["bindings"]}
            assert names[made.operands.index(dots)] == (made.kernel == kernels[0])


@pytest.mark.parametrize(
    ("shape", "whole"),
    [
        ((1, 128, 2, 64), [True, True, True]),
        ((1, 96, 2, 64), [True, True, False]),  # no multiple of the 64 queries that attention_dkv takes at a time
        ((1, 100, 2, 64), [False, False, False]),
        ((1, 128, 2, 62), [False, False, False]),
        ((1, 128, 2, 60), [False, False, False]),
    ],
)
def test_tiles_are_whole_where_all_that_they_have_is_inside(device, shape, whole):
    info = imagined(device.info)
    array, lse = ArraySpec(shape, BF16), ArraySpec((shape[0], shape[2], shape[1]), F32)
    forward = plan_attention_forward(info, [array] * 3, [array, lse], variant="coop2")
    backward = plan_attention_backward(info, [*[array] * 4, lse, array], [array] * 3, variant="coop2")
    made = {made.kernel: dict(made.spec)["WHOLE"] for made in (*forward.dispatches, *backward.dispatches)}
    assert [made[f"attention_{kernel}"] for kernel in ("forward", "dq", "dkv")] == whole


@pytest.mark.parametrize(
    ("shape", "whole"),
    [((2, 128, 3, 32), True), ((1, 64, 1, 64), True), ((2, 96, 3, 32), False), ((2, 128, 3, 28), False)],
)
def test_plain_tiles_are_whole_where_all_that_they_have_is_inside(device, shape, whole):
    array, lse = ArraySpec(shape, F32), ArraySpec((shape[0], shape[2], shape[1]), F32)
    forward = plan_attention_forward(device.info, [array] * 3, [array, lse])
    backward = plan_attention_backward(device.info, [*[array] * 4, lse, array], [array] * 3)
    made = {made.kernel: dict(made.spec) for made in (*forward.dispatches, *backward.dispatches)}
    assert [made[f"attention_{kernel}"]["WHOLE"] for kernel in ("forward", "dq", "dkv")] == [whole] * 3


@pytest.mark.parametrize(("variant", "head_dim"), [("coop2", 32), ("coop1", 32), ("coop1", 64), ("plain", 64)])
def test_the_gradients_of_one_array_are_made_side_by_side(device, variant, head_dim):
    array, lse = ArraySpec((2, 100, 3, head_dim), BF16), ArraySpec((2, 3, 100), F32)
    plan = plan_attention_backward(
        imagined(device.info), [*[array] * 4, lse, array], [array] * 3, variant=variant, views=packed(array.shape)
    )
    *before, by_keys, by_queries = plan.dispatches
    assert [made.kernel for made in before] == ([] if variant == "coop2" else ["attention_dots"])
    for made, written in ((by_keys, [7, 8]), (by_queries, [6])):
        record = manifest()[f"{made.kernel}.{made.variant}"]
        writable = sorted({binding["binding"] for binding in record["bindings"] if binding["writable"]})
        assert sorted(made.disjoint_writes) == writable  # all that it writes is its own
        assert [made.operands[i] for i in writable] == written


@pytest.mark.parametrize("options", [NOTHING, CAP, DROPOUT, CAP | DROPOUT])
def test_the_backward_reference_is_the_derivative(options):
    q, k, v, d_out = operands((2, 9, 2, 5))
    out, lse, *wanted = by_xla(q, k, v, d_out, RNG, **options)
    backward_reference = jax.jit(functools.partial(attention_backward_reference, **options))
    gradients = backward_reference(q, k, v, out, lse, d_out, jnp.asarray(RNG))
    for found, exactly in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, exactly, atol=2e-6)
