"""Printing to what cannot be printed to: a closed pipe, a full disk, a terminal of few characters."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from gpt_jax.output import make_log, print_line, silence
from gpt_jax.runs.folder import open_folder
from gpt_jax.storage.files import StorageError

ROOT = Path(__file__).parent.parent
COMMAND = """
import sys
from gpt_jax.cli import run_main
def main(argv):
    for i in range(20000):
        print("line", i, "\\ufffd\\u2019")
run_main(main)
"""


def command(shell: str, **variables: str) -> subprocess.CompletedProcess:
    """A command of the package that prints 20,000 lines, as `run` in a shell."""
    environment = {**os.environ, **variables}
    shell = f'run() {{ {sys.executable} -c "$CODE"; }}; {shell}'
    environment["CODE"] = COMMAND
    return subprocess.run(
        ["bash", "-c", shell],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    ("shell", "code", "error"),
    [
        ("run | head -1 >/dev/null; exit ${PIPESTATUS[0]}", 141, ""),
        (
            "PYTHONUNBUFFERED=1 run > /dev/full",
            1,
            "error: standard output or a file without a name cannot be written or read: No space left on device; "
            "free some space there\n",
        ),
        ("run >&-", 0, ""),
        ("run > /dev/null 2> /dev/full", 0, ""),
    ],
)
def test_commands_end_in_a_line_or_none(shell, code, error):
    done = command(shell)
    assert (done.returncode, done.stderr) == (code, error)


def test_a_failing_file_without_a_name_is_not_taken_for_the_output():
    code = """
import gc
from gpt_jax.cli import run_main
gc.disable()  # as imports leave it
def main(argv):
    assert gc.isenabled()
    print("a line")
    raise OSError(5, "Input/output error")
run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "a line\n")
    expected = "error: standard output or a file without a name cannot be written or read: Input/output error; "
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # the line is still to be written when the file fails
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=buffered, stdout=full, stderr=-1, text=True, check=False
        )
    assert done.stderr.startswith("error: cannot write to standard output: No space left on device; ")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_the_output_lacks_are_replaced(encoding):
    done = command("run | tail -1", PYTHONIOENCODING=encoding)
    assert done.stdout.startswith("line 19999 ")
    assert done.stderr == ""


def test_a_closed_stream_takes_no_files_number():
    code = "import os; from gpt_jax.output import open_streams; open_streams(); print(os.open('/dev/null', 0) > 2)"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" <&- 2>&-'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)


def test_the_log_has_what_the_terminal_lacks(tmp_path, monkeypatch):
    terminal = Terminal("ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with (tmp_path / "log.txt").open("a", encoding="utf-8") as file:
        log = make_log(file)
        log("naïve 真")
        assert terminal.buffer.getvalue() == b"na?ve ?\n"
        terminal.close()
        log("after")
        log("the end")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["naïve 真", "after"]
    assert lines[2].startswith("standard output takes no more")
    assert lines[3:] == ["the end"]


def test_a_log_that_cannot_be_written_is_named():
    file = Path("/dev/full").open("a")  # noqa: SIM115 its close would fail
    log = make_log(file)
    with pytest.raises(StorageError, match="cannot write /dev/full: No space"):
        log("a line")
    silence(file)  # or its close fails as well
    file.close()


def test_a_run_whose_log_cannot_be_written_ends_by_what_it_says(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*log.txt: No space left"), open_folder(tmp_path) as log:
        log("a line")


def test_a_pipe_that_nobody_reads_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert "Broken pipe" in print_line("a line")
        assert print_line("another") is None  # it goes nowhere
