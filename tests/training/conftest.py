"""Fixtures of runs as a user starts them."""

from pathlib import Path

import pytest
from whole_run import run, write_chats


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A few hundred small dialogues, whose token cache is beside them."""
    return write_chats(tmp_path_factory.mktemp("corpus") / "chats.jsonl")


@pytest.fixture(scope="session")
def straight(corpus, tmp_path_factory) -> Path:
    """A run from start to end, without incident. Tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = run(corpus, workdir)
    assert done.returncode == 0, done.stderr
    return workdir
