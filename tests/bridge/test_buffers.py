"""Functions of more arrays than a kernel of the device may bind."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.runtime.open_devices import open_device

pytestmark = needs_vulkan

BINDS = 8  # of a device between the least that Vulkan asks for, 4, and the 16 to 64 of small ones
ARRAYS = [np.arange(3 * (i % 3 + 1), dtype=np.float32).reshape(-1, 3) + 10 * i for i in range(70)]
ROWS = [array[:1] for array in ARRAYS]


def tangled(*arrays):
    """Wide in several places, one of which feeds the other, with a reduction between."""
    whole = jnp.concatenate(arrays[:30]) * 2
    total = sum(x.sum(axis=0) for x in arrays)
    return whole + total[None], jnp.stack([x[0] * total[0] for x in arrays]), jnp.concatenate(arrays, axis=0).max()


@pytest.mark.parametrize(
    ("fn", "arrays"),
    [
        (lambda *xs: jnp.concatenate(xs), ARRAYS),
        (lambda *xs: jnp.concatenate([x + y for x, y in itertools.pairwise(xs)], axis=1), ROWS),
        (lambda *xs: sum(xs), ROWS),
        (lambda *xs: jnp.stack(xs).std(axis=0), ROWS),
        (lambda *xs: jnp.sqrt(sum(jnp.sum(x * x) for x in xs)), ARRAYS),
        (tangled, ARRAYS),
        (lambda *xs: [x.reshape(3, 1) for x in xs], ROWS),
        (lambda *xs: [xs[0], *xs, xs[0]], ROWS),
    ],
    ids=["concatenate", "of sums", "sum", "stack", "norm", "tangled", "many results", "copies"],
)
def test_they_are_cut_into_kernels_that_bind_fewer(fn, arrays, monkeypatch):
    device = open_device(SELECTOR)
    monkeypatch.setattr(device, "limits", dataclasses.replace(device.limits, storage_buffers=BINDS))
    jitted = vk_kernels.jit(fn, device=SELECTOR)
    assert max(len(command.operands) for command in jitted.lower(*arrays).program.commands) <= BINDS
    for found, expected in zip(jax.tree.leaves(jitted(*arrays)), jax.tree.leaves(jax.jit(fn)(*arrays)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
