"""Compares the bits of parameters between the processes of a run, by a number for each array."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.distributed.processes import Processes
from gpt_jax.leaf_names import named_leaves


def fingerprints(params: Any) -> Any:
    """A sum of the bits of each array, by their places, so that any bit that differs shows: uint32 () each."""

    def fingerprint(leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
        return (words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(fingerprint, params)


class Alike:
    """Whether the devices of all processes are of one kind, as each describes its own: they are asked once.

    All processes ask at the same point of their work.
    """

    def __init__(self, processes: Processes, kind: str) -> None:
        self._processes, self.kind = processes, kind
        self._found: bool | None = None

    def __bool__(self) -> bool:
        if self._found is None:
            self._found = len(set(self._processes.gather(self.kind))) == 1
        return self._found


def processor() -> str:
    """The model of this host's processor; '' where the system does not tell."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return ""


def agree_on_bits(processes: Processes, found: Any, step: int) -> None:
    """Raises UserError, naming the first array and the processes, if their `fingerprints` after a step differ."""
    sums = named_leaves(jax.device_get(found))
    processes.agree({f"{name} after step {step}": int(value) for name, value in sums.items()})
