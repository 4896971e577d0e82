"""Processes of the package's commands by the hundred: a fork of this one, which has imported everything, is a start
that costs milliseconds. Nothing here may open a device or start a thread before it forks.
"""

import contextlib
import dataclasses
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import gpt_jax.report
import gpt_jax.sample
import gpt_jax.training.train  # noqa: F401 for the forks

LIMIT = 600  # seconds that a process may take
TRACEBACK = "Traceback (most recent call last)"


@dataclasses.dataclass
class Ended:
    """The end of a process. code: its exit code, or minus the signal that ended it; None: it took too long."""

    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def problem(self, *codes: int) -> str:
        """The fault of an end that should have one of these codes; a failure must be one line."""
        printed = self.err + self.out
        if TRACEBACK in printed:
            place = printed.index(TRACEBACK)
            return f"a traceback: {printed[place:][-2500:]}"
        if self.code not in codes:
            return f"exit code {self.code}, not {codes}: {self.err.strip()[-300:]}"
        if self.code in (1, 2) and len(self.errors) != 1:
            return f"{len(self.errors)} error lines: {self.err.strip()[-300:]}"
        return ""


class Process:
    """One fork that runs a command."""

    def __init__(
        self,
        command: str,
        arguments: Sequence[str],
        *,
        limits: Sequence[tuple[int, int]] = (),
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts `python -m COMMAND ARGUMENTS`.

        Args:
          limits: pairs of a resource, such as RLIMIT_FSIZE, and its value.
          prepare: called in the fork before the command.
        """
        self._out, self._err = (tempfile.NamedTemporaryFile(prefix="campaign-") for _ in range(2))  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(command, arguments, limits, prepare)
        self.code: int | None = None

    def _run(self, command: str, arguments: Sequence[str], limits: Sequence, prepare: Callable[[], None]) -> None:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._err.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for what, value in limits:
                resource.setrlimit(what, (value, resource.getrlimit(what)[1]))
            prepare()
            sys.argv = sys.orig_argv = [command, *map(str, arguments)]
            try:
                runpy.run_module(command, run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def send(self, number: int) -> None:
        if not self.poll():
            os.kill(self.pid, number)

    def wait(self, limit: float = LIMIT) -> Ended:
        deadline = time.monotonic() + limit
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(0.005)
        late = not self.poll()
        if late:
            self.send(signal.SIGKILL)
            while not self.poll():
                time.sleep(0.005)
        return Ended(None if late else self.code, *(read(file.name) for file in (self._out, self._err)))


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def call(command: str, *arguments: str | Path, **options) -> Ended:
    return Process(command, [str(argument) for argument in arguments], **options).wait()
