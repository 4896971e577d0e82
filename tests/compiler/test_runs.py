"""Long runs, as cumsum's: cut into blocks, so that their time does not grow with the square of their length."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.compiler.decompositions import _LONGEST_RUN
from vk_kernels.compiler.pipeline import optimize

BF16 = ml_dtypes.bfloat16
EXACT = {
    "cumsum": np.add,
    "cumprod": np.multiply,
    "cummax": np.maximum,
    "cummin": np.minimum,
    "cumlogsumexp": np.logaddexp,
}


@pytest.mark.parametrize("length", [_LONGEST_RUN, _LONGEST_RUN + 1, 2**20, 2**30 - 1])
def test_no_element_reads_more_than_so_many_before_it(length):
    x = jax.ShapeDtypeStruct((1, length), np.float32)
    graph = optimize(jax.make_jaxpr(lambda x: lax.cumsum(x, axis=1))(x))
    lengths = [node.inputs[0].shape[node.params["axis"]] for node in graph.nodes if node.op == "cumsum"]
    assert max(lengths) <= _LONGEST_RUN
    assert (len(lengths) == 1) == (length <= _LONGEST_RUN)


@needs_vulkan
@pytest.mark.parametrize(
    ("name", "dtype", "shape", "axis", "reverse"),
    [
        ("cumsum", np.float32, (2, 5000), 1, False),
        ("cumsum", np.int16, (1500,), 0, True),
        ("cumprod", BF16, (1100, 2), 0, True),
        ("cummax", np.float32, (1025,), 0, False),
        ("cummin", np.uint8, (3, 2050, 1), 1, True),
        ("cumlogsumexp", np.float32, (1025,), 0, True),
    ],
)
def test_runs_are_those_of_numpy_in_float64(name, dtype, shape, axis, reverse):
    random = np.random.default_rng(5)
    is_float = np.dtype(dtype).kind not in "iu"
    x = (random.uniform(0.99, 1.01, shape) if is_float else random.integers(0, 20, shape)).astype(dtype)
    found = vk_kernels.jit(lambda x: getattr(lax, name)(x, axis=axis, reverse=reverse), device=SELECTOR)(x)
    turned = np.flip(x, axis) if reverse else x
    exact = EXACT[name].accumulate(turned.astype(np.float64), axis=axis)
    tolerance = 2.0**-7 if dtype is BF16 else 2e-6 if is_float else 0
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    exact = np.flip(exact, axis) if reverse else exact
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance)


@needs_vulkan
@pytest.mark.parametrize("name", ["cumsum", "cummax"])
def test_what_comes_behind_nan_is_nan(name):
    x = np.zeros(1100, np.float32)
    x[600] = np.nan
    found = np.asarray(vk_kernels.jit(lambda x: getattr(lax, name)(x), device=SELECTOR)(x))
    assert np.isnan(found[600:]).all()
    assert (found[:600] == 0).all()
