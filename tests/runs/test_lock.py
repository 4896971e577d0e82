"""One process at a time, and what is left of one that dies."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from gpt_jax.storage.lock import LockedError, is_held, lock, wait_for_lock

ROOT = Path(__file__).parents[2]
HOLDER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from gpt_jax.storage.lock import lock
    with lock(Path(sys.argv[1]), print):
        print("held", flush=True)
        sys.stdin.readline()
""")


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock until it reads a line."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "lock"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_told_who_holds_it(tmp_path, other):
    with pytest.raises(LockedError, match=rf"^process {other.pid} on .+ since 20..-"), lock(tmp_path / "lock", print):
        pass
    assert other.poll() is None


def test_the_lock_ends_with_its_process(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "lock").exists()
    with lock(tmp_path / "lock", print):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()


def test_waiting_says_for_whom(tmp_path, other):
    said = []

    def log(line: str) -> None:
        said.append(line)
        other.stdin.write("\n")
        other.stdin.flush()

    with wait_for_lock(tmp_path / "lock", log):
        assert len(said) == 1
        assert f"held by process {other.pid} on " in said[0]


def test_the_same_process_is_refused_too(tmp_path):
    with lock(tmp_path / "lock", print):
        with pytest.raises(LockedError), lock(tmp_path / "lock", print):
            pass
        with pytest.raises(LockedError), lock(tmp_path / "lock", print):  # the refused one has not released it
            pass


def test_a_lock_file_that_was_removed_between_open_and_lock_is_no_lock(tmp_path, monkeypatch):
    import fcntl

    flock, path = fcntl.flock, tmp_path / "lock"

    def removed_meanwhile(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with lock(path, print):
        assert path.exists()
        with pytest.raises(LockedError), lock(path, print):
            pass


def test_a_folder_that_goes_takes_the_lock_with_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with lock(folder / "lock", print):
        (folder / "lock").unlink()
        folder.rmdir()
    assert not folder.exists()


def test_where_there_are_no_locks_the_run_says_so(tmp_path, monkeypatch):
    import errno
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = []
    with lock(tmp_path / "lock", said.append):
        pass
    assert len(said) == 1
    assert "No locks available" in said[0]


def test_a_lock_is_had_as_soon_as_a_slow_look_ends(tmp_path):
    path = tmp_path / "lock"
    path.write_text("left by a kill")
    with path.open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        ends = threading.Timer(0.5, fcntl.flock, (looker, fcntl.LOCK_UN))
        ends.start()
        with lock(path, print):
            assert is_held(path) is True
        ends.join()
