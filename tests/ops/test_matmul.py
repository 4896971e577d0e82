"""The kernels of matrix products: exact on small integers, accurate with every epilogue, and the same every time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from profiles import NIGHT
from run_plan import BF16, DTYPES, F32, FILL, GUARD, assert_accurate, normal, run, same_bits
from vulkan_devices import SELECTOR, needs_vulkan

from vk_kernels.errors import FeatureError
from vk_kernels.ops import planning
from vk_kernels.ops.dropout import dropout_mask, dropout_scale, dropout_threshold
from vk_kernels.ops.gelu import gelu_forward_reference
from vk_kernels.ops.matmul import gemm
from vk_kernels.ops.matmul.gemm import (
    CPU_TILES,
    TILES,
    VARIANTS,
    Epilogue,
    Matrix,
    SoftmaxGradient,
    choose_variant,
    matrix,
    plan_column_sums,
    plan_epilogue,
    plan_gemm,
)
from vk_kernels.ops.matmul.planner import plan_matmul_backward, plan_matmul_forward
from vk_kernels.ops.matmul.reference import matmul_backward_reference, matmul_forward_reference, matmul_reference
from vk_kernels.runtime.dispatch_plan import Plan, execute

pytestmark = [needs_vulkan, pytest.mark.usefixtures("strict_dtypes")]

ON_CPU = SELECTOR == "cpu"
TYPES = [(F32, F32), (BF16, BF16), (BF16, F32)]  # of the operands and of the result
RNG = np.array([42, 7], np.uint32)  # seed, step


@pytest.fixture(params=VARIANTS)
def variant(device, request):
    """Each family of kernels that the device has."""
    try:
        return choose_variant(device.info, F32 if request.param == "plain" else BF16, request.param)
    except FeatureError as error:
        pytest.skip(str(error))


def check_dtype(variant, dtype):
    if variant != "plain" and dtype != BF16:
        pytest.skip(f"{variant} multiplies bf16")


def integers(*shape, dtype=F32, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def execute_plan(device, plan, inputs, *outputs):
    """The outputs (given as they are before) after the plan; scratch holds NaN, and nothing is written too far."""
    guard = np.full(GUARD, FILL, np.uint8)
    sources = [device.upload(x) for x in inputs]
    results = [device.upload(np.concatenate([x.reshape(-1).view(np.uint8), guard])) for x in outputs]
    scratch = [device.upload(np.full(nbytes, FILL, np.uint8)) for nbytes in plan.scratch]
    if plan.dispatches:
        execute(device, Plan(plan.dispatches), [*sources, *results, *scratch], [])
    for result, output in zip(results, outputs, strict=True):
        assert (result.read(np.uint8, (GUARD,), output.nbytes) == FILL).all(), "wrote too far"
    return [result.read(x.dtype, x.shape) for result, x in zip(results, outputs, strict=True)]


def undefined(*shape, dtype=F32):
    return np.full(shape, np.nan, dtype)


def multiply(device, a, b, dtype, transpose_a=False, transpose_b=False, **options):
    """op(a) op(b) of two batches of matrices, by `plan_gemm`."""
    m, n = a.shape[2 if transpose_a else 1], b.shape[1 if transpose_b else 2]
    plan = plan_gemm(
        device.info,
        *(matrix(i, x.dtype, *x.shape[1:]) for i, x in enumerate((a, b))),
        matrix(2, dtype, m, n),
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        batch=len(a),
        scratch=3,
        **options,
    )
    return execute_plan(device, plan, [a, b], undefined(len(a), m, n, dtype=dtype))[0]


def exact_product(a, b, transpose_a=False, transpose_b=False):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a.swapaxes(1, 2) if transpose_a else a) @ (b.swapaxes(1, 2) if transpose_b else b)


def operands(m, n, k, transpose_a, transpose_b, dtype, batch=1):
    a, b = (
        ((batch, k, m) if transpose_a else (batch, m, k)),
        ((batch, n, k) if transpose_b else (batch, k, n)),
    )
    return integers(*a, dtype=dtype), integers(*b, dtype=dtype, seed=1)


def assert_exact(actual, expected):
    """Equal to the exact product, rounded once."""
    np.testing.assert_array_equal(actual.astype(np.float64), expected.astype(actual.dtype).astype(np.float64))


NN, NT, TN, TT = ((a, b) for a in (False, True) for b in (False, True))  # which operands are transposed
PRODUCTS = [(*layout, *types) for layout in (NN, NT, TN, TT) for types in TYPES]
if ON_CPU:  # every layout and every type, but not every pair of them: each is a kernel more to compile
    PRODUCTS = [(*layout, F32, F32) for layout in (NN, NT, TN, TT)]
    PRODUCTS += [(*NT, BF16, BF16), (*TN, BF16, F32)]


@pytest.mark.parametrize(("transpose_a", "transpose_b", "dtype", "out"), PRODUCTS, ids=str)
def test_small_integers_are_exact(device, variant, transpose_a, transpose_b, dtype, out):
    check_dtype(variant, dtype)
    odd = [(1, 1, 1), (3, 17, 33), (17, 130, 1), (33, 65, 17), (65, 33, 130), (130, 3, 65)]
    for m, n, k in [*odd, (64, 40, 48), (136, 264, 72)]:
        a, b = operands(m, n, k, transpose_a, transpose_b, dtype)
        actual = multiply(device, a, b, out, transpose_a, transpose_b, variant=variant)
        assert_exact(actual, exact_product(a, b, transpose_a, transpose_b))


@pytest.mark.parametrize(("m", "n", "k"), [(36, 33, 20), (33, 36, 20), (36, 36, 17)])
def test_operands_of_which_only_some_are_aligned(device, variant, m, n, k):
    a, b = operands(m, n, k, False, False, F32 if variant == "plain" else BF16)
    assert_exact(multiply(device, a, b, F32, variant=variant), exact_product(a, b))


def every_tile(variant):
    """Tiles of the device. A processor's compiler takes minutes for a GPU's, but the small ones can load as they do."""
    if not ON_CPU:
        return TILES[variant]
    without_bounds = (tile._replace(unbounded=True) for tile in CPU_TILES if not tile.unbounded)
    return (*CPU_TILES, *without_bounds, *(TILES[variant] if NIGHT else ()))


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [NN, TT] if ON_CPU else [NN, NT, TN], ids=str)
def test_every_tile(device, variant, transpose_a, transpose_b):
    """Ragged every way; and aligned with k in whole tiles, in batches, whether it is split or not."""
    for dtype, out in TYPES[:1] if ON_CPU else TYPES:
        if variant != "plain" and dtype != BF16:
            continue
        for tile in every_tile(variant):
            if transpose_b and not tile.transposes_b:
                continue
            for m, n, k, batch, splits in [(150, 300, 90, 1, 1), (136, 264, 256, 2, 1), (136, 264, 256, 2, 2)]:
                a, b = operands(m, n, k, transpose_a, transpose_b, dtype, batch)
                options = {"variant": variant, "tile": tile, "splits": splits}
                actual = multiply(device, a, b, out, transpose_a, transpose_b, **options)
                assert_exact(actual, exact_product(a, b, transpose_a, transpose_b))


@pytest.mark.skipif(ON_CPU and not NIGHT, reason="takes long: make night runs it")
@pytest.mark.parametrize(("m", "n", "k"), [(150, 299, 90), (136, 264, 256)])
def test_every_tile_with_an_epilogue(device, variant, m, n, k):
    """The same as the epilogue by itself, of the exact product."""
    a, b = operands(m, n, k, False, False, F32 if variant == "plain" else BF16)
    sums = exact_product(a, b)[0].astype(F32) / 16
    inputs = [normal(n, seed=2), normal(m, n, seed=3), RNG]
    steps = {"bias": 2, "residual": 3, "save_pre_activation": 6, "gelu": True}
    epilogue = Epilogue(**steps, rng=4, threshold=dropout_threshold(0.25), scale=dropout_scale(0.25), site=5)
    c, outputs = matrix(5, F32, m, n), (undefined(m, n), undefined(m, n))
    plan = plan_epilogue(matrix(0, F32, m, n), c, epilogue)
    expected = execute_plan(device, plan, [sums, b, *inputs], *outputs)
    a = (a.astype(F32) / 16).astype(a.dtype)
    for tile in CPU_TILES if ON_CPU else TILES[variant]:
        places = (matrix(0, a.dtype, m, k), matrix(1, b.dtype, k, n), c)
        plan = plan_gemm(device.info, *places, epilogue=epilogue, scratch=7, variant=variant, tile=tile)
        for found, value in zip(execute_plan(device, plan, [a, b, *inputs], *outputs), expected, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("columns", "padded"), [(5, 8), (8, 16), (33, 40)])
def test_columns_that_are_missing_are_zeros(device, columns, padded):
    a = integers(7, columns, dtype=BF16)
    plan = plan_epilogue(matrix(0, BF16, 7, columns), matrix(1, BF16, 7, padded), Epilogue())
    expected = np.pad(a.astype(F32), ((0, 0), (0, padded - columns)))
    np.testing.assert_array_equal(execute_plan(device, plan, [a], undefined(7, padded, dtype=BF16))[0], expected)


def test_nothing_to_multiply(device):
    for m, n, batch in [(0, 3, 1), (3, 0, 1), (3, 3, 0)]:
        a, b = matrix(0, F32, m, 5), matrix(1, F32, 5, n)
        assert not plan_gemm(device.info, a, b, matrix(2, F32, m, n), batch=batch, scratch=3).dispatches
    assert not multiply(device, undefined(1, 3, 0), undefined(1, 0, 5), F32).any()
    columns = plan_column_sums(matrix(0, F32, 0, 5), matrix(1, F32, 1, 5), scratch=2)
    assert not execute_plan(device, columns, [undefined(0, 5)], undefined(5))[0].any()


@pytest.mark.parametrize("splits", [1, 2])
def test_a_batch(device, variant, splits):
    a, b = operands(33, 20, 70, True, False, F32 if variant == "plain" else BF16, batch=3)
    # Of 33 x 70 elements, a matrix of the batch does not start where the cooperative kernels want it to.
    a, b = (a, b) if variant == "plain" else operands(32, 24, 72, True, False, BF16, batch=3)
    assert_exact(multiply(device, a, b, F32, True, variant=variant, splits=splits), exact_product(a, b, True))


def test_a_batch_that_shares_a_matrix(device):
    a, b = operands(5, 6, 7, False, False, F32, batch=3)
    shared = Matrix(1, F32, 7, 6, stride=6, batch_stride=0)
    plan = plan_gemm(device.info, matrix(0, F32, 5, 7), shared, matrix(2, F32, 5, 6), batch=3, scratch=3)
    assert_exact(execute_plan(device, plan, [a, b[0]], undefined(3, 5, 6))[0], exact_product(a, b[:1]))


def test_parts_of_larger_matrices(device, variant):
    """A window of A times one of B onto one of C; all else of C stays."""
    dtype = F32 if variant == "plain" else BF16
    a, b, c = (
        integers(50, 64, dtype=dtype),
        integers(60, 72, dtype=dtype, seed=1),
        integers(40, 80, dtype=dtype),
    )
    windows = (
        Matrix(0, dtype, 10, 20, stride=64, offset=3 * 64 + 8),
        Matrix(1, dtype, 20, 30, stride=72, offset=2 * 72 + 16),
        Matrix(2, dtype, 10, 30, stride=80, offset=5 * 80 + 40),
    )
    plan = plan_gemm(device.info, *windows, scratch=3, variant=variant)
    expected = c.copy()
    product = exact_product(a[None, 3:13, 8:28], b[None, 2:22, 16:46])[0]
    expected[5:15, 40:70] = product.astype(dtype)
    np.testing.assert_array_equal(execute_plan(device, plan, [a, b], c)[0], expected)


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [NN, NT, TN], ids=str)
def test_what_stands_between_rows_is_not_used(device, variant, transpose_a, transpose_b):
    """Rows start aligned, and k is whole tiles; m and n are not, and NaN follows them."""
    dtype = F32 if variant == "plain" else BF16
    m, n, k = 83, 61, 128
    a, b = (x[0] for x in operands(m, n, k, transpose_a, transpose_b, dtype))
    padded = [np.pad(x, ((0, 0), (0, -x.shape[1] % 8)), constant_values=np.nan) for x in (a, b)]
    places = (Matrix(i, dtype, *x.shape, wide.shape[1]) for i, (x, wide) in enumerate(zip((a, b), padded, strict=True)))
    tile = next((tile for tile in reversed(every_tile(variant)) if tile.unbounded), None)
    options = {"transpose_a": transpose_a, "transpose_b": transpose_b, "scratch": 3, "variant": variant, "tile": tile}
    plan = plan_gemm(device.info, *places, matrix(2, F32, m, n), **options)
    expected = exact_product(a[None], b[None], transpose_a, transpose_b)[0]
    assert_exact(execute_plan(device, plan, padded, undefined(m, n))[0], expected)


@pytest.mark.parametrize(("dtype", "out"), TYPES, ids=str)
def test_split_k(device, variant, dtype, out):
    check_dtype(variant, dtype)
    for m, n, k in [(33, 20, 1000), (64, 64, 514)]:
        a, b = operands(m, n, k, True, False, dtype)
        for splits in (2, 3, 7):
            actual = multiply(device, a, b, out, True, variant=variant, splits=splits)
            assert_exact(actual, exact_product(a, b, True))


def test_long_k_is_split_and_the_same_every_time(device, variant):
    dtype = F32 if variant == "plain" else BF16
    a, b = normal(1, 3000, 24, dtype=dtype), normal(1, 3000, 40, seed=1, dtype=dtype)
    whole = (matrix(i, dtype, 3000, x.shape[2]) for i, x in enumerate((a, b)))
    plan = plan_gemm(device.info, *whole, matrix(2, F32, 24, 40), transpose_a=True, scratch=3, variant=variant)
    assert len(plan.dispatches) == 2
    first, second = (multiply(device, a, b, F32, True, variant=variant) for _ in range(2))
    assert same_bits([first], [second])
    plain = jnp.einsum("bkm,bkn->bmn", a, b, preferred_element_type=jnp.float32)
    assert_accurate(first, plain, exact_product(a, b, True))


@pytest.mark.parametrize("splits", [1, 2])
def test_accumulate(device, variant, splits):
    a, b = operands(33, 20, 70, False, False, F32 if variant == "plain" else BF16)
    before = integers(33, 20, seed=2)
    places = (matrix(0, a.dtype, 33, 70), matrix(1, b.dtype, 70, 20), matrix(2, F32, 33, 20))
    options = {"epilogue": Epilogue(accumulate=True), "splits": splits, "variant": variant, "scratch": 3}
    plan = plan_gemm(device.info, *places, **options)
    after = execute_plan(device, plan, [a, b], before)[0]
    assert_exact(after, before + exact_product(a, b)[0])


def test_more_workgroups_than_an_axis_takes(device, variant, monkeypatch):
    for module in (gemm, planning):
        monkeypatch.setattr(module, "MAX_GROUPS", 3)
    a, b = operands(72, 40, 40, False, False, F32 if variant == "plain" else BF16, batch=2)
    for splits in (1, 2):
        assert_exact(multiply(device, a, b, F32, variant=variant, splits=splits), exact_product(a, b))


def test_nan_and_infinity_stay_where_they_belong(device, variant):
    a, b = operands(37, 50, 41, False, False, F32 if variant == "plain" else BF16)
    a[0, 5, 7], b[0, 3, 9], a[0, 11, 4] = np.nan, np.nan, np.inf
    actual = multiply(device, a, b, F32, variant=variant)[0]
    with np.errstate(invalid="ignore"):
        expected = exact_product(a, b)[0]
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(actual, expected.astype(F32))


# The operation and its gradients.


@functools.cache
def gelu_in_float64(slope=False):
    def value(x):
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        t = np.tanh(inner)
        if not slope:
            return 0.5 * x * (1 + t)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)

    return value


ODD, EVEN = ((2, 19), 30, 21), ((40,), 48, 36)  # rows, K, N: nothing a multiple of 4, and all
# What is done beside the product (bias, activation, residual, dropout rate), and the shape.
EPILOGUES = [
    (False, None, False, 0.0, EVEN),
    (True, None, False, 0.0, ODD),
    (True, "gelu", False, 0.0, EVEN),
    (False, None, True, 0.3, ODD),
    (True, "gelu", True, 0.1, ODD),
    (True, "gelu", True, 0.1, EVEN),
]
WITH_EPILOGUES = pytest.mark.parametrize(
    ("dtype", "has_bias", "activation", "has_residual", "rate", "shape"),
    [(F32, *x) for x in EPILOGUES] + [(BF16, *x) for x in (EPILOGUES[-2:] if ON_CPU else EPILOGUES)],
    ids=str,
)


def problem(rows, k, n, dtype, has_bias, has_residual, rate):
    """The operands by name, of which the optional ones may be None."""
    return {
        "x": normal(*rows, k, dtype=dtype),
        "w": normal(k, n, seed=1, dtype=dtype) / np.array(np.sqrt(k), dtype),
        "bias": normal(n, seed=2, dtype=dtype) if has_bias else None,
        "residual": normal(*rows, n, seed=3, dtype=dtype) if has_residual else None,
        "rng": RNG if rate else None,
    }


def present(*arrays):
    return [x for x in arrays if x is not None]


def mask_of(rows, n, rate, site):
    """Zero where dropped, else the scale."""
    if not rate:
        return np.ones((int(np.prod(rows)), n))
    mask = dropout_mask(jnp.asarray(RNG), site, rate, (int(np.prod(rows)), n))
    return np.asarray(mask) * dropout_scale(rate)


@WITH_EPILOGUES
def test_forward(device, variant, dtype, has_bias, activation, has_residual, rate, shape):
    check_dtype(variant, dtype)
    static = {"activation": activation, "has_bias": has_bias, "has_residual": has_residual}
    static |= {"dropout_rate": rate, "site": 5}
    rows, k, n = shape
    p = problem(rows, k, n, dtype, has_bias, has_residual, rate)
    inputs = present(*p.values())
    found = run(device, plan_matmul_forward, matmul_forward_reference, *inputs, **static, variant=variant)
    x, w, bias, residual = (None if p[key] is None else p[key].astype(np.float64) for key in list(p)[:4])
    pre = x @ w + (0 if bias is None else bias)
    y = (gelu_in_float64()(pre) if activation else pre) * mask_of(rows, n, rate, 5).reshape(pre.shape)
    plain = jax.jit(functools.partial(matmul_forward_reference, **static))(*inputs)
    assert_accurate(found[0], plain[0], y + (0 if residual is None else residual), what="y")
    if activation:
        assert_accurate(found[1], plain[1], pre, what="pre-activation")


@WITH_EPILOGUES
def test_gradients(device, variant, dtype, has_bias, activation, has_residual, rate, shape):
    check_dtype(variant, dtype)
    static = {"activation": activation, "has_bias": has_bias, "dropout_rate": rate, "site": 5}
    rows, k, n = shape
    p = problem(rows, k, n, dtype, has_bias, False, rate)
    dy = normal(*rows, n, seed=4, dtype=dtype)
    x, w, bias = (None if p[key] is None else p[key].astype(np.float64) for key in ("x", "w", "bias"))
    pre = x @ w + (0 if bias is None else bias)
    saved = pre.astype(dtype) if activation else None
    inputs = present(dy, p["x"], p["w"], saved, p["rng"])
    found = run(device, plan_matmul_backward, matmul_backward_reference, *inputs, **static, variant=variant)

    dsums = dy.astype(np.float64) * mask_of(rows, n, rate, 5).reshape(dy.shape)
    dsums = (dsums * gelu_in_float64(slope=True)(pre) if activation else dsums).reshape(-1, n)
    exact = [(dsums @ w.T).reshape(x.shape), x.reshape(-1, k).T @ dsums]
    exact += [dsums.sum(axis=0)] if has_bias else []

    def loss(x, w, bias, rng=p["rng"]):
        return matmul_reference(x, w, bias, activation=activation, rng=rng, dropout_rate=rate, site=5)

    plain = jax.jit(lambda dy, *xs: jax.vjp(loss, *xs)[1](dy))(dy, p["x"], p["w"], p["bias"])
    explicit = jax.jit(functools.partial(matmul_backward_reference, **static))(*inputs)
    for name, actual, automatic, reference, value in zip(
        ("dx", "dw", "dbias"), found, plain, explicit, exact, strict=False
    ):
        assert_accurate(actual, automatic, value, 3, name)
        assert_accurate(reference, automatic, value, 3, f"{name} of the reference")
    assert len(found) == 2 + has_bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_masks_are_the_reference_ones(device, variant, dtype):
    check_dtype(variant, dtype)
    drawing = {
        "activation": None,
        "has_bias": False,
        "dropout_rate": 0.5,
        "site": 9,
    }  # a scale of exactly 2
    for rows, n in [(37, 21), (40, 64)]:
        mask = np.asarray(dropout_mask(jnp.asarray(RNG), 9, 0.5, (rows, n)))
        x, w = np.ones((rows, 3), dtype), np.ones((3, n), dtype)
        options = {**drawing, "has_residual": False, "variant": variant}
        y = run(device, plan_matmul_forward, matmul_forward_reference, x, w, RNG, **options)[0]
        np.testing.assert_array_equal(y, (6 * mask).astype(dtype))
        dy, x = np.ones((rows, n), dtype), np.eye(rows, dtype=dtype)
        inputs = (dy, x, np.ones((rows, n), dtype), RNG)
        options = {**drawing, "variant": variant}
        dw = run(device, plan_matmul_backward, matmul_backward_reference, *inputs, **options)[1]
        np.testing.assert_array_equal(dw, (2 * mask).astype(dtype))


def test_a_dropped_nan_is_zero(device):
    x = undefined(16, 24)
    epilogue = Epilogue(rng=1, threshold=dropout_threshold(0.5), scale=2.0, site=1)
    whole = matrix(0, F32, 16, 24)
    plan = plan_epilogue(whole, matrix(2, F32, 16, 24), epilogue)
    y = execute_plan(device, plan, [x, RNG], undefined(16, 24))[0]
    np.testing.assert_array_equal(np.isnan(y), np.asarray(dropout_mask(jnp.asarray(RNG), 1, 0.5, (16, 24))))


def test_gelu_and_its_slope_at_any_size(device):
    """Through `plan_epilogue`, as the activation's gradient is: finite far out, and accurate close by."""
    near = np.linspace(-12, 12, 4001, dtype=F32)
    far = np.array([30, 88, 1e4, 1e10, 3e38], F32)
    x = np.concatenate([near, far, -far, [np.nan, np.inf, -np.inf]]).astype(F32)[None]
    whole, out = matrix(0, F32, *x.shape), matrix(1, F32, *x.shape)
    y = execute_plan(device, plan_epilogue(whole, out, Epilogue(gelu=True)), [x], undefined(*x.shape))[0][0]
    ones = matrix(0, F32, *x.shape), matrix(2, F32, *x.shape)
    plan = plan_epilogue(*ones, Epilogue(gelu_slope_of=1))
    slope = execute_plan(device, plan, [np.ones_like(x), x], undefined(*x.shape))[0][0]
    size, count = len(near), len(far)
    np.testing.assert_allclose(y[:size], gelu_in_float64()(near.astype(np.float64)), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(slope[:size], gelu_in_float64(slope=True)(near.astype(np.float64)), atol=2e-6)
    np.testing.assert_array_equal(y[size : size + 2 * count], np.concatenate([far, 0 * far]))
    np.testing.assert_array_equal(slope[size : size + 2 * count], [1] * count + [0] * count)
    assert np.isnan([y[-3], slope[-3]]).all()
    assert y[-2] == np.inf


@pytest.mark.parametrize(("dtype", "m", "n", "k"), [(F32, 40, 64, 24), (BF16, 33, 21, 40)], ids=str)
def test_the_slope_as_the_epilogue_of_a_product(device, variant, dtype, m, n, k):
    """dY W^T times the slope of the activation before it: what fuses the gradients of two products."""
    check_dtype(variant, dtype)
    a, b, x = (
        normal(m, k, dtype=dtype),
        normal(n, k, seed=1, dtype=dtype),
        normal(m, n, seed=2, dtype=dtype),
    )
    places = matrix(0, dtype, m, k), matrix(1, dtype, n, k), matrix(3, dtype, m, n)
    options = {
        "epilogue": Epilogue(gelu_slope_of=2),
        "transpose_b": True,
        "scratch": 4,
        "variant": variant,
    }
    plan = plan_gemm(device.info, *places, **options)
    actual = execute_plan(device, plan, [a, b, x], undefined(m, n, dtype=dtype))[0]
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    exact = exact * gelu_in_float64(slope=True)(x.astype(np.float64))
    plain = jnp.einsum("mk,nk->mn", a, b, preferred_element_type=jnp.float32).astype(dtype)
    plain = jax.vjp(lambda x: jax.nn.gelu(x), x)[1](plain)[0]
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "m", "n", "columns"), [(F32, 40, 64, 61), (BF16, 33, 72, 72), (BF16, 8, 21, 19)], ids=str
)
def test_the_gradient_of_logits_as_the_epilogue_of_a_product(device, variant, dtype, m, n, columns, splits):
    """Rows from the middle of the tokens on; some ignored, some with a target past the columns."""
    check_dtype(variant, dtype)
    first, k, rng = 5, 520, np.random.default_rng(2)
    a, b = normal(m, k, dtype=dtype), normal(k, n, seed=1, dtype=dtype) / np.array(np.sqrt(k), dtype)
    targets = rng.integers(-2, columns + 2, first + m + 1).astype(np.int32)
    normalizers, dlosses = normal(len(targets), seed=3) + np.float32(4), normal(len(targets), seed=4)
    targets[first], dlosses[first + 1] = columns - 1, np.inf
    logits = exact_product(a[None], b[None])[0]
    rows = slice(first, first + m)
    hit = np.arange(n) == targets[rows, None]
    expected = (np.exp(logits - normalizers[rows, None]) - hit) * dlosses[rows, None]
    expected[(targets[rows] < 0)[:, None] | (np.arange(n) >= columns)] = 0

    places = matrix(0, dtype, m, k), matrix(1, dtype, k, n), matrix(5, dtype, m, n)
    gradient = SoftmaxGradient(targets=3, log_normalizers=2, dlosses=4, first=first, columns=columns)
    options = {"epilogue": Epilogue(softmax_gradient=gradient), "scratch": 6, "variant": variant, "splits": splits}
    plan = plan_gemm(device.info, *places, **options)
    inputs = [a, b, normalizers, targets, dlosses]
    actual = execute_plan(device, plan, inputs, undefined(m, n, dtype=dtype))[0]
    np.testing.assert_allclose(actual.astype(F32), expected, rtol=8e-3 if dtype == BF16 else 2e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rate", "shape"), [(F32, 0.0, EVEN), (F32, 0.1, ODD), (BF16, 0.1, EVEN)], ids=str)
def test_gradients_through_the_activation_of_the_input(device, variant, dtype, rate, shape):
    """dx is that of z, for x = gelu(z)."""
    check_dtype(variant, dtype)
    static = {"activation": "gelu", "has_bias": False, "dropout_rate": rate, "site": 5}
    rows, k, n = shape
    z, dy = normal(*rows, k, seed=6, dtype=dtype), normal(*rows, n, seed=4, dtype=dtype)
    p = problem(rows, k, n, dtype, False, False, rate)
    x = np.asarray(gelu_forward_reference(z))
    pre = x.astype(np.float64) @ p["w"].astype(np.float64)
    inputs = present(dy, x, p["w"], pre.astype(dtype), p["rng"], z)
    static["input_activation"] = "gelu"
    found = run(device, plan_matmul_backward, matmul_backward_reference, *inputs, **static, variant=variant)

    dsums = dy.astype(np.float64) * mask_of(rows, n, rate, 5).reshape(dy.shape) * gelu_in_float64(slope=True)(pre)
    dx = dsums @ p["w"].astype(np.float64).T * gelu_in_float64(slope=True)(z.astype(np.float64))
    exact = dx, x.reshape(-1, k).astype(np.float64).T @ dsums.reshape(-1, n)

    def through(z, w):
        return matmul_reference(
            gelu_forward_reference(z), w, activation="gelu", rng=p["rng"], dropout_rate=rate, site=5
        )

    plain = jax.jit(lambda dy, *xs: jax.vjp(through, *xs)[1](dy))(dy, z, p["w"])
    explicit = jax.jit(functools.partial(matmul_backward_reference, **static))(*inputs)
    for name, actual, automatic, reference, value in zip(("dz", "dw"), found, plain, explicit, exact, strict=True):
        assert_accurate(actual, automatic, value, 3, name)
        assert_accurate(reference, automatic, value, 3, f"{name} of the reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(device, dtype):
    for rows, columns in [(1, 1), (3, 130), (257, 33), (1030, 256)]:
        x = integers(rows, columns, dtype=dtype)
        plan = plan_column_sums(matrix(0, dtype, rows, columns), matrix(1, dtype, 1, columns), scratch=2)
        assert_exact(
            execute_plan(device, plan, [x], undefined(columns, dtype=dtype))[0],
            x.astype(np.float64).sum(axis=0),
        )


def test_zero_rows_and_columns(device):
    static = {"activation": None, "has_bias": True, "dropout_rate": 0.0, "site": 0}
    for rows, k, n in [(0, 4, 5), (3, 4, 0), (3, 0, 5)]:
        x, w, bias = normal(rows, k), normal(k, n, seed=1), normal(n, seed=2)
        forward = static | {"has_residual": False}
        y = run(device, plan_matmul_forward, matmul_forward_reference, x, w, bias, **forward)[0]
        assert y.shape == (rows, n)
        if k == 0:
            np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
        inputs = (normal(rows, n, seed=4), x, w)
        dx, dw, dbias = run(device, plan_matmul_backward, matmul_backward_reference, *inputs, **static)
        assert (dx.shape, dw.shape, dbias.shape) == ((rows, k), (k, n), (n,))
        if rows == 0:
            assert not np.concatenate([dw.ravel(), dbias]).any()


def test_the_same_bits_every_time(device, variant):
    dtype = F32 if variant == "plain" else BF16
    p = problem((70,), 130, 66, dtype, True, True, 0.1)
    static = {"activation": "gelu", "has_bias": True, "dropout_rate": 0.1, "site": 3}
    forward = functools.partial(run, device, plan_matmul_forward, matmul_forward_reference, *p.values())
    first, second = (forward(**static, has_residual=True, variant=variant) for _ in range(2))
    assert same_bits(first, second)
    inputs = (normal(70, 66, seed=4, dtype=dtype), p["x"], p["w"], first[1], RNG)
    backward = functools.partial(run, device, plan_matmul_backward, matmul_backward_reference, *inputs)
    assert same_bits(*(backward(**static, variant=variant) for _ in range(2)))
