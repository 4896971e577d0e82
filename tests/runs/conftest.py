"""Fixtures of runs in the test's own process."""

from pathlib import Path

import jax
import pytest
from tiny_run import write_chats


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sixty small dialogues."""
    return write_chats(tmp_path_factory.mktemp("corpus") / "chats.jsonl")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Has what one run of a module compiled taken from a folder by the others."""
    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    settings |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
