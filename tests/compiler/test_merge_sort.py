"""Sorts of axes that are longer than a block, against NumPy's and XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from profiles import PROFILE
from run_graph import BF16, F32, SPECIAL, sample
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.compiler import merge_sort
from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.errors import UnsupportedError

INT8 = np.dtype(np.int8)


@PROFILE
@given(data=st.data(), rows=st.integers(1, 3), length=st.integers(1, 70), num_keys=st.integers(1, 3))
def test_places_are_those_of_a_stable_sort(data, rows, length, num_keys):
    """Blocks of 8; words at both ends of their range, and few of them, so that many are equal."""
    words = st.sampled_from([0, 1, 2, 2**31, 2**32 - 1])
    drawn = data.draw(st.lists(words, min_size=rows * length * num_keys, max_size=rows * length * num_keys))
    keys = np.array(drawn, np.uint32).reshape(num_keys, rows, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_sort, "BLOCK", 8)
        found = merge_sort._order([jnp.asarray(key) for key in keys])
    expected = np.stack([np.lexsort([*reversed(keys[:, row])]) for row in range(rows)])
    np.testing.assert_array_equal(found, expected)


def agree(fn, *args) -> None:
    """Bit for bit: what is sorted is moved, and not computed."""
    expected = jax.tree.leaves(jax.jit(fn)(*args))
    found = jax.tree.leaves(vk_kernels.jit(fn, device=SELECTOR)(*args))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@needs_vulkan
@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.uint32), INT8], ids=str)
def test_long_sorts(dtype):
    x = sample(2500, dtype=dtype)
    if dtype in (F32, BF16):
        x[: len(SPECIAL)] = x[2000 : 2000 + len(SPECIAL)] = SPECIAL.astype(dtype)
    agree(lambda x: (jnp.sort(x), jnp.argsort(x), lax.top_k(x, 40)), x)


@needs_vulkan
def test_long_sorts_by_two_keys_along_another_axis():
    x, carried = sample(1100, 2, dtype=INT8), np.arange(2200, dtype=np.int32).reshape(1100, 2)
    agree(lambda x, carried: lax.sort((x % 3, x, carried), 0, num_keys=2), x, carried)


@pytest.mark.parametrize("length", [merge_sort.BLOCK + 1, 5000, 1 << 20])
def test_no_kernel_compares_more_than_a_block(length):
    graph = make_graph(jax.make_jaxpr(lambda x: (jnp.sort(x), lax.top_k(x, 3)))(np.zeros(length, np.float32)))
    lengths = [node.inputs[0].shape[-1] for node in graph.nodes if node.op in ("sort", "top_k")]
    assert lengths == [merge_sort.BLOCK] * 2


@pytest.mark.parametrize("shape", [(0, 2000), (3, 0), (2000, 0)], ids=str)
@needs_vulkan
def test_what_has_no_elements_is_sorted(shape):
    agree(lambda x: (jnp.sort(x), jnp.argsort(x, axis=0)), np.zeros(shape, np.float32))


def test_more_elements_than_places_have_numbers_are_refused():
    x = jax.ShapeDtypeStruct((3, 2**29 + 1), np.float32)
    with pytest.raises(UnsupportedError, match=r"a sort of 1,610,612,739 elements: sort\(float32"):
        make_graph(jax.make_jaxpr(jnp.sort)(x))
