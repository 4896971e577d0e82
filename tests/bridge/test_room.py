"""A device without room gives up what is kept for next calls: callers have all that they hold."""

import jax
import numpy as np
import pytest
from vulkan_devices import SELECTOR, memory_at_rest, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.errors import OutOfMemoryError
from vk_kernels.runtime.memory import Memory
from vk_kernels.runtime.open_devices import open_device

pytestmark = needs_vulkan

SIZE = 1 << 18  # elements


@pytest.fixture
def room(monkeypatch):
    """Gives the device room for so many arrays of SIZE, beside what is in use."""
    device = open_device(SELECTOR)
    vk_kernels.device_get(put(0))  # staging memory, where a device has it, is there before the room is measured
    device._make_room()  # of what other tests' functions keep, which would be given up in the midst of one
    memory_at_rest(device)
    allocated = Memory._allocated

    def with_room_for(count: int) -> None:
        device.finish()
        most = device.memory_stats().used + int((count + 0.5) * 4 * SIZE)

        def limited(memory, nbytes, reserved, kind):
            if memory is device.memory and memory._used + reserved > most:
                raise OutOfMemoryError("out of device memory")
            return allocated(memory, nbytes, reserved, kind)

        monkeypatch.setattr(Memory, "_allocated", limited)

    return with_room_for


def put(number: float):
    return vk_kernels.device_put(np.full(SIZE, number, np.float32), SELECTOR)


def test_calls_on_new_arrays_need_room_for_the_arrays_of_one(room):
    double = vk_kernels.jit(lambda x: x * 2, device=SELECTOR)
    room(3)
    for number in range(12):
        x = put(number)
        y = double(x)
        assert (y[0], y[-1]) == (2 * number, 2 * number)
        del x, y


def test_what_other_functions_keep_goes_too_and_a_state_stays(room):
    grow = vk_kernels.jit(lambda state, x: ((state[0] + x[0],), x.sum()), donate_argnums=0, device=SELECTOR)
    double = vk_kernels.jit(lambda x: x * 2, device=SELECTOR)
    state, ones = (put(0),), np.ones(4, np.float32)
    for _ in range(3):
        state, total = grow(state, ones)
    room(2)
    for number in range(6):
        x = put(number)
        assert double(x)[0] == 2 * number
        state, total = grow(state, ones)
        del x
    assert (state[0][7], total) == (9, 4)


def test_a_function_of_many_shapes_needs_room_for_one_at_a_time(room):
    twice = vk_kernels.jit(lambda x: ops.gelu(ops.gelu(x)), device=SELECTOR)
    assert twice.cost(jax.ShapeDtypeStruct((SIZE,), np.float32)).arena_bytes == 4 * SIZE
    room(4)
    for number in [*range(5), *range(5)]:
        y = twice(np.full(SIZE - 256 * number, number + 9, np.float32))
        assert (y.shape, y[0], y[-1]) == ((SIZE - 256 * number,), number + 9, number + 9)


@pytest.mark.parametrize("is_new", [True, False])
def test_all_results_that_are_held_stay_as_they_are(room, is_new):
    add = vk_kernels.jit(lambda x, y: x + y[0], device=SELECTOR)
    room(10)
    x, held = put(1), []

    def hold_all() -> None:
        while len(held) < 20:
            held.append(add(put(1) if is_new else x, np.full(4, len(held), np.float32)))

    with pytest.raises(OutOfMemoryError):
        hold_all()
    assert 6 <= len(held) <= 10
    for number, result in enumerate(held):
        np.testing.assert_array_equal(jax.device_get(np.asarray(result)), np.full(SIZE, 1 + number, np.float32))
    held.clear()
    assert add(x, np.zeros(4, np.float32))[3] == 1
