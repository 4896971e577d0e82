"""Sums over hosts, each of which is a device of XLA's here."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.distributed.between_hosts import sum_over_hosts


def test_all_hosts_have_the_bits_of_the_sum_in_float32_in_their_order():
    devices = np.array(jax.devices("cpu")[:2])[:, None]
    mesh = Mesh(devices, ("host", "local"))
    sharding = NamedSharding(mesh, PartitionSpec("host", "local"))
    for dtype in (jnp.float32, jnp.bfloat16):
        parts = np.random.default_rng(0).standard_normal((2, 1, 2, 5)).astype(dtype)
        found = np.asarray(jax.jit(sum_over_hosts(mesh))(jax.device_put(parts, sharding)))
        wanted = (parts[0].astype(np.float32) + parts[1].astype(np.float32)).astype(dtype)
        assert found[0].tobytes() == found[1].tobytes() == wanted.tobytes()
