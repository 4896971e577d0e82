"""Generated kernels that combine elements, against XLA: reductions, products, sorts, and whole small functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from profiles import NIGHT
from run_graph import (
    BF16,
    BOOL,
    F32,
    FLOATS,
    INTEGERS,
    SPECIAL,
    TOLERANCE,
    agree,
    graph_of,
    normal,
    run,
    sample,
)
from vulkan_devices import needs_vulkan

from vk_kernels.compiler.codegen.kernels import generate
from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.compiler.ir import Graph, Node, Value

pytestmark = needs_vulkan


# Reductions: by rows, by columns, of everything; short ones, and ones in pieces.

REDUCED = [
    ((7, 100), (1,)),
    ((7, 100), (0,)),
    ((100, 7), (0,)),
    ((3, 5, 7), (0, 2)),
    ((40, 3, 50), (0, 2)),
    ((40, 3, 50), (1,)),
    ((40, 3, 50), (0, 1, 2)),
    ((300, 33), (0,)),
    ((5000,), (0,)),
    ((3, 9001), (1,)),
    ((9001, 3), (0,)),
    ((513, 1, 70), (0,)),
    ((1, 1), (0, 1)),
    ((70, 300, 2), (1,)),
]
# Sums take the paths of all others; every kind of reduction is in every path of one kernel, those that carry other
# types through memory also in pieces, whose kernels take lavapipe long, and the rest where there is time.
OF_EVERY_KIND = [((7, 100), (1,)), ((7, 100), (0,)), ((3, 5, 7), (0, 2))]
IN_PIECES = [((3, 9001), (1,)), ((9001, 3), (0,))]


@pytest.mark.parametrize(("shape", "axes"), REDUCED, ids=str)
def test_reductions_over_axes(device, shape, axes):
    x = normal(*shape)

    def sums(x):
        return x.sum(axes), (x * x + 1).sum(axes), jnp.exp(x).mean(axes)

    for found, expected in zip(run(device, sums, x), sums(x.astype(np.float64)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * x.size**0.5)

    def exact(x):
        i = (100 * x).astype(np.int32)
        found = [x.max(axes), x.min(axes), (x > 2).any(axes), (x > -3).all(axes), i.sum(axes), i.max(axes)]
        found += [lax.reduce_and(i, axes), lax.reduce_or(i, axes), lax.reduce_xor(i, axes)]
        found += [
            x.argmax(axes[0]),
            x.argmin(axes[0]),
            (i // 50).argmax(axes[-1]),
            (i // 50).argmin(axes[-1]),
        ]
        return found

    def of_every_type(x):
        return x.max(axes), (x > 2).any(axes), lax.reduce_xor((100 * x).astype(np.int32), axes), x.argmin(axes[0])

    if NIGHT or (shape, axes) in OF_EVERY_KIND:
        agree(device, exact, x)
        agree(device, lambda x: jnp.prod(1 + x / 1000, axes), x, tolerance=1e-5)
    elif (shape, axes) in IN_PIECES:
        agree(device, of_every_type, x)


SHORT = [(9, 13), (5, 400)]
# In registers floats are f32 and integers of 32 bits: of the large kernels, which take seconds to compile, a few types
# are enough.
OF_SOME = [np.dtype(t) for t in (np.int8, np.uint16, np.int32)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, dtype) for shape in SHORT for dtype in (*FLOATS, *INTEGERS)),
        *(((400, 5), dtype) for dtype in (*FLOATS, *(INTEGERS if NIGHT else OF_SOME))),
        *(((6000,), dtype) for dtype in ((*FLOATS, *INTEGERS) if NIGHT else (F32, BF16, *OF_SOME[1:]))),
    ],
    ids=str,
)
def test_reductions_of_every_dtype(device, dtype, shape):
    x = sample(*shape, dtype=dtype)

    def fn(x):
        tops = [
            lax.reduce_max(x, (0,)),
            lax.reduce_min(x, (0,)),
            lax.argmax(x, 0, np.int32),
            lax.argmin(x, 0, np.uint32),
        ]
        return (*tops, lax.reduce_sum(x, (0,))) if dtype in INTEGERS else tops

    agree(device, fn, x)
    if dtype in FLOATS:
        (found,) = run(device, lambda x: lax.reduce_sum(x, (0,)), x)
        expected = x.astype(np.float64).sum(0)
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=TOLERANCE[dtype], atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 20), (3, 500), (5000,)], ids=str)
def test_nan_and_infinities_in_reductions(device, shape):
    x = normal(*shape)
    x[..., 7], x[..., 11] = np.inf, -np.inf
    y, z = x.copy(), np.full(shape, -np.inf, np.float32)
    y[..., 13], y[..., 17] = np.nan, np.nan

    def fn(a):
        return a.max(-1), a.min(-1), a.argmax(-1), a.argmin(-1), a.sum(-1), jnp.isnan(a).any(-1)

    for a in (x, y, z):
        agree(device, fn, a)


@pytest.mark.parametrize(
    ("shape", "dtype"),  # bfloat16 in few: how its rows are gone over does not follow from it
    [*((shape, F32) for shape in [(6, 9), (33, 70), (4, 1000), (300, 7)]), ((33, 70), BF16), ((4, 1000), BF16)],
    ids=str,
)
def test_reductions_with_what_surrounds_them(device, shape, dtype):
    x = normal(*shape, dtype=dtype)
    scale = normal(shape[1], dtype=dtype, seed=1)

    def softmax(x, scale):
        return jax.nn.softmax(x * scale[None]), jax.nn.log_softmax(x), jax.nn.logsumexp(x, axis=-1)

    def layer_norm(x, scale):
        y = x.astype(F32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        return ((y - mean) * lax.rsqrt(variance + 1e-5)).astype(dtype) * scale[None], mean[:, 0], variance

    def loss(x, scale):
        return (jax.nn.softmax(x.astype(F32)) * scale[None].astype(F32)).sum(), x.astype(F32).sum(0) * scale.astype(F32)

    def columns(x, scale):
        y = x.astype(F32)
        return (y / (1 + jnp.abs(y).sum(0, keepdims=True))).astype(dtype), y.max(0) - y.min(0)

    tolerance = 1e-5 if dtype == F32 else 0.05
    for fn in (softmax, layer_norm, loss, columns):
        agree(device, fn, x, scale, tolerance=tolerance * (shape[0] if fn is loss else 1))


def test_norm_of_many_arrays_and_their_update(device):
    """The clip by global norm: reductions of many geometries into one scalar, then many arrays of many shapes."""
    arrays = [
        normal(*shape, seed=i) for i, shape in enumerate([(3,), (64, 40), (5000,), (7, 1), (300, 80), (), (2, 3, 4)])
    ]

    def fn(*xs):
        norm = jnp.sqrt(sum((x**2).sum() for x in xs))
        return norm, *(x * jnp.minimum(1, 1 / norm) for x in xs)

    agree(device, fn, *arrays, tolerance=1e-6)
    generated = generate(graph_of(fn, *arrays)[0])
    assert len(generated.kernels) <= 3


def test_the_same_bits_every_time(device):
    x = normal(200, 333)
    fns = lambda x: (x.sum(), x.sum(0), x.sum(1), jax.nn.softmax(x), x.at[:, 0].add(1).mean())  # noqa: E731
    first, second = run(device, fns, x), run(device, fns, x, check=False)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32)], ids=str)
def test_running_reductions(device, dtype):
    x = sample(5, 37, dtype=dtype) if dtype in FLOATS else np.arange(185, dtype=dtype).reshape(5, 37) - 90
    for axis in (0, 1):
        for reverse in (False, True):
            functions = [lax.cumsum, lax.cummax, lax.cummin]
            functions += [lax.cumprod, *([lax.cumlogsumexp] if dtype in FLOATS else [])] if axis == 0 else []
            tolerance = {F32: 1e-5, BF16: 0.05}.get(dtype)

            def fn(x, functions=functions, axis=axis, reverse=reverse):
                return [f(x, axis=axis, reverse=reverse) for f in functions]

            agree(device, fn, x, tolerance=tolerance)


PRODUCTS = [
    ((4, 5), (5, 6), ((1,), (0,)), ((), ())),
    ((5, 4), (6, 5), ((0,), (1,)), ((), ())),
    ((3, 4, 5), (3, 5, 2), ((2,), (1,)), ((0,), (0,))),
    ((4, 3, 5), (5, 2, 3), ((2,), (0,)), ((1,), (2,))),
    ((2, 3, 4), (4, 3, 5), ((1, 2), (1, 0)), ((), ())),
    ((7,), (7,), ((0,), (0,)), ((), ())),
    ((2, 3), (4,), ((), ()), ((), ())),
    ((2, 0), (0, 3), ((1,), (0,)), ((), ())),
    ((65, 130), (130, 33), ((1,), (0,)), ((), ())),
]


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32), np.dtype(np.int8)], ids=str)
@pytest.mark.parametrize(("left", "right", "contracted", "batch"), PRODUCTS, ids=str)
def test_products(device, left, right, contracted, batch, dtype):
    """Products of small integers, which are exact in every order."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, size=shape).astype(dtype) for shape in (left, right))
    preferred = F32 if dtype in FLOATS else np.int32
    numbers = (contracted, batch)
    agree(device, lambda a, b: lax.dot_general(a, b, numbers, preferred_element_type=preferred) * 2, a, b)


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32), np.dtype(np.uint8), BOOL], ids=str)
@pytest.mark.parametrize("shape", [(1,), (300,), (3, 65), (64, 3)], ids=str)
def test_sorts(device, dtype, shape):
    x = sample(*shape, dtype=dtype)
    if dtype in FLOATS and shape == (300,):
        x[:16] = SPECIAL.astype(dtype)
    carried = np.arange(x.size, dtype=np.int32).reshape(shape)

    def fn(x, carried):
        found = []
        for axis in range(x.ndim):
            found += [lax.sort(x, axis), lax.sort((x, carried), axis, num_keys=1), jnp.argsort(x + x, axis)]
            found.append(lax.sort(((carried // 7) % 3, x, carried), axis, num_keys=2))
        return found

    agree(device, fn, x, carried)


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.int32)], ids=str)
def test_top_k(device, dtype):
    agree(device, lambda x: (lax.top_k(x, 5), lax.top_k(x * 2, 1)), sample(3, 401, dtype=dtype))


def test_sampling_from_logits(device):
    """Temperature, top-k by a threshold, softmax and a draw by inversion, as one program."""

    def fn(logits, u):
        scaled = logits / 0.8
        least = lax.top_k(scaled, 10)[0][:, -1:]
        p = jax.nn.softmax(jnp.where(scaled < least, -1e30, scaled))
        return (jnp.cumsum(p, -1) < u[:, None]).sum(-1), p

    agree(device, fn, normal(3, 301), np.array([0.1, 0.5, 0.93], np.float32), tolerance=1e-6)


def test_memory_that_may_be_shared():
    def fn(x, y):
        return x + y, (x * 2)[::-1], y.astype(np.int32)

    graph, _ = graph_of(fn, normal(8), normal(8))
    assert generate(graph).in_place == {(1, 0), (1, 1), (1, 2)}  # x is read in another place too


def test_what_has_no_kernel_is_refused():
    x, y = Value((3, 3), F32), Value((3, 3), F32)
    with pytest.raises(ValueError, match="no kernel is generated for the primitive cholesky"):
        generate(Graph((x,), {}, [Node("cholesky", (x,), (y,))], (y,)))


@pytest.mark.parametrize(("size", "groups"), [(1000, 4), (700_001, 684)], ids=["few", "several a thread"])
def test_an_output_in_the_memory_of_an_input(device, size, groups):
    x, y = normal(size), normal(size, seed=1)
    generated = generate(graph_of(lambda x, y: (x * y + 1, jnp.exp(y)), x, y)[0])
    assert generated.in_place == {(0, 0), (0, 1), (1, 0), (1, 1)}
    (kernel,) = generated.kernels
    assert kernel.groups == (groups, 1, 1)
    buffers = [device.upload(x), device.upload(y)] * 2  # outputs 0 and 1 in inputs 0 and 1
    with device.pooled_recorder() as recorder:
        made = device.kernel_from_spirv(kernel.spirv, kernel.label)
        recorder.dispatch(made, [buffers[i] for i in kernel.operands], b"", kernel.groups)
        recorder.submit().wait()
    np.testing.assert_allclose(buffers[0].read(F32, (size,)), x * y + 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(buffers[1].read(F32, (size,)), np.exp(y), rtol=1e-5)


def test_a_thread_has_four_elements_of_a_large_array_however_many_arrays_stand_side_by_side():
    large, small = jax.ShapeDtypeStruct((1 << 20,), jnp.bfloat16), jax.ShapeDtypeStruct((1 << 10,), jnp.bfloat16)
    graph = make_graph(jax.make_jaxpr(lambda *xs: [lax.tanh(x * x + 1) * x for x in xs])(*[large] * 20, small))
    assert len(graph.nodes) > 64  # more than are repeated for all of them alike
    (kernel,) = generate(graph).kernels
    assert math.prod(kernel.groups) == 20 * (1 << 20) // (4 * 256) + (1 << 10) // 256


@pytest.mark.parametrize("shape", [(8192,), (9001,), (131, 77), (5, 1, 20011)], ids=str)
@pytest.mark.parametrize("axes", [None, 0], ids=["all", "first"])
def test_an_update_and_its_norms_go_over_the_arrays_once(device, shape, axes):
    """Also where the update is written over what it is made of, and where a thread's part has a ragged end."""
    if axes is not None:
        shape = (8192 + shape[0] % 1000, shape[-1] % 7 + 1)  # columns, in pieces too
    p, m, v, g = (normal(*shape, seed=i) for i in range(4))
    v = np.abs(v)

    def update(p, m, v, g):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        u = -0.01 * m / (jnp.sqrt(v) + 1e-3) - 0.001 * p
        return p + u, m, v, (p * p).sum(axes), (u * u).sum(axes)

    generated = generate(graph_of(update, p, m, v, g)[0])
    assert generated.in_place >= {(0, 0), (1, 1), (2, 2)}
    first, _ = generated.kernels
    assert first.groups == (p.size // 4096 if axes is None else 2, 1, 1)  # of the sums alone
    expected = update(*(x.astype(np.float64) for x in (p, m, v, g)))
    agree(device, update, p, m, v, g, tolerance=1e-5)

    buffers = [device.upload(x) for x in (p, m, v, g)]
    buffers += buffers[:3] + [device.upload(np.zeros_like(expected[3], F32)) for _ in range(2)]
    buffers += [device.upload(np.zeros(size, np.uint8)) for size in generated.scratch]
    with device.pooled_recorder() as recorder:
        for kernel in generated.kernels:
            made = device.kernel_from_spirv(kernel.spirv, kernel.label)
            recorder.dispatch(made, [buffers[i] for i in kernel.operands], b"", kernel.groups)
        recorder.submit().wait()
    for buffer, x in zip(buffers[4:9], expected, strict=True):
        np.testing.assert_allclose(buffer.read(F32, np.shape(x)), x, rtol=1e-5, atol=1e-6)
