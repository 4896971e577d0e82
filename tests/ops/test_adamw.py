"""The kernels of the global norm and of AdamW, against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_plan import BF16, DTYPES, F32, normal, run, same_bits
from vulkan_devices import needs_vulkan

from vk_kernels.ops.adamw import adamw_reference, plan_adamw
from vk_kernels.ops.global_norm import global_norm_reference, plan_global_norm
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import record

pytestmark = needs_vulkan

NORM = plan_global_norm, global_norm_reference
SETTINGS = {"b1": 0.9, "b2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
SHAPES = [(33, 7), (7,), (), (1000,), (0, 3), (5, 1, 3)]
DECAY = tuple(len(shape) >= 2 for shape in SHAPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1,), (0,), (3, 7, 33), (0, 1000, 0), (100_003,), tuple(range(1, 40)), (5,) * 70],
    ids=lambda s: f"{len(s)}",
)
def test_global_norm(device, sizes, dtype):
    arrays = [normal(size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]
    (norm,) = run(device, *NORM, *arrays)
    exact = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in arrays))
    np.testing.assert_allclose(norm, exact, rtol=1e-5)
    assert same_bits([norm], run(device, *NORM, *arrays))


def test_global_norm_of_a_long_array_of_mixed_dtypes_and_of_nothing(device):
    arrays = [normal(3_000_000), normal(17, dtype=BF16), np.float32(3.0)]
    (norm,) = run(device, *NORM, *arrays)
    np.testing.assert_allclose(norm, np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in arrays)), rtol=1e-5)
    assert run(device, *NORM)[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_global_norm_of_what_is_not_finite(device, bad):
    arrays = [normal(50), normal(5000, seed=1)]
    arrays[1][4321] = bad
    assert not np.isfinite(run(device, *NORM, *arrays)[0])


class Updates:
    """Parameters and moments that `steps` change, as numpy arrays."""

    def __init__(self):
        self.params = [normal(*shape, seed=i) for i, shape in enumerate(SHAPES)]
        self.mus, self.nus = ([np.zeros(shape, np.float32) for shape in SHAPES] for _ in range(2))
        self.count = np.int32(0)

    def apply(self, update, grads, learning_rate=1e-2, loss=1.0, **options):
        scalars = (self.count, np.float32(learning_rate), np.float32(loss))
        operands = (*self.params, *grads, *self.mus, *self.nus, *scalars)
        results = list(map(np.asarray, update(*operands, decay=DECAY, **SETTINGS, **options)))
        n = len(SHAPES)
        self.params, self.mus, self.nus = results[:n], results[n : 2 * n], results[2 * n : 3 * n]
        self.count = results[3 * n]
        return results[3 * n + 1 :]  # norm, finite, shadows

    def all(self):
        return [*self.params, *self.mus, *self.nus, self.count]


def gradients(step, scale, dtype=F32):
    return [(scale * normal(*shape, seed=100 * step + i)).astype(dtype) for i, shape in enumerate(SHAPES)]


def on(device):
    return lambda *operands, **options: run(device, plan_adamw, adamw_reference, *operands, **options)


@pytest.mark.parametrize("scale", [0.001, 1.0], ids=["unclipped", "clipped"])
def test_five_steps_of_optax(device, scale):
    schedule = optax.linear_schedule(1e-3, 1e-2, 5)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, mask=list(DECAY)),
    )
    ours, plain = Updates(), Updates()
    params = list(map(jnp.asarray, ours.params))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(5):
        grads = gradients(step, scale)
        norm, finite = ours.apply(on(device), grads, schedule(step))
        plain.apply(adamw_reference, grads, schedule(step))
        np.testing.assert_allclose(norm, optax.tree.norm(grads), rtol=1e-6)
        assert finite == 1
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        adam = state[1][0]
        expected = [*params, *adam.mu, *adam.nu, adam.count]
        for found in (ours, plain):
            for actual, wanted in zip(found.all(), expected, strict=True):
                np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("count", [1, 10, 1000, 2**31 - 1])
def test_bias_correction_of_any_step(device, count):
    updates = Updates()
    updates.count = np.int32(count - 1)
    before = [p.astype(np.float64) for p in updates.params]
    grads = gradients(0, 1e-3)
    updates.apply(on(device), grads, 1.0)
    for p, g, decays, after in zip(before, grads, DECAY, updates.params, strict=True):
        g = g.astype(np.float64)
        mu, nu = 0.1 * g / -np.expm1(count * np.log(0.9)), 0.01 * g**2 / -np.expm1(count * np.log(0.99))
        np.testing.assert_allclose(after, p - mu / (np.sqrt(nu) + 1e-8) - 0.1 * decays * p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["gradient", "infinite gradient", "loss"])
def test_what_is_not_finite_changes_nothing(device, where):
    updates = Updates()
    updates.apply(on(device), gradients(0, 1.0))
    before = updates.all()
    grads, loss = gradients(1, 1.0), 1.0
    if where == "loss":
        loss = np.nan
    else:
        grads[3][999] = np.nan if where == "gradient" else -np.inf
    _, finite, *shadows = updates.apply(on(device), grads, loss=loss, shadow=True)
    assert finite == 0
    assert same_bits(updates.all(), before)
    assert same_bits(shadows, [p.astype(BF16) for p in updates.params])
    assert updates.apply(on(device), gradients(2, 1.0))[1] == 1
    assert updates.count == 2


def test_bf16_gradients_and_shadows(device):
    ours, plain = Updates(), Updates()
    grads = gradients(0, 1.0, BF16)
    norm, _, *shadows = ours.apply(on(device), grads, shadow=True)
    expected = plain.apply(adamw_reference, grads, shadow=True)
    np.testing.assert_allclose(norm, expected[0], rtol=1e-6)
    for actual, wanted in zip(ours.all(), plain.all(), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-6)
    assert same_bits(shadows, [p.astype(BF16) for p in ours.params])


def test_an_update_in_place(device):
    """Outputs in the buffers of the inputs, over many parameters: what a donated train state does."""
    size, shape = 20, (11, 9)
    arrays = [normal(*shape, seed=i) for i in range(2 * size)] + [np.zeros(shape, np.float32)] * (2 * size)
    operands = [*arrays, np.int32(0), np.float32(0.1), np.float32(1)]
    options = {**SETTINGS, "decay": (True,) * size}
    expected = run(device, plan_adamw, adamw_reference, *operands, **options)

    inputs = [ArraySpec(np.shape(x), np.asarray(x).dtype) for x in operands]
    outputs = [ArraySpec(x.shape, x.dtype) for x in expected]
    plan = plan_adamw(device.info, inputs, outputs, **options)
    buffers = [device.upload(np.asarray(x)) for x in operands]
    replaced = [*buffers[:size], *buffers[2 * size : 4 * size + 1], device.buffer(4), device.buffer(4)]
    scratch = [device.buffer(nbytes) for nbytes in plan.scratch]
    recorder = device.new_recorder(replay=True)
    record(recorder, plan, [*buffers, *replaced, *scratch])
    recorder.submit().wait()
    found = [buffer.read(array.dtype, array.shape) for buffer, array in zip(replaced, outputs, strict=True)]
    assert same_bits(found, expected)
    recorder.submit().wait()  # a second step
    assert replaced[3 * size].read(np.int32, ()) == 2


def test_moments_are_kept_in_f32(device):
    x, scalar = ArraySpec((3,), BF16), ArraySpec((), F32)
    operands = [x, x, x, x, ArraySpec((), np.dtype(np.int32)), scalar, scalar]
    with pytest.raises(ValueError, match=r"parameters and moments in float32, found bfloat16\[3\]"):
        plan_adamw(device.info, operands, [], decay=(True,), **SETTINGS)
