"""A run on disk that answers: alike by the same seed, from another checkpoint, and nothing of its folder is written."""

import contextlib
import hashlib
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from untrained_run import write_untrained_run

from gpt_jax.errors import UserError
from gpt_jax.inference.chat_session import ChatSession
from gpt_jax.inference.served_run import open_run
from gpt_jax.serving.app import make_app


def digests(folder: Path) -> dict[Path, tuple[int, str]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_untrained_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.mark.slow
def test_a_run_answers_and_nothing_of_its_folder_is_written(folder):
    before = digests(folder)
    with contextlib.ExitStack() as stack:
        run = open_run(str(folder), stack, slots=2, max_waiting=9)
        run.warm_up()
        assert run.name == "tiny"
        assert run.description.endswith("/checkpoints/1 (best validation loss 1.0000)")
        session = ChatSession(run, run.defaults)
        session.command("/seed 3")
        session.command("/max 12")
        one = "".join(session.ask("a question"))
        session.command("/reset")
        assert session.command("/step latest").endswith("/checkpoints/2")
        other = "".join(session.ask("a question"))
        session.command("/reset")
        session.command("/step best")
        again = "".join(session.ask("a question"))
        assert one == again != other
        with pytest.raises(UserError, match="has no checkpoint '3': there are 1, 2, best and latest"):
            session.command("/step 3")

        client = TestClient(make_app(run))
        asked = {"messages": [{"role": "user", "content": "a question"}], "seed": 3, "max_tokens": 12, "n": 3}
        choices = client.post("/v1/chat/completions", json=asked).json()["choices"]
        assert choices[0]["message"]["content"].strip() == one.strip()
        assert len({choice["message"]["content"] for choice in choices}) == 3
        long = {**asked, "messages": [{"role": "user", "content": "z" * 40}]}
        assert client.post("/v1/chat/completions", json=long).status_code == 400
    assert digests(folder) == before
