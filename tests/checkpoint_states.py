"""States to save, and what is done to the checkpoints of them."""

from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax.checkpoint import Checkpointer

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, 50), mask={"w": True, "half": True, "bits": False}),
)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: Any


def make_state(seed: int, width: int = 64) -> State:
    """A state whose every leaf depends on the seed; odd shapes, a scalar, bf16 and uint32 among them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": jax.random.normal(keys[0], (37, width)),
        "half": jax.random.normal(keys[1], (5, 3), jnp.bfloat16),
        "bits": jax.random.bits(keys[2], (7,)),
    }
    opt_state = jax.tree.map(lambda leaf: jnp.full_like(leaf, seed + leaf.size), OPTIMIZER.init(params))
    return State(jnp.asarray(seed, jnp.int32), params, opt_state)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def assert_identical(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def open_(directory: Path, keep_last: int = 3, keep_every: int | None = None, **options) -> Checkpointer:
    return Checkpointer(directory, keep_last=keep_last, keep_every=keep_every, **options)


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest(directory: Path) -> Path:
    return max(files(directory), key=lambda path: path.stat().st_size)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def restored_step(directory: Path, target: Any) -> int:
    with open_(directory) as checkpointer:
        return checkpointer.restore_latest(target).step
