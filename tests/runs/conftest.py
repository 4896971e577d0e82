"""Fixtures of runs in the test's own process."""

from pathlib import Path

import pytest
from compile_cache import compile_cache
from tiny_run import write_chats


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sixty small dialogues."""
    return write_chats(tmp_path_factory.mktemp("corpus") / "chats.jsonl")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Has what one run of a module compiled taken from a folder by the others."""
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield
