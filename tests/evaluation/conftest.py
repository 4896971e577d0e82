"""A run that was never trained, with data, shared by the tests of a module."""

from pathlib import Path

import pytest
from tiny_run import write_chats
from untrained_run import write_untrained_run


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Path:
    """Two checkpoints, 1 and 2; the data are sixty dialogues."""
    folder = tmp_path_factory.mktemp("evaluated")
    return write_untrained_run(folder / "run", data__source=str(write_chats(folder / "chats.jsonl")))
