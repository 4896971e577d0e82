"""vk_kernels.jit: whole functions against XLA, and what its arrays, caches and reports promise."""

import functools
import gc
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_graph import normal
from vulkan_devices import SELECTOR, memory_at_rest, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.bridge.profile import layer_of, phase_of
from vk_kernels.errors import BufferSizeError, UnsupportedError
from vk_kernels.runtime import lifetime
from vk_kernels.runtime.executable import RECORDINGS
from vk_kernels.runtime.memory import Buffer, Memory
from vk_kernels.runtime.open_devices import open_device

pytestmark = needs_vulkan

X = normal(8, 40)


def vjit(fn, **options):
    return vk_kernels.jit(fn, device=SELECTOR, **options)


def same(found, expected, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Structure, shapes, dtypes and weak types as XLA's, and values close to them."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(x, vk_kernels.Array)
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.aval.weak_type)
        np.testing.assert_allclose(x.numpy(), np.asarray(y), rtol=rtol, atol=atol)


def agree(fn, *args, **options) -> None:
    same(vjit(fn)(*args), jax.jit(fn)(*args), **options)


def mlp(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x


PARAMS = [{"w": normal(40, 24) / 6, "b": normal(24)}, {"w": normal(24, 24, seed=1), "b": normal(24, seed=1)}]


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda x: x, (X,)),
        (lambda x: (x, x, 3.0, np.arange(3)), (X,)),
        (lambda: jnp.arange(5) * 2, ()),
        (lambda x: jax.nn.softmax(x, axis=-1), (X,)),
        (lambda x, y: x @ y.T, (X, X)),
        (lambda x: jnp.where(x > 0, x, -x).sum(0), (X,)),
        (lambda x: {"sorted": jnp.sort(x, axis=0), "top": jax.lax.top_k(x, 3)}, (X,)),
        (lambda x: jax.lax.scan(lambda c, row: (c + row, c.sum()), jnp.zeros(40), x), (X,)),
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 1.5 + i, x), (X,)),
        (lambda p, x: jax.lax.cond(p > 0, jnp.sin, jnp.cos, x), (1, X)),
        (lambda x: jnp.zeros((0, 3)) + x[0, 0], (X,)),
        (lambda x: x[:0].sum(), (X,)),
        (mlp, (PARAMS, X)),
        (jax.grad(lambda params, x: (mlp(params, x) ** 2).mean()), (PARAMS, X)),
        (jax.vmap(lambda x: x[::-1].cumsum()), (X,)),
        (lambda x: ops.layer_norm(x, x[0], x[1]).reshape(-1), (X,)),
        (jax.grad(lambda x: ops.gelu(x).sum()), (X,)),
    ],
)
def test_functions_give_what_xla_gives(fn, args):
    agree(fn, *args, rtol=2e-5, atol=1e-5)


def test_hot_operations_run_as_their_kernels():
    compiled = vjit(lambda x: ops.layer_norm(x * 2, x[0], x[1]) + 1).lower(X)
    labels = [command.label for command in compiled.program.commands]
    assert any(label.startswith("layer_norm") for label in labels)
    assert len(labels) == 3


@flax.struct.dataclass
class Pair:
    first: jax.Array
    rest: tuple


def test_pytrees_go_in_and_come_out():
    def fn(pair, *, scale):
        return Pair(pair.first * scale["by"], (None, {"sum": pair.rest[0] + 1})), [pair.first]

    pair = Pair(X, (X[0], None))
    same(vjit(fn)(pair, scale={"by": 2.0}), jax.jit(fn)(pair, scale={"by": 2.0}))


@pytest.mark.parametrize(
    "options", [{"static_argnums": 1}, {"static_argnames": "n"}, {"static_argnums": (-1,)}, {"static_argnames": ["n"]}]
)
def test_static_arguments_are_constants(options):
    traced = []

    def fn(x, n):
        traced.append(n)
        return x + sum(range(n))

    jitted = vjit(fn, **options)
    for n in (3, 4, 3):
        np.testing.assert_array_equal(jitted(X, n), X + sum(range(n)))
    np.testing.assert_array_equal(jitted(X, n=4), X + 6)
    assert sorted(set(traced)) == [3, 4]


def test_new_shapes_dtypes_and_structures_are_traced_once_each():
    traced = []

    @vjit
    def fn(tree):
        traced.append(jax.tree.map(jnp.shape, tree))
        return jax.tree.map(lambda x: x * 2, tree)

    inputs = [X, X[:3], X.astype(np.int32), {"a": X}, 2.0, np.float32(2)]
    for tree in (*inputs, *inputs):
        same(fn(tree), jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree))(tree))
    assert len(traced) == len(inputs)
    fn.clear_cache()
    fn(X)
    assert len(traced) == len(inputs) + 1


def test_weak_types_stay_weak():
    double = vjit(lambda x: x * 2)
    weak = double(3.0)
    assert weak.weak_type
    found = vjit(lambda x, y: x + y)(weak, X.astype(np.float16))
    assert (found.dtype, found.weak_type) == (np.float16, False)
    assert not double(np.float32(3)).weak_type


def test_results_are_taken_as_arguments_without_a_copy():
    compiled = vjit(lambda x: x + 1)
    first = compiled(X)
    second = compiled(first)
    np.testing.assert_array_equal(second, X + 1 + 1)
    np.testing.assert_array_equal(first, X + 1)


# Donation.


@pytest.mark.parametrize("is_done", [True, False], ids=["done", "busy"])
def test_donated_memory_is_used_again(is_done, monkeypatch):
    """Be the device done before the next call, or never: a call makes a recording of its own then, up to some."""
    device = open_device(SELECTOR)
    if not is_done:
        monkeypatch.setattr(device.queue, "is_done", lambda value: False)
    step = vjit(lambda state, x: (jax.tree.map(lambda s: s * 0.5 + x, state), x.sum()), donate_argnums=0)
    state = vk_kernels.device_put({"a": np.ones((8, 40), np.float32), "b": np.zeros((8, 40), np.float32)}, SELECTOR)
    addresses = {(leaf.buffer.handle_address, leaf.buffer.offset) for leaf in jax.tree.leaves(state)}
    expected = jax.tree.map(np.asarray, state)
    used = {}
    for i in range(12):
        state, _ = step(state, X)
        expected = jax.tree.map(lambda s: s * np.float32(0.5) + X, expected)
        assert {(leaf.buffer.handle_address, leaf.buffer.offset) for leaf in jax.tree.leaves(state)} == addresses
        if is_done:
            device.finish()
        if i in (2, RECORDINGS + 1, 11):
            used[i] = memory_at_rest(device).used
    assert used[11] == used[2 if is_done else RECORDINGS + 1]
    for name, value in expected.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-6)


@pytest.mark.parametrize("options", [{"donate_argnums": (1,)}, {"donate_argnames": "state"}])
def test_use_after_donation_raises(options):
    step = vjit(lambda x, state: state + x, **options)
    state = vk_kernels.device_put(X, SELECTOR)
    kept = vk_kernels.device_put(X, SELECTOR)
    result = step(kept, state)
    assert state.is_deleted()
    assert not kept.is_deleted()
    with pytest.raises(RuntimeError, match=r"float32\[8,40\], was donated or deleted"):
        step(kept, state)
    with pytest.raises(RuntimeError, match="donated"):
        state.numpy()
    assert "deleted" in repr(state)
    np.testing.assert_array_equal(result, X + X)


def test_an_array_cannot_be_donated_and_kept():
    state = vk_kernels.device_put(X, SELECTOR)
    with pytest.raises(ValueError, match=r"input 0, float32\[8,40\], is donated, and passed a second time"):
        vjit(lambda a, b: a + b, donate_argnums=0)(state, state)
    np.testing.assert_array_equal(state, X)


def test_a_loop_over_a_state_may_be_left_and_entered_again():
    def step(state, x):
        return {"a": state["a"] * 0.5 + x, "b": state["b"] + state["a"].sum()}, x.max()

    jitted = vjit(step, donate_argnums=0)
    first = {"a": X, "b": np.float32(1)}
    expected = [first]
    for i in range(9):
        expected.append(jax.tree.map(np.asarray, jax.jit(step)(expected[-1], X + i)[0]))

    def check(state, i):
        for name, value in expected[i].items():
            np.testing.assert_allclose(state[name], value, rtol=1e-5)

    state, _ = jitted(first, X)
    old = state
    state, _ = jitted(state, X + 1)
    state, _ = jitted(state, X + 2)
    assert old["a"].is_deleted()
    with pytest.raises(RuntimeError, match="donated"):
        jitted(old, X)
    with pytest.raises(RuntimeError, match="donated"):
        jitted({"a": state["a"], "b": old["b"]}, X)
    with pytest.raises(ValueError, match="a second time"):
        jitted(state, state["a"])
    other, _ = jitted(first, X)  # two states at once
    state, _ = jitted(state, X + 3)
    state, _ = jitted(state, X + 4)
    check(other, 1)
    check(state, 5)
    state["b"] = state["b"].numpy()  # one leaf from elsewhere
    state, _ = jitted(state, X + 5)
    state, _ = jitted(state, X + 6)
    check(state, 7)
    state["a"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        jitted(state, X)


def test_a_tuple_of_all_that_is_donated_loops_like_any_state():
    """A state that is seen to come back without a look at its leaves; wherever it stands among the others."""

    def step(x, state, y):
        return (x.max(), y), tuple(0.5 * s + x for s in state), y + 1

    jitted = vjit(step, donate_argnums=1)
    expected = [(X, -X)]
    for i in range(9):
        expected.append(jax.tree.map(np.asarray, jax.jit(step)(X + i, expected[-1], 1)[1]))

    def check(state, i):
        assert type(state) is tuple
        for found, value in zip(state, expected[i], strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-5)

    _, state, _ = jitted(X, (X, -X), 1)
    old = state
    (largest, same), state, more = jitted(X + 1, state, 1)
    assert (float(largest), int(same), int(more)) == (pytest.approx(float((X + 1).max())), 1, 2)
    _, state, _ = jitted(X + 2, state, 1)
    for gone in (old, (state[0], old[1])):
        with pytest.raises(RuntimeError, match="donated"):
            jitted(X, gone, 1)
    with pytest.raises(AttributeError):  # as the function itself says
        jitted([X], state, 1)
    _, other, _ = jitted(X, (X, -X), 1)  # two states at once
    _, state, _ = jitted(X + 3, state, 1)
    _, state, _ = jitted(X + 4, state, np.int32(1))  # no weak type: another program
    check(other, 1)
    check(state, 5)
    _, state, _ = jitted(X + 5, (state[0], state[1].numpy()), 1)  # one leaf from elsewhere
    _, state, _ = jitted(X + 6, tuple(state), 1)
    check(state, 7)
    _, state, _ = jitted(X + 7, state=state, y=1)
    _, state, _ = jitted(X + 8, state=state, y=1)
    check(state, 9)
    state[1].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        jitted(X, state, 1)


@pytest.mark.parametrize("first", [{"a": X, "b": -X}, (X, -X)])
def test_what_a_loop_gave_and_a_caller_still_holds_stays_deleted(first):
    step = vjit(lambda state, x: (jax.tree.map(lambda s: s + x, state), x.sum()), donate_argnums=0)
    state, _ = step(first, X)
    held, sums = [], []
    for i in range(8):
        if i % 3 == 1:
            held.append(state)
        if i % 3 == 2:
            held.append(jax.tree.leaves(state)[1])  # one of it
        state, total = step(state, X)
        sums.append(total)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(jax.tree.leaves(state)[1], 8 * X, rtol=1e-5)
    np.testing.assert_array_equal(np.stack(sums), np.asarray(sums[0]))


def test_a_loop_is_left_for_another_structure_or_type():
    def step(state, x):
        return jax.tree.map(lambda s: s + x, state)

    jitted = vjit(step, donate_argnums=0)
    state = jitted([X, (X, None)], np.float32(1))
    state = jitted(state, np.float32(1))
    a, (b, _) = state
    state = jitted((a, [b]), np.float32(1))
    assert isinstance(state, tuple)
    np.testing.assert_allclose(state[1][0], X + 3, rtol=1e-6)
    state = jitted(state, np.float32(1))
    state = jitted(state, 2)  # a weak type: another program
    np.testing.assert_allclose(state[0], X + 6, rtol=1e-6)
    state = jitted(state, vk_kernels.device_put(X, SELECTOR))
    state = jitted(state, X)
    with pytest.raises(TypeError):
        jitted(state, [X])
    with pytest.raises((TypeError, ValueError)):
        jitted(state, None)
    np.testing.assert_allclose(state[0], X + 6 + X + X, rtol=1e-5)


@pytest.mark.parametrize(
    "other", [lambda x: (x,), lambda x: [x, x], lambda x: x, lambda x: {"a": x}, lambda x: (x, {})]
)
def test_calls_with_structures_in_turn_copy_nothing_to_the_host(other, monkeypatch):
    double = vjit(lambda tree, *more: jax.tree.map(lambda x: x * 2, tree))
    x = vk_kernels.device_put(X, SELECTOR)
    calls = [((x, x),), (other(x),), ((x, x), x)]
    copies, numpy = [], vk_kernels.Array.numpy
    monkeypatch.setattr(vk_kernels.Array, "numpy", lambda self: copies.append(self) or numpy(self))
    for args in [*calls, *calls]:
        double(*args)
    assert copies == []
    assert "0.12573" in repr(x)


def test_donated_arrays_are_read_before_they_are_written():
    def rotate(a, b, c):
        return b, c + a.sum(), a[::-1]

    step = vjit(rotate, donate_argnums=(0, 1, 2))
    expected = state = (X, X + 1, X + 2)
    for _ in range(4):
        state = step(*state)
        expected = jax.jit(rotate)(*expected)
    for x, y in zip(state, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_an_update_with_norms_stays_in_its_memory():
    def step(state, grads):
        momenta = [0.9 * m + g for (_, m), g in zip(state, grads, strict=True)]
        norms = [jnp.sqrt(sum(jnp.sum(x * x) for x in xs)) for xs in ([p for p, _ in state], momenta)]
        return [(p - 0.1 * m, m) for (p, _), m in zip(state, momenta, strict=True)], norms

    shapes = [(8193,), (91, 101), (40, 3, 77)]
    state = [(normal(*shape), normal(*shape, seed=1)) for shape in shapes]
    grads = [normal(*shape, seed=2) for shape in shapes]
    jitted = vjit(step, donate_argnums=0)
    # The 6 sums and their ends, on a CPU 4 at most in a kernel, and the norms.
    on_cpu = jitted.lower(state, grads).device.info.kind == "cpu"
    assert jitted.cost(state, grads).dispatches == (5 if on_cpu else 3)
    expected, state = state, vk_kernels.device_put(state, SELECTOR)
    addresses = [(leaf.buffer.handle_address, leaf.buffer.offset) for leaf in jax.tree.leaves(state)]
    for _ in range(3):
        state, norms = jitted(state, grads)
        expected, expected_norms = jax.jit(step)(expected, grads)
        np.testing.assert_allclose([float(x) for x in norms], expected_norms, rtol=1e-5)
    assert [(leaf.buffer.handle_address, leaf.buffer.offset) for leaf in jax.tree.leaves(state)] == addresses
    same(state, expected, rtol=1e-5)


# Bits.


@pytest.mark.parametrize(
    "fn",
    [
        lambda key: jax.random.bits(key, (7, 5), "uint32"),
        lambda key: jax.random.bits(key, (9,), "uint8"),
        lambda key: jax.random.key_data(jax.random.split(key, 3)),
        lambda key: jax.random.randint(jax.random.fold_in(key, 7), (20,), -5, 100),
        lambda key: jax.random.uniform(key, (33,)),
        lambda key: jax.random.bernoulli(key, 0.3, (50,)),
        lambda key: jax.random.permutation(key, 31),
        lambda key: jax.vmap(lambda k: jax.random.bits(k, (3,)))(jax.random.split(key, 4)),
        lambda key: jax.random.categorical(key, jnp.zeros((3, 11)), axis=-1),
        lambda key: (jax.random.split(key, 3)[None] == jax.random.split(key, 3)[:, None]).astype(int),
        lambda key: jnp.where(jax.random.split(key)[0] != key, 1, 2),
    ],
)
def test_random_bits_are_those_of_xla(fn):
    key = jax.random.key(2**31 + 5)
    expected = jax.jit(fn)(key)
    found = vjit(fn)(key)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_keys_come_back_as_keys():
    key = jax.random.key(1)
    found = vjit(lambda key: jax.random.split(key))(key)
    assert jnp.issubdtype(found.dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(jax.random.split(key)))


def test_nan_and_infinities_go_where_xla_has_them_go():
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, 3e38], np.float32)

    def fn(x):
        rows = x[:, None] - x[None]
        most = jnp.maximum(x[:, None], x[None])
        return rows, most, x.max(), x[1:].min(), jnp.sqrt(x), jnp.log(x), x.astype(jnp.int32), jnp.sort(x), x.argmax()

    for found, expected in zip(vjit(fn)(special), jax.jit(fn)(special), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bfloat16():
    x = X.astype(jnp.bfloat16)
    found = vjit(lambda x: (x * 1.5 + x).sum(0))(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.numpy().astype(np.float32), np.asarray((x * 1.5 + x).astype(np.float32).sum(0)), atol=0.2
    )


def layered(state, x):
    def loss(state):
        y = ops.layer_norm(x @ state["w"], state["scale"], state["bias"])
        return (jax.nn.log_softmax(ops.gelu(y)) ** 2).mean()

    value, gradient = jax.value_and_grad(loss)(state)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradient), value


def layered_state():
    return {"w": normal(40, 64), "scale": np.ones(64, np.float32), "bias": normal(64)}


def run_layered(step, steps: int = 100) -> list[bytes]:
    state, found = vk_kernels.device_put(layered_state(), SELECTOR), []
    for i in range(steps):
        state, value = step(state, X + np.float32(i))
        found.append(value.numpy().tobytes())
    return [*found, *(leaf.numpy().tobytes() for leaf in jax.tree.leaves(state))]


def test_a_replay_is_a_fresh_recording_bit_for_bit():
    jitted = vjit(layered, donate_argnums=0)
    replayed = run_layered(jitted)

    def fresh(state, x):
        for compiled in jitted._compiled.values():
            compiled.executable._recordings.clear()
        return jitted(state, x)

    assert run_layered(fresh) == replayed
    assert run_layered(vjit(layered, donate_argnums=0)) == replayed


def test_what_the_arena_holds_before_changes_nothing():
    jitted = vjit(layered, donate_argnums=0)
    clean = run_layered(jitted, 3)
    compiled = jitted.lower(vk_kernels.device_put(layered_state(), SELECTOR), X).compile()
    assert compiled.cost().arena_bytes > 0

    def filled(state, x):
        with compiled.device.pooled_recorder() as recorder:
            for block in compiled.executable.arena:
                recorder.fill(block, 0xFFFFFFFF)
            recorder.submit()
        return jitted(state, x)

    assert run_layered(filled, 3) == clean


def test_collection_waits_until_a_function_is_compiled():
    seen = []

    def double(x, fails):
        seen.append(gc.isenabled())
        if fails:
            raise ValueError("as asked")
        return x * 2

    jitted = vjit(double, static_argnums=1)
    jitted(X, False)
    with pytest.raises(ValueError, match="as asked"):
        jitted(X, True)
    assert seen == [False, False]
    assert gc.isenabled()


def test_an_arena_larger_than_an_allocation_is_in_blocks(monkeypatch):
    inputs = [np.full(n, n, np.float32) for n in (20_000, 30_000, 25_000)]

    def products(*arrays):  # three large arrays that live together
        rows = [jnp.outer(x[:100], x[:100]) @ jnp.ones((100, 100)) for x in arrays]
        return [row @ other for row in rows for other in rows]

    expected = vjit(products)(*inputs)
    largest = Memory.largest
    monkeypatch.setattr(Memory, "largest", lambda self, sliced=False: (65_536, "a test") if sliced else largest(self))
    jitted = vjit(products)
    for x, y in zip(jitted(*inputs), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    executable = jitted.lower(*inputs).compile().executable
    assert len(executable.arena) > 1
    assert sum(block.size for block in executable.arena) == executable.program.arena_bytes
    monkeypatch.setattr(Memory, "largest", lambda self, sliced=False: (8_192, "a test") if sliced else largest(self))
    with pytest.raises(BufferSizeError, match=r"40,192 bytes: .* takes at most 8,192 \(a test\)"):
        vjit(products)(*inputs)


def test_a_state_in_a_tuple_of_which_one_array_stays_as_it_is():
    step = vjit(lambda s, x: ((s[0] + x, s[1], s[2] * 2), s[0].sum()), donate_argnums=0)
    state = np.zeros((3, 2), np.float32), np.int32(9), np.ones(4, np.float32)
    for i in range(1, 4):
        state, _ = step(state, np.float32(1))
        assert [x.shape for x in state] == [(3, 2), (), (4,)]
        np.testing.assert_array_equal(state[0], np.full((3, 2), i))
        assert int(state[1]) == 9
        np.testing.assert_array_equal(state[2], np.full(4, 2**i))


def test_a_call_that_raises_leaves_the_loop_over_another_state_as_it_was():
    step = vjit(lambda s, x: ({"w": s["w"] + x}, x * 2), donate_argnums=0)
    for calls in (1, 3):
        state, other = {"w": np.zeros_like(X)}, vk_kernels.device_put({"w": 100 + X}, SELECTOR)
        for _ in range(calls):
            state, _ = step(state, X)
        gone = vk_kernels.device_put(X, SELECTOR)
        gone.delete()
        for bad, error in ((gone, RuntimeError), (other["w"], ValueError)):
            with pytest.raises(error, match="donated"):
                step(other, bad)
        state, _ = step(state, X)
        np.testing.assert_allclose(state["w"], (calls + 1) * X, rtol=1e-6)
        np.testing.assert_array_equal(other["w"], 100 + X)


def test_states_that_are_no_more_leave_the_memory():
    device = open_device(SELECTOR)
    step = vjit(lambda state, x: (state + x, x.sum()), donate_argnums=0)
    used = []
    for _ in range(4):
        state = vk_kernels.device_put(np.zeros((1024, 256), np.float32), SELECTOR)
        for _ in range(2):
            state, total = step(state, np.float32(1))
        del state, total
        used.append(memory_at_rest(device).used)
    assert used[-1] == used[0]


def test_a_result_that_moves_while_it_is_read_is_read_again(monkeypatch):
    double = vjit(lambda x: x * 2)
    held = [double(X + i) for i in range(RECORDINGS)]
    read = Buffer.read

    def read_late(self, *arguments):
        monkeypatch.undo()
        held.append(double(X + RECORDINGS))  # as another thread may
        return read(self, *arguments)

    monkeypatch.setattr(Buffer, "read", read_late)
    np.testing.assert_array_equal(held[0].numpy(), X * 2)


def test_results_that_are_held_stay_as_they_are():
    double = vjit(lambda x: x * 2)
    held = [double(X + i) for i in range(20)]
    for i, found in enumerate(held):
        np.testing.assert_array_equal(found, (X + i) * 2)


def test_without_reference_counts_results_and_states_are_the_same(monkeypatch):
    """In a Python whose counts say nothing: more is copied, and no object is taken again."""
    monkeypatch.setattr(lifetime, "_BASE_REFCOUNT", None)
    double, step = vjit(lambda x: x * 2), vjit(lambda s, x: ({"a": s["a"] + x}, s["a"].sum()), donate_argnums=0)
    state, held = {"a": np.zeros_like(X)}, []
    for i in range(2 * RECORDINGS):
        state, _ = step(state, X)
        held.append(double(X + i))
    np.testing.assert_allclose(state["a"], 2 * RECORDINGS * X, rtol=1e-5)
    for i, found in enumerate(held):
        np.testing.assert_array_equal(found, (X + i) * 2)


def test_results_that_are_donated_stay_with_whom_they_were_donated_to():
    """Not with the function that made them, which is called again, often enough to want their memory."""
    make = vjit(lambda x: (x * 2, x + 1))
    step = vjit(lambda state: (state[0] * 4, state[1] * 2), donate_argnums=0)
    state = step(step(make(X)))
    held = [make(X + i) for i in range(1, 10)]
    state = step(state)
    for i, found in enumerate([state, *held]):
        expected = (X * 128, (X + 1) * 8) if i == 0 else ((X + i) * 2, X + i + 1)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_result_that_is_deleted_leaves_the_others_and_later_ones_as_they_are():
    make = vjit(lambda x: (x * 2, x + 1))
    held = []
    for i in range(12):
        twice, more = make(X + i)
        np.testing.assert_array_equal(twice, (X + i) * 2)
        twice.delete()
        if i % 2:
            held.append((i, more))
    for i, more in held:
        np.testing.assert_array_equal(more, X + i + 1)


# Errors.


def test_what_is_not_supported_names_primitive_shapes_and_line():
    @vjit
    def fn(x):
        return jnp.linalg.qr(x)

    with pytest.raises(UnsupportedError, match=r"qr.*\(float32\[8,40\]\) at .*test_jit.py:\d+") as error:
        fn(X)
    assert "\n" not in str(error.value)


def test_what_only_the_generator_refuses_names_the_line_too():
    with pytest.raises(UnsupportedError, match=r"an array of 4,294,967,296 elements.*at .*test_jit.py:\d+"):
        vjit(lambda x: jnp.broadcast_to(x[0, 0], (2**32,)))(X)


def test_a_hot_operation_that_is_refused_names_the_line_and_keeps_its_error():
    square = np.zeros((16, 16), np.float32)
    with (
        vk_kernels.use("vulkan", device=SELECTOR, variant="nonsense"),
        pytest.raises(ValueError, match=r"'nonsense'.*test_jit.py:\d+"),
    ):
        vjit(lambda x: ops.matmul(x, x))(square)
    rows = open_device(SELECTOR).limits.storage_buffer_range // 1024 + 1
    huge = jax.ShapeDtypeStruct((rows, 256), np.float32)
    with pytest.raises(BufferSizeError, match=r"gelu.*test_jit.py:\d+"):
        vjit(lambda x: ops.gelu(x).sum()).lower(huge)


def test_two_variants_of_an_operation_are_two():
    def both(x):
        with vk_kernels.use("vulkan", variant="plain"):
            plain = ops.matmul(x, x)
        with vk_kernels.use("vulkan", variant="nonsense"):
            return plain, ops.matmul(x, x)

    with pytest.raises(ValueError, match="'nonsense'"):
        vjit(both)(np.zeros((16, 16), np.float32))


def test_a_function_comes_back_when_its_device_was_closed():
    double = vjit(lambda x: x * 2)
    np.testing.assert_array_equal(double(X), X * 2)
    open_device(SELECTOR).close()
    for _ in range(3):
        np.testing.assert_array_equal(double(X), X * 2)


def test_an_unknown_device_is_an_error():
    with pytest.raises(vk_kernels.errors.NoDeviceError, match="no Vulkan device is called 'abacus'"):
        vk_kernels.jit(lambda x: x, device="abacus")(X)


# What can be asked.


def test_the_program_as_text():
    text = vjit(layered, donate_argnums=0).lower(layered_state(), X).as_text()
    lines = text.splitlines()
    cost = vjit(layered, donate_argnums=0).cost(layered_state(), X)
    assert lines[0].startswith(f"{cost.dispatches} dispatches, {cost.barriers} barriers")
    assert sum(line.startswith("dispatch ") for line in lines) == cost.dispatches
    assert lines.count("barrier") == cost.barriers
    assert "output[0]: float32[64] in input[0]" in lines
    assert any("layer_norm" in line for line in lines)


def test_costs():
    cost = vjit(lambda x, y: x @ y).cost(*(jax.ShapeDtypeStruct((32, 32), np.float32),) * 2)
    assert cost.flops == 2 * 32**3
    assert cost.bytes == 3 * 32 * 32 * 4
    assert (cost.dispatches, cost.barriers, cost.arena_bytes, cost.constant_bytes) == (1, 0, 0, 0)


def test_a_profile_times_every_dispatch_by_scope(tmp_path):
    def fn(x):
        with jax.named_scope("forward"):
            y = ops.gelu(x + 1)
        with jax.named_scope("backward"):
            return jnp.tanh(y).sum()

    jitted = vjit(fn)
    profile = jitted.profile(X)
    assert len(profile.rows) == jitted.cost(X).dispatches
    assert set(profile.by_scope()) == {"forward", "backward"}
    assert profile.seconds == pytest.approx(sum(profile.by_scope().values()))
    assert profile.seconds > 0
    assert "gelu" in str(profile)
    profile.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    dispatches = [event for event in events if "args" in event and event["ph"] == "X"]
    assert [event["name"] for event in dispatches] == [label for label, _, _ in profile.rows]
    cut = lambda us: int(us * 1e3)  # noqa: E731 what Perfetto makes of a number: whole nanoseconds
    assert [cut(event["dur"]) for event in dispatches] == [round(1e9 * seconds) for _, _, seconds in profile.rows]
    assert cut(dispatches[1]["ts"]) == cut(dispatches[0]["dur"])
    phases = [event for event in events if event["name"] in ("forward", "backward")]
    assert sum(cut(phase["dur"]) for phase in phases) == sum(cut(event["dur"]) for event in dispatches)
    for event in dispatches:  # each lies in its phase
        middle = event["ts"] + event["dur"] / 2
        [phase] = [phase for phase in phases if phase["ts"] <= middle < phase["ts"] + phase["dur"]]
        assert phase["name"] == event["args"]["scope"]


def test_a_profile_tells_forward_backward_and_the_rest_apart():
    @vjit
    def fn(x, w):
        def loss(w):
            with jax.named_scope("layer"):
                return (ops.gelu(x @ w) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(w)
        with jax.named_scope("optimizer"):
            return value, jnp.cos(w - 0.1 * gradient)

    profile = fn.profile(X, PARAMS[0]["w"])
    assert set(profile.by_phase()) == {"forward", "backward", "optimizer"}
    assert sum(profile.by_phase().values()) == pytest.approx(profile.seconds)


@pytest.mark.parametrize(
    ("scope", "phase", "layer"),
    [
        ("jvp(GPT.losses)/GPT/h_0/qkv", "forward", "h_0"),
        ("jvp(GPT.losses)/GPT", "forward", "GPT"),
        ("transpose(jvp(GPT.losses))/GPT/ln_f", "backward", "ln_f"),
        ("transpose(jvp())", "backward", ""),
        ("jvp(layer)/dense/bias", "forward", "dense"),
        ("optimizer", "optimizer", ""),
        ("", "", ""),
    ],
)
def test_a_scope_tells_phase_and_layer(scope, phase, layer):
    assert (phase_of(scope), layer_of(scope)) == (phase, layer)


def test_a_profile_leaves_donated_arguments_as_they_are():
    state = vk_kernels.device_put(X, SELECTOR)
    jitted = vjit(lambda x: x * 2, donate_argnums=0)
    jitted.profile(state)
    np.testing.assert_array_equal(state, X)
    np.testing.assert_array_equal(jitted(state), 2 * X)


# Arrays.


def test_arrays_are_leaves_that_numpy_and_jax_take():
    x = vk_kernels.device_put({"x": X}, SELECTOR)["x"]
    assert (x.shape, x.dtype, x.ndim, x.size, x.nbytes) == (X.shape, X.dtype, 2, X.size, X.nbytes)
    assert len(x) == 8
    assert jax.tree.leaves([x]) == [x]
    for found in (np.asarray(x), jnp.asarray(x), jax.device_get(x), x[:], np.array(x), jnp.zeros_like(X) + x):
        np.testing.assert_array_equal(found, X)
    assert np.asarray(x, np.float64).dtype == np.float64
    scalar = vk_kernels.device_put(np.int32(3), SELECTOR)
    assert (int(scalar), float(scalar), bool(scalar), scalar.item(), range(9)[scalar]) == (3, 3.0, True, 3, 3)
    with pytest.raises(TypeError, match="len"):
        len(scalar)
    with pytest.raises(ValueError, match="copy=False"):
        np.array(x, copy=False)


def test_device_put_and_get_are_inverse():
    tree = {"f": X, "i": np.arange(7), "b": np.array([True, False, True]), "h": X.astype(jnp.bfloat16), "s": 2.5}
    there = vk_kernels.device_put(tree, SELECTOR)
    assert all(isinstance(leaf, vk_kernels.Array) for leaf in jax.tree.leaves(there))
    back = vk_kernels.device_get(there)
    expected = jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), tree)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.tobytes()), back) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.tobytes()), expected
    )
    assert vk_kernels.device_put(there, SELECTOR)["f"] is there["f"]


def test_inside_jax_transformations_it_is_part_of_what_is_traced():
    jitted = vjit(lambda x: (ops.gelu(x) ** 2).sum())
    np.testing.assert_allclose(
        jax.grad(jitted)(X), jax.grad(lambda x: (ops.gelu(x) ** 2).sum())(X), rtol=2e-5, atol=1e-5
    )


def test_the_function_keeps_its_name():
    assert vjit(functools.wraps(mlp)(lambda *args: mlp(*args))).__name__ == "mlp"
