"""Fixtures of small sources."""

import pytest


@pytest.fixture
def chats(tmp_path):
    """A small file of the user's own: 200 dialogues."""
    path = tmp_path / "chats.txt"
    path.write_text("".join(f"<|user|>word {n}<|assistant|>answer {n}<|end_of_text|>\n" for n in range(200)))
    return path
