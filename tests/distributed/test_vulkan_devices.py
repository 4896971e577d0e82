"""State and sums of processes that have a Vulkan device each. Threads stand for processes here."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from meeting import State, states_that_differ
from vulkan_devices import SELECTOR, needs_vulkan

from gpt_jax.distributed.processes import Processes
from gpt_jax.distributed.vulkan_devices import VulkanDevices
from gpt_jax.errors import UserError


class Gathering:
    """A `channel.Channel` of threads."""

    def __init__(self) -> None:
        self.hellos = [{"index": i, "pid": 10 + i, "host": "here"} for i in range(2)]
        self.values: list[Any] = [None, None]
        self.barrier = threading.Barrier(2)

    def of(self, index: int) -> "Gathering":
        part = Gathering()
        part.values, part.barrier, part.index, part.gathered = self.values, self.barrier, index, 0
        return part

    def gather(self, value: Any) -> list[Any]:
        self.gathered += 1
        self.values[self.index] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


@pytest.fixture
def both():
    name, all_of_them = uuid.uuid4().hex, Gathering()
    made = [VulkanDevices(Processes(i, 2, i, 2, ("here",) * 2, name=name, channel=all_of_them.of(i))) for i in range(2)]
    yield lambda act: list(ThreadPoolExecutor(2).map(act, made, range(2)))
    for each in made:
        if each._links:
            each._links.close()


def test_all_get_process_0s_state(both):
    state = {"step": np.int32(7), "w": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 3))}
    zeros = jax.tree.map(np.zeros_like, state)
    for found in both(lambda devices, index: devices.broadcast(zeros if index else state)):
        jax.tree.map(np.testing.assert_array_equal, found, state)
        assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


def test_sums_are_of_all_processes(both):
    for total in both(lambda devices, index: devices.total(np.array([1.5, 2]) * (index + 1))):
        np.testing.assert_array_equal(total, [4.5, 6])
    assert both(lambda devices, _: devices.measures()) == [{}, {}]


@needs_vulkan
def test_a_bit_that_differs_is_found_and_named_before_it_is_saved(both, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_DEVICE", SELECTOR)
    state, other = states_that_differ()
    for found in both(lambda devices, _: devices.settle(state, 3)):
        assert found is state

    def check(devices: VulkanDevices, index: int) -> str:
        with pytest.raises(UserError) as caught:
            devices.settle(other if index else state, 4)
        return str(caught.value)

    for line in both(check):
        assert line.startswith("h_0/w after step 4 is ")
        assert "process 1 (pid 11 on here)" in line


@needs_vulkan
def test_devices_of_different_kinds_go_on_from_process_0s_state(both, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_DEVICE", SELECTOR)
    state, other = states_that_differ()

    def settle(devices: VulkanDevices, index: int) -> State:
        devices.alike.kind = ("one vendor's", "another's")[index]
        devices.settle(other if index else state, 4)
        found = devices.settle(other if index else state, 5)
        assert devices._processes.channel.gathered == 1  # the kinds, asked once for all checkpoints
        return found

    for found in both(settle):
        jax.tree.map(np.testing.assert_array_equal, found, state)
