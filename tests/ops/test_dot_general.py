"""Products of a user's function under `vk_kernels.jit`: their layouts, by which kernels, and which stay generated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from run_plan import BF16, F32, assert_accurate, normal
from vulkan_devices import SELECTOR, needs_vulkan, with_cooperative_matrices

import vk_kernels
from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.compiler.ir import Graph
from vk_kernels.compiler.passes.select_kernels import select_kernels
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.ops.matmul import dot_general
from vk_kernels.ops.matmul.dot_general import plan_product, takes_long
from vk_kernels.runtime.physical_device import DeviceInfo

pytestmark = [needs_vulkan, pytest.mark.usefixtures("strict_dtypes")]


@pytest.fixture
def all_by_kernels(monkeypatch):
    """Has no product be too small."""
    monkeypatch.setattr(dot_general, "takes_long", lambda *_: True)


by_kernels = pytest.mark.usefixtures("all_by_kernels")

vjit = functools.partial(vk_kernels.jit, device=SELECTOR)


def kernels(jitted, *args) -> list[str]:
    """The kernel of each dispatch: 'product' for one of products, and a generated one's operations."""
    labels = [command.label.split(" of ")[0] for command in jitted.lower(*args).program.commands]
    return ["product" if label.startswith("matmul") else label for label in labels if "matmul_finish" not in label]


# formula: (shapes, of odd sizes; what runs beside the product's own kernel).
LAYOUTS = {
    "mk,kn->mn": ((65, 70), (70, 67), []),
    "mk,nk->mn": ((65, 70), (67, 70), []),
    "km,kn->mn": ((70, 65), (70, 67), []),
    "km,nk->mn": ((70, 65), (67, 70), []),
    "mk,kn->nm": ((65, 70), (70, 67), []),  # the other way round
    "abk,kn->abn": ((5, 13, 70), (70, 67), []),
    "abm,abn->mn": ((5, 14, 65), (5, 14, 67), []),  # two axes along k
    "abm,abn->nm": ((5, 14, 65), (5, 14, 67), []),
    "mk,k->m": ((600, 701), (701,), []),
    "k,kn->n": ((701,), (701, 600), []),
    "mk,nk->mn few": ((7, 300), (130, 300), []),
    "m,n->mn": ((600,), (601,), []),
    "bmk,bkn->bmn": ((3, 41, 50), (3, 50, 45), []),
    "bkm,bnk->bmn": ((3, 50, 41), (3, 45, 50), []),
    "bmk,bkn->bnm": ((3, 41, 50), (3, 50, 45), []),
    "cbmk,cbnk->cbmn": ((2, 3, 41, 30), (2, 3, 45, 30), []),
    "mbk,kbn->bmn": ((41, 3, 50), (50, 3, 45), []),  # the batch between
    "bk,bkn->bn": ((3, 300), (3, 300, 310), []),
    "btd,bsd->bts one": ((1, 65, 70), (1, 67, 70), []),
    "bmk,bkn->mbn": ((3, 41, 50), (3, 50, 45), []),
    "bmk,bkn->nbm": ((3, 41, 50), (3, 50, 45), []),
    "td,edf->etf": ((41, 50), (3, 50, 45), []),  # a batch of one operand alone
    "td,edf->tef": ((41, 50), (3, 50, 45), []),
    "edt,df->etf": ((3, 50, 41), (50, 45), []),
    "td,dfe->tfe": ((41, 50), (50, 45, 3), []),
    "bthd,bshd->bhts": ((2, 41, 3, 30), (2, 45, 3, 30), ["transpose"]),
    "mkb,knb->bmn": ((41, 50, 3), (50, 45, 3), ["transpose"]),
}


@by_kernels
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_made_by_a_kernel_of_products(name):
    left, right, beside = LAYOUTS[name]
    formula = name.split(" ")[0]
    x, y = normal(*left), normal(*right, seed=1)
    fn = functools.partial(jnp.einsum, formula, precision="highest")
    jitted = vjit(fn)
    assert sorted(kernels(jitted, x, y)) == sorted(["product", *beside])
    exact = np.einsum(formula, x.astype(np.float64), y.astype(np.float64))
    assert_accurate(jitted(x, y), jax.jit(fn)(x, y), exact, what=name)


@by_kernels
@pytest.mark.parametrize("preferred", [None, jnp.float32])
@pytest.mark.parametrize("formula", ["mk,kn->mn", "mk,nk->mn", "km,kn->nm"])
def test_bfloat16_is_added_up_in_float32(formula, preferred):
    sizes = {"m": 65, "k": 128, "n": 67}
    x, y = (normal(*(sizes[c] for c in word), seed=i, dtype=BF16) for i, word in enumerate(formula[:5].split(",")))
    fn = functools.partial(jnp.einsum, formula, preferred_element_type=preferred)
    jitted = vjit(fn)
    assert kernels(jitted, x, y) == ["product"]
    found = jitted(x, y)
    assert found.dtype == (BF16 if preferred is None else F32)
    exact = np.einsum(formula, x.astype(np.float64), y.astype(np.float64))
    assert_accurate(found, jax.jit(fn)(x, y), exact)


@by_kernels
def test_what_is_transposed_is_read_where_it_lies():
    x, w = normal(70, 65), normal(67, 70, seed=1)
    jitted = vjit(lambda x, w: x.T @ w.T)
    assert kernels(jitted, x, w) == ["product"]
    assert_accurate(jitted(x, w), x.T @ w.T, x.T.astype(np.float64) @ w.T)


@by_kernels
def test_what_is_done_to_operands_and_results_is_one_dispatch_each():
    x, w = normal(65, 70), normal(70, 67, seed=1)
    found = kernels(vjit(lambda x, w: jnp.tanh((x * 2) @ w + 1)), x, w)
    assert [kernel == "product" for kernel in found] == [False, True, False]


@by_kernels
def test_gradients_and_second_derivatives_are_products_too():
    x, w = normal(4, 33, 70), normal(70, 67, seed=1)

    def loss(w, x):
        return jnp.sin(x @ w).sum()

    jitted = vjit(jax.grad(loss, argnums=(0, 1)))
    assert kernels(jitted, w, x).count("product") == 3
    assert len(kernels(jitted, w, x)) == 4  # the gradient of w is not transposed by a dispatch of its own
    w64, x64 = w.astype(np.float64), x.astype(np.float64)
    slopes = np.cos(x64 @ w64)
    exact = np.einsum("btk,btn->kn", x64, slopes), np.einsum("btn,kn->btk", slopes, w64)
    for ours, plain, truth in zip(jitted(w, x), jax.jit(jax.grad(loss, argnums=(0, 1)))(w, x), exact, strict=True):
        assert_accurate(ours, plain, truth, factor=3)

    def along(w, x):
        return jax.jvp(jax.grad(loss), (w, x), (w, x))[1]

    assert "dot_general" not in kernels(vjit(along), w, x)
    np.testing.assert_allclose(vjit(along)(w, x), jax.jit(along)(w, x), rtol=1e-4, atol=2e-3)


@by_kernels
@pytest.mark.parametrize(
    ("axes", "beside"),
    [((0, 0), 0), ((0, None), 0), ((None, 0), 0), ((1, 0), 0), ((2, 2), 1)],
)
def test_under_vmap(axes, beside):
    x, w = normal(41, 50), normal(50, 45, seed=1)
    batched = [x if axis is None else np.stack([x, -x, x + 1], axis) for x, axis in zip((x, w), axes, strict=True)]
    fn = jax.vmap(jnp.matmul, in_axes=axes)
    jitted = vjit(fn)
    found = kernels(jitted, *batched)
    assert (found.count("product"), len(found)) == (1, 1 + beside)
    pairs = zip(*map(rows_along, batched, axes), strict=True)
    exact = np.stack([a @ b for a, b in pairs])
    assert_accurate(jitted(*batched), jax.jit(fn)(*batched), exact)


def rows_along(x, axis):
    x = x.astype(np.float64)
    return [x] * 3 if axis is None else np.moveaxis(x, axis, 0)


@by_kernels
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("formula", ["bmk,bkn->bmn", "bkm,bnk->bmn", "mbk,kbn->bmn"])
def test_infinities_and_nan_reach_their_own_results_and_no_others(formula, dtype):
    """Sizes that no tile divides: what a kernel reads beyond a matrix, its neighbours' numbers, counts for nothing."""
    sizes = {"b": 3, "m": 41, "k": 50, "n": 45}
    words = formula[:7].split(",")
    x, y = (normal(*(sizes[c] for c in word), seed=i, dtype=dtype) for i, word in enumerate(words))
    for array, word, special in zip((x, y), words, (np.nan, -np.inf), strict=True):
        rows = np.moveaxis(array, word.index("b"), 0)
        rows[0] = special
        rows[2] = np.inf
    with np.errstate(invalid="ignore"):
        x[tuple(1 if c == "b" else 3 for c in words[0])] = np.inf
        exact = np.einsum(formula, x.astype(np.float64), y.astype(np.float64))
    found = np.asarray(vjit(functools.partial(jnp.einsum, formula))(x, y)).astype(np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    np.testing.assert_array_equal(np.where(np.isinf(found), found, 0), np.where(np.isinf(exact), exact, 0))
    assert np.isfinite(exact[1]).sum() == 40 * 45
    np.testing.assert_allclose(
        *(np.where(np.isfinite(each), each, 0) for each in (found, exact)), atol=1e-4 if dtype == F32 else 0.2
    )


def selected(info: DeviceInfo, fn, *args) -> Graph:
    """The graph of a function with kernels selected for a device, which need not be there."""
    return select_kernels(simplify(make_graph(jax.make_jaxpr(fn)(*args))), info)


def ops_of(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


SQUARE = np.ones((64, 64), np.float32)


GENERATED = {
    "a batch of small ones": (functools.partial(jnp.einsum, "bmk,bk->bm"), np.ones((64, 64, 64), F32), SQUARE),
    "out of order, and used once": (
        functools.partial(jnp.einsum, "bhd,bkhd->bhk"),
        np.ones((2, 2, 64), F32),
        np.ones((2, 1024, 2, 64), F32),
    ),
    "integers": (jnp.matmul, SQUARE.astype(np.int32), SQUARE.astype(np.int32)),
    "float16": (jnp.matmul, SQUARE.astype(np.float16), SQUARE.astype(np.float16)),
    "to a smaller type": (functools.partial(lax.dot, preferred_element_type=BF16), SQUARE, SQUARE),
}


@by_kernels
@pytest.mark.parametrize("name", GENERATED)
def test_what_stays_generated(name, device):
    fn, *args = GENERATED[name]
    assert "dot_general" in ops_of(selected(device.info, fn, *args))


def test_a_product_is_one_of_the_kernels_where_a_generated_one_takes_longer_than_a_dispatch(device):
    """As measured: on an H200 64^3 and 256 x 64 x 256 took 6.0 and 6.3 us generated, 7.3 and 7.6 us by kernels."""
    cpu = dataclasses.replace(device.info, kind="cpu")
    gpu = dataclasses.replace(device.info, kind="discrete")
    sizes = {(32, 32, 32): (False, False), (64, 64, 64): (True, False), (256, 64, 256): (True, False),
             (512, 64, 512): (True, True), (1, 768, 768): (True, True), (128, 128, 128): (True, True)}  # fmt: skip
    for (m, k, n), expected in sizes.items():
        assert (takes_long(cpu, k, m * n * k), takes_long(gpu, k, m * n * k)) == expected, (m, k, n)


@by_kernels
def test_what_a_device_cannot_hold_or_run_stays_generated(device):
    info, args = device.info, (SQUARE.astype(BF16),) * 2
    assert ops_of(selected(info, jnp.matmul, *args)) == ["matrix_product"]
    bare = dataclasses.replace(info, features=dataclasses.replace(info.features, names=frozenset()))
    assert ops_of(selected(bare, jnp.matmul, *args)) == ["dot_general"]
    small = dataclasses.replace(info, limits=dataclasses.replace(info.limits, storage_buffer_range=64 * 64 * 2 - 1))
    assert ops_of(selected(small, jnp.matmul, *args)) == ["dot_general"]


@by_kernels
def test_a_result_that_others_read_too_is_not_made_the_other_way_round(device):
    found = selected(device.info, lambda x: (x @ x, (x @ x).T), SQUARE)
    assert ops_of(found) == ["matrix_product", "transpose"]


@by_kernels
@pytest.mark.parametrize("formula", ["mk,kn->mn", "km,kn->mn", "mk,nk->mn", "mk,kn->nm"])
def test_bfloat16_runs_on_tensor_cores_where_there_are_some(formula, device):
    info = with_cooperative_matrices(device.info)
    [node] = selected(info, functools.partial(jnp.einsum, formula), *(np.ones((512, 512), BF16),) * 2).nodes
    plan = plan_product(info, [x.spec for x in node.inputs], [x.spec for x in node.outputs], **node.params)
    assert plan.dispatches[0].kernel == "matmul_coop1"


@by_kernels
def test_the_work_of_a_product_is_counted():
    assert vjit(jnp.matmul).cost(SQUARE, SQUARE).flops == 2 * 64**3
