"""Programs cut into several submissions, for drivers that give up on a long one: where, and to no other result."""

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.runtime import command_buffer
from vk_kernels.runtime.executable import group_stages
from vk_kernels.runtime.open_devices import open_device

LONG, SHORT = 1e9, 1e-6  # milliseconds that no stage takes, and that every one does
STEPS = 6


@pytest.mark.parametrize(
    ("seconds", "limit", "firsts"),
    [
        ([], 1, [0]),
        ([5], 1, [0]),
        ([1, 1, 1], 3, [0]),
        ([1, 1, 1], 2, [0, 2]),
        ([1, 9, 1, 1], 2, [0, 1, 2]),
        ([9, 9, 9], 1, [0, 1, 2]),
    ],
)
def test_stages_are_one_submission_as_long_as_they_are_short_together(seconds, limit, firsts):
    assert group_stages(seconds, limit) == firsts


def update(state, x):
    """Several stages, with arrays in the arena, results beside the state, and an array that is read and written."""
    w, momentum = state
    gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)
    momentum = 0.9 * momentum + gradient
    return (w - 0.1 * momentum, momentum), jnp.sum(momentum**2)


def start():
    return (np.full((8, 8), 0.1, np.float32), np.zeros((8, 8), np.float32)), np.eye(8, dtype=np.float32)


def run(submit_ms: float) -> tuple[list[bytes], list[int], int]:
    """The results of every call of a training loop, the submissions that each was, and the stages of the function."""
    device = open_device(SELECTOR)
    before, device.submit_ms = device.submit_ms, submit_ms
    try:
        step = vk_kernels.jit(update, donate_argnums=0, device=SELECTOR)
        state, x = start()
        state = vk_kernels.device_put(state, SELECTOR)
        x = vk_kernels.device_put(x, SELECTOR)
        found, counts = [], []
        for _ in range(STEPS):
            submitted = device.queue.submitted
            state, norm = step(state, x)
            counts.append(device.queue.submitted - submitted)
            found.append(b"".join(np.asarray(part).tobytes() for part in (*state, norm)))
        profile = step.profile(state, x)
        assert len(profile.rows) == step.cost(state, x).dispatches
        return found, counts, step.cost(state, x).barriers + 1
    finally:
        device.submit_ms = before


@needs_vulkan
def test_results_are_the_same_bits_however_a_program_is_cut():
    whole, counts, stages = run(0)
    assert counts == [1] * STEPS
    assert stages > 3
    in_stages, counts, _ = run(SHORT)
    assert counts == [stages] * STEPS
    found, counts, _ = run(LONG)
    assert counts == [stages, stages] + [1] * (STEPS - 2)  # the second call is timed
    assert in_stages == found == whole


@needs_vulkan
@pytest.mark.parametrize(
    ("is_submitted", "error"),
    [(True, KeyboardInterrupt), (False, KeyboardInterrupt), (True, TimeoutError), (False, SystemExit)],
)
def test_what_a_signal_raises_between_two_submissions_leaves_no_array_half_written(monkeypatch, is_submitted, error):
    device = open_device(SELECTOR)
    whole, *_ = run(0)
    monkeypatch.setattr(device, "submit_ms", SHORT)
    step = vk_kernels.jit(update, donate_argnums=0, device=SELECTOR)
    state, x = start()
    state = vk_kernels.device_put(state, SELECTOR)
    for _ in range(3):
        state, _ = step(state, x)
    buffers = [array.buffer for array in state]
    submit, calls = command_buffer.CommandRecorder.submit, []

    def interrupted(self):
        calls.append(self)
        submission = submit(self) if is_submitted or len(calls) != 2 else None
        if len(calls) == 2:
            raise error
        return submission

    monkeypatch.setattr(command_buffer.CommandRecorder, "submit", interrupted)
    with pytest.raises(error):
        step(state, x)
    assert len(set(calls)) == step.cost(*start()).barriers + 1
    assert len(calls) == len(set(calls)) + (not is_submitted)
    found = [buffer.read(np.float32, (8, 8)).tobytes() for buffer in buffers]
    assert b"".join(found) == whole[3][: 2 * 8 * 8 * 4]


@pytest.mark.parametrize(("count", "most"), [(1, 62), (10, 138)])
@needs_vulkan
def test_a_repeated_call_runs_little_python(count, most):
    """Function calls, which time what a call costs wherever it runs: they were 67 and 147 with a look at each size."""
    fn = vk_kernels.jit(lambda *xs: sum(xs) + 1, device=SELECTOR)
    arrays = [vk_kernels.device_put(np.ones(4, np.float32), SELECTOR) for _ in range(count)]
    for _ in range(3):
        fn(*arrays).block_until_ready()
    found = []
    gc.disable()  # what it would call is of all that ran before
    sys.setprofile(lambda _frame, event, _what: found.append(event))
    try:
        fn(*arrays)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert sum(event in ("call", "c_call") for event in found) <= most


@needs_vulkan
def test_groups_of_outputs_are_done_one_after_another():
    def sums(x, w):
        found = []
        for _ in range(4):
            x = jnp.tanh(x @ w)
            found.append(x.sum(0))
        return found

    x, w = np.linspace(-1, 1, 64 * 48, dtype=np.float32).reshape(64, 48), np.eye(48, dtype=np.float32)
    whole, cut = (
        vk_kernels.jit(sums, device=SELECTOR, compiler_options=options)(x, w)
        for options in (None, {"output_groups": [(0, 1), (2,), (3,)]})
    )
    assert len({out.buffer.last_use for out in whole}) == 1
    first, second, third, last = (out.buffer.last_use for out in cut)
    assert first == second < third < last
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"output_groups \(\(4,\),\): the result has 4 leaves"):
        vk_kernels.jit(sums, device=SELECTOR, compiler_options={"output_groups": [[4]]})(x, w)
