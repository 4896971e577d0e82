"""A folder that keeps what XLA compiled: of tests that compile the same programs, the first alone waits for them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
    """Has what is compiled inside kept in a folder, and taken from there."""
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
