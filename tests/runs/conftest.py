"""Fixtures of runs in the test's own process."""

from pathlib import Path

import pytest
from tiny_run import write_chats


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sixty small dialogues."""
    return write_chats(tmp_path_factory.mktemp("corpus") / "chats.jsonl")
