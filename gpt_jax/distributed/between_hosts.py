"""Sums over hosts, of what the processes of each host have added up: JAX's collectives on processors, by gloo.

Process i of each host has slice i. Of H hosts each adds up 1 / H of it, in f32 and in the order of the hosts, and all
get the sum: 2 (H - 1) / H of the slice's bytes go out of a host, in the slice's own dtype.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.distributed.processes import Processes
from gpt_jax.errors import UserError


class BetweenHosts:
    """Adds up slices over hosts; all processes of all hosts call it, in the same order, after `Processes.join_jax`."""

    def __init__(self, processes: Processes):
        by_host: dict[str, list[int]] = {}
        for index, host in enumerate(processes.machines):
            by_host.setdefault(host, []).append(index)
        if len({len(members) for members in by_host.values()}) > 1:
            raise UserError(
                "hosts have different numbers of processes: "
                + ", ".join(f"{processes.hosts[members[0]]} {len(members)}" for members in by_host.values())
                + "; Vulkan's exchange needs the same on all"
            )
        devices = {device.process_index: device for device in reversed(jax.devices("cpu"))}
        grid = [[devices[index] for index in members] for members in by_host.values()]
        self.count = len(grid)
        self._device = devices[processes.index]
        self._mesh = Mesh(np.array(grid), ("host", "local"))
        self._sum = jax.jit(sum_over_hosts(self._mesh))

    def __call__(self, part: np.ndarray, size: int) -> None:
        """Adds to a slice, in place, the other hosts'. size: elements of the longest slice of any process."""
        each = -(-size // self.count)
        padded = np.zeros((1, 1, self.count, each), part.dtype)
        padded.reshape(-1)[: part.size] = part
        shape = *self._mesh.devices.shape, self.count, each
        own = jax.device_put(padded, self._device)
        sharding = NamedSharding(self._mesh, PartitionSpec("host", "local"))
        whole = jax.make_array_from_single_device_arrays(shape, sharding, [own])
        total = np.asarray(self._sum(whole).addressable_data(0))
        part[:] = total.reshape(-1)[: part.size]


def sum_over_hosts(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """The sum over the first axis of a mesh, (H, L), of an array (H, L, H, N), sharded over both; as sharded, the same
    on all hosts."""
    places = PartitionSpec("host", "local")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=places, out_specs=places)
    def add_up(x: jax.Array) -> jax.Array:
        parts = jax.lax.all_to_all(x[0, 0], "host", 0, 0)  # (H, N): every host's part of what this one adds up
        total = parts[0].astype(jnp.float32)
        for part in parts[1:]:
            total = total + part.astype(jnp.float32)
        return jax.lax.all_gather(total.astype(x.dtype), "host")[None, None]

    return add_up
