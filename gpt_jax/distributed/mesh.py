"""State and batches on a mesh of JAX's devices, of one process or of several.

Programs are those of one device, jitted with shardings: XLA splits them, and adds the exchange. The rows of a batch are
split; parameters and optimizer are on every device (`replicated`), or split by their largest axis that allows it, and
gathered for the gradient (`fsdp`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.distributed.fingerprints import Alike, agree_on_bits, fingerprints, processor
from gpt_jax.distributed.placement import OneDevice, Share
from gpt_jax.distributed.processes import ALONE, Processes

_AXIS = "devices"
_fingerprints = jax.jit(fingerprints)


class OnMesh(OneDevice):
    """A `OneDevice` of many devices. shard: `config.shard`. processes: that have them."""

    def __init__(self, devices: Sequence[jax.Device], shard: str, processes: Processes = ALONE) -> None:
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        mine = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        self.share = Share(mine[0], len(mine), len(devices))
        self._processes = processes
        self.alike = Alike(processes, f"{devices[mine[0]].device_kind} {processor()}")
        self._mesh = Mesh(np.array(devices), (_AXIS,))
        self._is_split = shard == "fsdp"
        self._on_all = NamedSharding(self._mesh, PartitionSpec())
        self._replicate = jax.jit(lambda x: x, out_shardings=self._on_all)

    def sharding(self, leaf: Any) -> NamedSharding:
        """The sharding of a leaf of the state."""
        sizes = [size if size % self.share.total == 0 else 0 for size in np.shape(leaf)]
        if not self._is_split or not any(sizes):
            return self._on_all
        axis = int(np.argmax(sizes))
        return NamedSharding(self._mesh, PartitionSpec(*([None] * axis), _AXIS))

    def step_options(self, state: Any) -> dict[str, Any]:
        leaves = tuple(map(self.sharding, jax.tree.leaves(state)))
        return {"out_shardings": (leaves, self._on_all)}

    def gather(self, params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, self._on_all)

    def scatter(self, gradient: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.sharding(leaf)), gradient)

    def broadcast(self, state: Any) -> Any:
        if jax.process_count() == 1:
            return state
        return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, state))

    def put(self, state: Any) -> Any:
        """A pytree of host arrays, the same on all processes, to the devices as `sharding` says."""

        def put_leaf(leaf: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, self.sharding(leaf), lambda index: leaf[index])

        return jax.tree.map(put_leaf, state)

    def batch(self, batch: dict[str, np.ndarray], parts: int = 1) -> dict[str, Any]:
        def put_rows(rows: np.ndarray) -> jax.Array:
            split = PartitionSpec(None, _AXIS) if parts > 1 else PartitionSpec(_AXIS)
            local = rows.reshape(parts, -1, rows.shape[-1]) if parts > 1 else rows
            return jax.make_array_from_process_local_data(NamedSharding(self._mesh, split), local)

        return {name: put_rows(rows) for name, rows in batch.items()}

    def own(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self._gathered(leaf).addressable_data(0), tree)

    def whole(self, tree: Any) -> Any:
        # One leaf after another, so that no device holds all of a state that is split.
        return jax.tree.map(lambda leaf: np.asarray(self._gathered(leaf).addressable_data(0)), tree)

    def settle(self, state: Any, step: int) -> Any:
        if self._processes.count == 1:
            return state
        if not self.alike:
            return self.put(self.broadcast(self.whole(state)))
        # Of what is split, each process has another part.
        own = jax.tree.map(lambda x: x.addressable_data(0) if x.is_fully_replicated else None, state.params)
        agree_on_bits(self._processes, _fingerprints(own), step)
        return state

    def _gathered(self, leaf: jax.Array) -> jax.Array:
        # One after another: of many gathers under way at once the devices of a processor can wait for each other until
        # XLA aborts the process, since each holds a thread.
        return leaf if leaf.is_fully_replicated else jax.block_until_ready(self._replicate(leaf))
