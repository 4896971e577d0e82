"""The results of vk_kernels.jit have what users call on a jax.Array."""

import copy
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from run_graph import normal
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.runtime.array import Array

pytestmark = needs_vulkan

X = normal(4, 6)
# What a jax.Array has and ours has not, and why.
LEFT_OUT = {
    "_multi_slice": "for JAX itself",
    "_split": "for JAX itself",
}
LEFT_OUT_OF_ONE_DEVICE = {  # of the class that jax.numpy gives
    "clone": "for JAX itself",
    "device_buffer": "deprecated, raises",
    "device_buffers": "deprecated, raises",
    "format": "the layout that XLA chose: ours are row-major",
    "platform": "of a PJRT buffer",
    "traceback": "of a PJRT buffer",
    "unsafe_buffer_pointer": "an address that the host reads: ours are the device's",
    "unsafe_raw_buffer": "of a PJRT buffer",
}


def put(x):
    return vk_kernels.device_put(x, SELECTOR)


def test_every_public_attribute_of_a_jax_array_is_there_or_left_out_for_a_reason():
    def public(kind):
        return {name for name in dir(kind) if not name.startswith("_") or kind is jax.Array}

    assert public(jax.Array) - set(dir(Array)) == set(LEFT_OUT)
    missing = public(type(jnp.ones(3))) - set(dir(Array))
    assert missing <= set(LEFT_OUT_OF_ONE_DEVICE)  # by JAX's version


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.sharding,
        lambda x: x.devices(),
        lambda x: (x.committed, x.is_fully_addressable, x.is_fully_replicated, x.weak_type, x.is_deleted()),
        lambda x: (x.itemsize, x.nbytes, x.ndim, x.size, x.shape, x.dtype, len(x), x.aval),
        lambda x: [(s.index, s.replica_id, s.data.tolist()) for s in (*x.addressable_shards, *x.global_shards)],
        lambda x: x.addressable_data(0).tolist(),
        lambda x: x.to_device(jax.devices()[-1]).devices(),
        lambda x: jax.device_put(np.ones(2), x.sharding).sharding,
        lambda x: x.__array_namespace__(),
        lambda x: x.__dlpack_device__(),
        lambda x: (x.view(np.int32).tolist(), x.byteswap().tolist() if hasattr(x, "_never") else None),
        lambda x: (x.astype(np.int16).tolist(), x.flatten().tolist(), x.ravel().tolist(), x.at[0, 1].set(7.0).tolist()),
        lambda x: (x.T.tolist(), x.mT.tolist(), x.tolist(), [row.tolist() for row in x], x[0, 0].item()),
        lambda x: (x.copy_to_host_async(), x.block_until_ready() is x, x.is_ready()),
        lambda x: (np.asarray(x, np.float64).dtype, np.array(x, copy=True).tolist(), np.asarray(x, np.int8).tolist()),
        lambda x: (format(x[0, 0], ".3f"), f"{x[0, 0]:8.2e}", complex(x[1, 1]), float(x[1, 1]), int(x[1, 1])),
    ],
)
def test_it_answers_as_a_jax_array(use):
    assert use(put(X)) == use(jnp.asarray(X))


@pytest.mark.parametrize(
    ("error", "use"),
    [
        (TypeError, lambda x: x.__setitem__(0, 1.0)),
        (TypeError, lambda x: hash(x)),
        (ValueError, lambda x: bool(x)),
        (TypeError, lambda x: float(x)),
        (TypeError, lambda x: x[0].__index__()),
        (TypeError, lambda x: [1, 2][x[0, 0]]),
        (TypeError, lambda x: format(x, ".3f")),
        (ValueError, lambda x: np.asarray(x, copy=False) if isinstance(x, Array) else _raise(ValueError)),
        (RuntimeError, lambda x: (x.delete(), x.devices(), x.block_until_ready())),
        (RuntimeError, lambda x: (x.delete(), pickle.dumps(x))),
    ],
)
def test_it_refuses_as_a_jax_array(error, use):
    for x in (put(X), jnp.array(X)):
        with pytest.raises(error):
            use(x)


def _raise(error):
    raise error


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.uint32, bool])
def test_dlpack_gives_a_copy_on_the_host(dtype):
    values = (X * 3).astype(dtype)
    x = put(values)
    assert x.__dlpack_device__() == (1, 0)  # kDLCPU
    found = jax.dlpack.from_dlpack(x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)
    if dtype is not ml_dtypes.bfloat16:  # numpy has none
        np.testing.assert_array_equal(np.from_dlpack(x), values)


def test_an_array_is_pickled_by_its_contents():
    weak = vk_kernels.jit(lambda x: x * 2, device=SELECTOR)(3.0)
    tree = {"x": put(X), "half": put(X.astype(ml_dtypes.bfloat16)), "weak": weak, "none": put(X[:0])}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        with vk_kernels.use("vulkan", device=SELECTOR):
            found = pickle.loads(pickle.dumps(tree, protocol))
        for name, x in tree.items():
            assert (found[name].type, type(found[name])) == (x.type, Array)
            assert found[name].device is x.device
            assert found[name].buffer is not x.buffer
            np.testing.assert_array_equal(found[name], x)
    for copied in (copy.copy(tree["half"]), copy.deepcopy(tree)["half"]):
        assert copied.type == tree["half"].type


def test_it_is_no_jax_array_and_says_so():
    assert not isinstance(put(X), jax.Array)
    assert "isinstance" in Array.__doc__


def test_its_size_on_the_device_holds_it():
    assert put(X).on_device_size_in_bytes() >= X.nbytes
