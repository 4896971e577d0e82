"""Fixtures of runs in the test's own process."""

from pathlib import Path

import pytest
from synthetic_run import write_run
from tiny_run import write_chats

from gpt_jax.runs.load import RunData, load_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sixty small dialogues."""
    return write_chats(tmp_path_factory.mktemp("corpus") / "chats.jsonl")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A made-up run's folder."""
    return write_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def run(workdir) -> RunData:
    return load_run(workdir)
