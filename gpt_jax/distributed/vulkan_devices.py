"""Vulkan devices of a run, one a process: each has all parameters and a part of each batch; they exchange gradients."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import vk_kernels
from gpt_jax.distributed.fingerprints import Alike, agree_on_bits, fingerprints
from gpt_jax.distributed.placement import OneDevice, Share
from gpt_jax.distributed.processes import Processes
from vk_kernels.bridge.host_exchange import HostExchange
from vk_kernels.bridge.jit import jit
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.host_links import HostLinks
from vk_kernels.runtime.shared_memory import SharedMemory

WAIT = 1800.0  # seconds for another process of the host, which may compile; who is lost a run's watch names long before


class VulkanDevices(OneDevice):
    """A device a process; see `steps` and `cut_step` for what they compute."""

    def __init__(self, processes: Processes, device: str = ""):
        """device: its kind and driver, by which processes know whether theirs are alike."""
        self.alike = Alike(processes, device)
        self.share = Share(first=processes.index, held=1, total=processes.count)
        self._processes = processes
        self._links: HostLinks | None = None
        self._exchange: HostExchange | None = None
        self._told = (0, 0.0, 0.0)

    @property
    def links(self) -> HostLinks:
        """The links of this host's processes, made when all of them first ask for them."""
        if self._links is None:
            mine = self._processes
            self._links = HostLinks(mine.name, mine.local_index, mine.local_count, WAIT)
        return self._links

    def make_exchange(self, device: Device, specs: Sequence[ArraySpec]) -> HostExchange:
        """Makes the sum of gradients over all processes; all of them call it."""
        between = None
        if self._processes.host_count > 1:
            from gpt_jax.distributed.between_hosts import BetweenHosts  # here: runs on one host need no collectives

            between = BetweenHosts(self._processes)
        self._exchange = HostExchange(device, self.links, specs, between)
        return self._exchange

    def broadcast(self, state: Any) -> Any:
        if self._processes.host_count > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, state))
        leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, state))
        links, nbytes = self.links, sum(leaf.nbytes for leaf in leaves)
        if links.index == 0:
            shared = SharedMemory.create(nbytes)
            shared.array[:nbytes] = np.concatenate([leaf.reshape(-1).view(np.uint8) for leaf in leaves])
            links.send_handle(shared.handle)
            links.announce(0)
        else:
            shared = SharedMemory.receive(links, nbytes)
            links.await_from(0, 0, "sharing the state")
        ends = np.cumsum([leaf.nbytes for leaf in leaves])
        parts = [shared.array[end - leaf.nbytes : end] for leaf, end in zip(leaves, ends, strict=True)]
        copies = [part.copy().view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, copies)

    def total(self, sums: np.ndarray) -> np.ndarray:
        return np.sum(self._processes.gather(sums.tolist()), axis=0)

    def measures(self) -> dict[str, float]:
        if self._exchange is None:
            return {}
        traffic = self._exchange.traffic
        now = traffic.exchanges, traffic.exposed, traffic.waited
        count, seconds, waited = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        if not count:
            return {}
        return {
            "exchange_ms": 1e3 * seconds / count,
            "exchange_wait_ms": 1e3 * waited / count,
            "exchange_bytes": self._exchange.nbytes,
        }

    def settle(self, state: Any, step: int) -> Any:
        if self.alike:
            agree_on_bits(self._processes, _fingerprints(state.params), step)
            return state
        return vk_kernels.device_put(self.broadcast(state))


_fingerprints = jit(fingerprints)
