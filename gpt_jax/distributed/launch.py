"""Starts the processes of a run on one host, one a device, and stays until the last has ended.

Process 0 has the terminal. Of the others only what they say when process 0 died without a word is shown.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from gpt_jax.distributed.channel import BEAT, SAVING, SILENCE, hold_port

LAUNCHER = "GPT_JAX_LAUNCHER"  # variable of a launched process: the process id of its launcher
_PR_SET_PDEATHSIG = 1
_FORWARDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
_GRACE = SILENCE + SAVING + 5 * BEAT  # seconds: after one has died, the others have ended by then by themselves
_POLL = 0.05  # seconds


def launch(count: int, command: Sequence[str] | None = None) -> int:
    """Runs this program again as `count` processes of one run; returns the exit code of the run.

    command: what to run; None: the command line of this process.
    """
    command = [sys.executable, *sys.orig_argv[1:]] if command is None else [*command]
    environment = {**os.environ, LAUNCHER: str(os.getpid())}
    children: list[subprocess.Popen[bytes]] = []
    previous = {}
    stops: list[int] = []

    def forward(number: int, _: object) -> None:
        if signal.Signals(number).name != "SIGUSR1":  # which saves, and is over
            stops.append(number)
        for child in children:
            with contextlib.suppress(OSError):
                child.send_signal(number)

    with contextlib.ExitStack() as stack:
        place = f"127.0.0.1:{stack.enter_context(hold_port())},{count}"  # to the end: process 0 listens after seconds
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]
        for number in _FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, forward)
        stack.callback(lambda: [signal.signal(number, handler) for number, handler in previous.items()])
        stack.callback(_end, children)
        for index in range(count):
            arguments = [*command, f"--config.distributed={place},{index}"]
            output = {} if index == 0 else {"stdout": said[index - 1], "stderr": said[index - 1]}
            # A group of its own: Ctrl-C comes to the launcher alone, which forwards it once.
            children.append(subprocess.Popen(arguments, env=environment, process_group=0, **output))
            for number in stops[:]:  # that came before there was this one
                children[-1].send_signal(number)
        _wait(children)
        return _outcome(children, said)


def end_with_launcher() -> None:
    """Has a launched process be killed when its launcher dies, however that dies; Linux alone can."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before
        os._exit(1)


def _wait(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Waits for all to end; when one has died, the others get the time to end by themselves."""
    until = None
    while any(child.poll() is None for child in children):
        if until is None and any(child.returncode for child in children):
            until = time.monotonic() + _GRACE
        if until is not None and time.monotonic() > until:
            return
        time.sleep(_POLL)


def _end(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def _outcome(children: Sequence["subprocess.Popen[bytes]"], said: Sequence[IO[bytes]]) -> int:
    _end(children)
    first = children[0]
    if first.returncode < 0:
        print(f"error: process 0 (pid {first.pid}) was ended by {_signal(first.returncode)}", file=sys.stderr)
        return 128 - first.returncode
    if first.returncode:
        return first.returncode  # it has said why
    for index, child in enumerate(children):
        if child.returncode:
            output = said[index - 1]
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            how = _signal(child.returncode) if child.returncode < 0 else f"exit code {child.returncode}"
            print(f"error: process {index} (pid {child.pid}) ended by {how}; it said: {last[0]}", file=sys.stderr)
            return 1
    return 0


def _signal(code: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
