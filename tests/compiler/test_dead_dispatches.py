"""Dispatches whose results nobody reads are left out. No device, but for the last."""

import jax
import jax.numpy as jnp
import numpy as np
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.compiler.buffer_assignment import PlannedDispatch, PlannedStep
from vk_kernels.compiler.dead_dispatches import drop_dead_dispatches
from vk_kernels.compiler.ir import Value
from vk_kernels.compiler.partition import Step


def value():
    return Value((64,), np.dtype(np.float32))


def step(inputs, outputs, *dispatches, scratch=()):
    """A step of dispatches (label, what each reads, what it writes), by number in inputs, outputs and scratch."""
    planned = tuple(
        PlannedDispatch(label, b"", (*reads, *writes), (False,) * len(reads) + (True,) * len(writes), (1, 1, 1))
        for label, reads, writes in dispatches
    )
    return PlannedStep(Step(tuple(inputs), tuple(outputs), 0), planned, tuple(scratch), frozenset())


def kept(planned, *outputs):
    return ["".join(one.label for one in each.dispatches) for each in drop_dead_dispatches(planned, outputs)]


def test_of_a_products_gradient_only_what_is_read_is_computed():
    """dx = a; dw = c by partial sums b in scratch."""
    dy, x, w, dx, dw = (value() for _ in range(5))
    gradient = step([dy, x, w], [dx, dw], ("a", [0, 2], [3]), ("b", [0, 1], [5]), ("c", [5], [4]), scratch=(64,))
    assert kept([gradient], dx, dw) == ["abc"]
    assert kept([gradient], dx) == ["a"]
    assert kept([gradient], dw) == ["bc"]


def test_what_only_dead_dispatches_read_goes_with_them():
    dy, x, again, w, dx, dw = (value() for _ in range(6))
    recompute = step([x], [again], ("r", [0], [1]))
    gradient = step([dy, again, w], [dx, dw], ("a", [0, 2], [3]), ("b", [0, 1], [4]))
    assert kept([recompute, gradient], dx, dw) == ["r", "ab"]
    assert kept([recompute, gradient], dx) == ["", "a"]


def test_all_that_adds_to_a_result_stays():
    x, y, total = value(), value(), value()
    assert kept([step([x, y], [total], ("a", [0], [2]), ("b", [1], [2]))], total) == ["ab"]


@needs_vulkan
def test_a_gradient_of_one_operand_is_half_of_the_products_and_no_memory_for_the_other():
    def loss(x, w, v):
        return (ops.matmul(ops.matmul(x, w), v) ** 2).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 48), (48, 64), (64, 16))]
    costs, counts = [], []
    for argnums in ((0, 1, 2), 0):
        lowered = vk_kernels.jit(jax.grad(loss, argnums), device=SELECTOR).lower(*shapes)
        costs.append(lowered.cost())
        counts.append(sum(command.label.startswith("matmul") for command in lowered.program.commands))
    assert counts == [6, 4]
    product = 2 * 32 * 48 * 64 + 2 * 32 * 64 * 16
    assert costs[0].flops - costs[1].flops == product
    assert costs[1].arena_bytes < costs[0].arena_bytes

    arrays = [
        np.random.default_rng(i).integers(-3, 4, shape.shape).astype(np.float32) for i, shape in enumerate(shapes)
    ]
    found = vk_kernels.jit(jax.grad(loss), device=SELECTOR)(*arrays)
    np.testing.assert_array_equal(found, jax.grad(loss)(*arrays))
