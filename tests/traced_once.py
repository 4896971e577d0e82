"""Runs in the test's own process share what they trace: to trace it again is most of what a tiny run takes."""

import functools
from typing import Any

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from gpt_jax.backend import Backend
from gpt_jax.distributed.placement import OneDevice
from gpt_jax.inference import decoder
from gpt_jax.training import programs

# All of a config that the programs of one device follow from.
READ = ("seed", "num_steps", "model", "optimizer", "lora", "accumulate_steps", "matmul_precision")


def shared_programs(patch: pytest.MonkeyPatch) -> dict[FrozenConfigDict, programs.Programs]:
    """Has `make_programs` give XLA's programs of one device once for each config; gives those made so far."""
    made: dict[FrozenConfigDict, programs.Programs] = {}
    make, wrap = programs.make_programs, decoder._on_leaves

    def make_once(config: ConfigDict, backend: Backend) -> programs.Programs:
        if backend.name != "xla" or type(backend.placement) is not OneDevice:
            return make(config, backend)
        key = FrozenConfigDict({name: config[name] for name in READ})
        if key not in made:
            made[key] = make(config, backend)
        return made[key]

    @functools.cache
    def wrap_once(fn: Any, options: tuple, config: Any) -> Any:
        return wrap(functools.partial(fn, **dict(options)), config)

    patch.setattr(programs, "make_programs", make_once)
    patch.setattr(
        decoder, "_on_leaves", lambda partial, config: wrap_once(partial.func, (*partial.keywords.items(),), config)
    )
    return made
