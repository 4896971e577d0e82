"""Fixtures of runs as a user starts them, and of checkpoints."""

import shutil
from pathlib import Path

import pytest
from checkpoint_states import make_state, open_
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


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A directory with the checkpoints 100 and 200: states of seed 100 and 200."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with open_(directory) as checkpointer:
        for step in (100, 200):
            checkpointer.save(step, make_state(step), {"next_batch": step})
    return directory


@pytest.fixture
def copy(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run" / "checkpoints"))
