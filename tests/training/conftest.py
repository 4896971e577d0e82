"""Fixtures of runs as a user starts them, and of checkpoints."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_states import make_state, open_
from whole_run import run, write_chats


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Has a folder of a name filled by the first of the workers that asks for it; the others wait, and share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, complete = base / name, base / f"{name}.complete"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                complete.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def corpus(once) -> Path:
    """A few hundred small dialogues, whose token cache is beside them."""
    return once("corpus", lambda folder: write_chats(folder / "chats.jsonl")) / "chats.jsonl"


@pytest.fixture(scope="session")
def straight(corpus, once) -> Path:
    """A run from start to end, without incident. Tests leave it as it is."""

    def train(folder: Path) -> None:
        done = run(corpus, folder / "run")
        assert done.returncode == 0, done.stderr

    return once("straight", train) / "run"


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
