"""Printing for commands: no terminal, pipe or full disk behind standard output may end a run.

Characters that the output cannot show are replaced. A reader that is gone ends `report` and `sample` as SIGPIPE would,
and training goes on without it: `log.txt` has every line.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

from gpt_jax.log import Log
from gpt_jax.storage.files import StorageError, explain, writing

CLOSED_PIPE = 128 + getattr(signal, "SIGPIPE", 13)  # exit code


def open_streams() -> None:
    """Gives a command standard streams that it can use, whatever it was started with.

    A closed one becomes the null device: else the next file that is opened takes its number, and what a library prints
    goes into that file.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115 it is open to the end
    with contextlib.suppress(AttributeError):  # not a text stream of the system: a notebook's or a test's
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def flushed_output() -> Iterator[None]:
    """Writes all that was printed, at the end; where standard output fails, ends the command in one line.

    For a pipe that nobody reads any more, the line is left out.

    Raises:
      SystemExit: always, with the exit code of what was inside, or of the failure.
    """
    code: str | int | None = 0
    try:
        try:
            yield
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        code = CLOSED_PIPE
        silence(sys.stdout)
    except OSError as error:
        if error.filename is not None:
            raise
        code = StorageError.exit_code  # `run_main` takes those of other files
        silence(sys.stdout)
        with contextlib.suppress(OSError):
            print(f"error: cannot write to standard output: {explain(error)}", file=sys.stderr)
    try:
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)
    sys.exit(code)


def silence(stream: TextIO) -> None:
    """Sends a stream to the null device, what it has not written yet too, so that nothing fails at the exit."""
    with contextlib.suppress(OSError, ValueError):  # no descriptor: a notebook's or a test's, or closed
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def print_line(line: str) -> str | None:
    """Prints a line; returns why standard output takes no more, or None. Never raises."""
    try:
        try:
            print(line, flush=True)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding
            print(line.encode(encoding, "replace").decode(encoding), flush=True)
    except BlockingIOError:
        return None  # a slow terminal that does not wait: the line comes with the next one
    except (OSError, ValueError) as error:  # ValueError: it was closed
        silence(sys.stdout)
        return str(error)
    return None


def make_log(file: TextIO) -> Log:
    """A function that prints a line and appends it to the run's log, which alone must be written."""
    closed = False

    def log(line: str) -> None:
        nonlocal closed
        failure = None if closed else print_line(line)
        if failure:
            closed = True
            line = f"{line}\nstandard output takes no more ({failure}): from here on only this file has all lines"
        with writing(file.name):
            print(line, file=file, flush=True)

    return log
