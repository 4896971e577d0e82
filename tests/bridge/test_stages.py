"""`lower` and `compile` are as in `jax.stages`, and nothing reads past the end of what it is given."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.open_devices import open_device

pytestmark = needs_vulkan

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def scaled(x, *, by, power=1):
    return {"sum": (x["a"] * by) ** power, "count": x["b"] + 1}


@pytest.fixture(scope="module")
def lowered():
    arguments = {"a": jax.ShapeDtypeStruct((3, 4), np.float32), "b": np.int32(1)}
    return vk_kernels.jit(scaled, static_argnames="power", device=SELECTOR).lower(arguments, by=2.0, power=2)


def test_what_is_lowered_says_what_it_is_and_is_not_called(lowered):
    assert not callable(lowered)
    assert lowered.as_text() == lowered.compile().as_text()
    assert lowered.cost() == lowered.compile().cost()
    assert lowered.cost().dispatches == len(lowered.program.commands) > 0
    assert lowered.device is open_device(SELECTOR)
    assert lowered.donated == []
    assert lowered.in_tree == jax.tree.structure((({"a": 0, "b": 0},), {"by": 0}))
    assert lowered.out_tree == jax.tree.structure({"count": 0, "sum": 0})
    assert len(lowered.graph.nodes) > 0


def test_what_is_compiled_takes_the_arguments_without_static_ones(lowered):
    compiled = lowered.compile()
    expected = jax.jit(scaled, static_argnames="power")({"a": X, "b": 3}, by=2.0, power=2)
    for found in (
        compiled({"a": X, "b": 3}, by=2.0),
        compiled({"a": jnp.asarray(X), "b": np.int32(3)}, by=np.float32(2)),
    ):
        np.testing.assert_array_equal(found["sum"], expected["sum"])
        assert found["count"] == 4
    again = compiled({"a": found["sum"], "b": found["count"]}, by=0.5)
    np.testing.assert_array_equal(again["sum"], (np.asarray(expected["sum"]) / 2) ** 2)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            ({"a": X[:2], "b": 3},),
            {"by": 2.0},
            r"compiled with args\[0\]\['a'\] of float32\[3,4\], .* float32\[2,4\]",
        ),
        (
            ({"a": X.T, "b": 3},),
            {"by": 2.0},
            r"args\[0\]\['a'\] of float32\[3,4\], called with float32\[4,3\]",
        ),
        (({"a": X, "b": 3.0},), {"by": 2.0}, r"compiled with args\[0\]\['b'\] of int32\[\], called with float32\[\]: "),
        (({"a": X, "b": 3},), {"by": X}, r"compiled with by of float32\[\], called with float32\[3,4\]: lower it for"),
        (
            ({"a": X},),
            {"by": 2.0},
            r"compiled for arguments of the structure .*, called with .*'a'.*; static",
        ),
        (({"a": X, "b": 3}, 2.0), {}, "compiled for arguments of the structure"),
        ((X,), {}, "compiled for arguments of the structure"),
        (({"a": X, "b": 3},), {"by": 2.0, "power": 2}, "static arguments are left out"),
    ],
)
def test_other_arguments_are_a_type_error(lowered, args, kwargs, message):
    with pytest.raises(TypeError, match=message) as raised:
        lowered.compile()(*args, **kwargs)
    assert "\n" not in str(raised.value)


def test_what_is_compiled_is_no_part_of_a_trace(lowered):
    with pytest.raises(TypeError, match="in what JAX traces"):
        jax.jit(lambda x: lowered.compile()({"a": x, "b": 1}, by=2.0))(X)


def test_donated_arguments_are_donated_to_what_is_compiled_too():
    step = vk_kernels.jit(lambda state, x: (state + x, state.sum()), donate_argnums=0, device=SELECTOR)
    compiled = step.lower(X, X).compile()
    state, total = vk_kernels.device_put(X, SELECTOR), 0.0
    for turn in range(4):  # in turn with the function itself, which knows what it gave last
        before = state
        state, total = (compiled, step)[turn % 2](state, X)
        assert before.is_deleted()
    np.testing.assert_array_equal(state, 5 * X)
    assert float(total) == 4 * X.sum()


def test_calls_from_several_threads_are_apart():
    jitted = vk_kernels.jit(lambda x: jnp.cumsum(x) * 2, device=SELECTOR)
    compiled, wrong = jitted.lower(X[0]).compile(), []

    def work(fn, seed):
        for i in range(20):
            x = X[0] + np.float32(seed + i)
            if not np.array_equal(np.asarray(fn(x)), 2 * np.cumsum(x)):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(fn, n)) for n, fn in enumerate((compiled, jitted, compiled))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_program_checks_the_size_of_all_that_it_is_given(lowered):
    """Whoever calls it: a kernel would read past the end of a shorter array."""
    executable = lowered.compile().executable
    short = lowered.device.upload(X[:2])
    with pytest.raises(ValueError, match=r"input 0 of the program is float32\[3,4\], 48 bytes, found 32 bytes"):
        executable({0: short, 1: np.int32(1), 2: np.float32(1)})
    with pytest.raises(ValueError, match=r"input 1 of the program is int32\[\], 4 bytes, found 1 bytes"):
        executable({0: X, 1: np.int8(1), 2: np.float32(1)})
    with pytest.raises(ValueError, match="input 0 of the program"):
        executable.time({0: short, 1: np.int32(1), 2: np.float32(1)})
    long = lowered.device.upload(X)
    for turn in range(8):  # also once it is bound to a buffer, and once it copies an input that is another each time
        executable({0: long if turn < 2 else lowered.device.upload(X), 1: np.int32(1), 2: np.float32(1)})
        with pytest.raises(ValueError, match="input 0 of the program"):
            executable({0: short, 1: np.int32(1), 2: np.float32(1)})


def test_what_was_compiled_for_a_device_that_was_closed_says_so():
    with Device.open(SELECTOR) as device:
        lowered = vk_kernels.jit(lambda x: x + 1, device=SELECTOR).lower(X)
        compiled = lowered.compile()
        compiled.device = device
    with pytest.raises(RuntimeError, match="which was closed since: lower it again"):
        compiled(X)
