"""A tracker's library in a process of its own, and the trainer's end of the pipe to it.

The trainer writes a line of JSON a call, through a queue and a thread: it never waits. What the library prints goes to
`tracker/log.txt` in the run's folder; its failures come back as lines, and are told once in the run's log. When the
pipe ends, also because the trainer was killed, the process ends the run there with the status that run.json has.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt_jax.log import Log
from gpt_jax.runs.info import read_info
from gpt_jax.runs.outbox import Outbox
from gpt_jax.runs.status import CRASHED, RUNNING
from gpt_jax.runs.tracker_services import FOLDER, SERVICES, Service, TrackedRun

PATIENCE = 30.0  # seconds that the end of a run waits for the last lines to be sent
SAID = 3  # exit code of a process that has told why it ends
_LONGEST = 200  # characters of a library's message
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gpt_jax.runs.tracker_process import main; main()"
)


class TrackerProcess:
    """The trainer's end: a `metrics.Tracker` whose calls return at once, whatever the library does."""

    def __init__(self, service: str, run: TrackedRun, log: Log, command: Sequence[str] | None = None) -> None:
        """Starts the process.

        Args:
          service: one of `tracker_services.SERVICES`.
          run: what it is told of the run.
          log: takes what goes wrong, in the caller's thread.
          command: what reads the lines; None: `main` below.
        """
        folder = Path(run.folder) / FOLDER
        self._about = f"tracker {service}:"
        self._dead = self._closing = False
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                errors: Any = stack.enter_context((folder / "log.txt").open("ab"))
            except OSError:
                errors = subprocess.DEVNULL
            self._process = subprocess.Popen(
                command or [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the trainer, which then ends the pipe
            )
        self._outbox: Outbox[dict[str, Any]] = Outbox(self._about, self._send, log)
        self._reader = threading.Thread(target=self._listen, name=f"reader of {service}", daemon=True)
        self._reader.start()
        self._outbox.put({"service": service, "run": run._asdict()})

    def __enter__(self) -> "TrackerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        self._put({"call": "scalars", "step": step, "values": dict(values), "now": now})

    def text(self, step: int, name: str, text: str, now: float) -> None:
        self._put({"call": "text", "step": step, "name": name, "text": text, "now": now})

    def alert(self, step: int, rule: str, text: str, now: float) -> None:
        self._put({"call": "alert", "step": step, "rule": rule, "text": text, "now": now})

    def close(self, patience: float = PATIENCE) -> None:
        """Ends the pipe once all is written, and waits for the process; one that takes too long is killed."""
        end, self._closing = time.monotonic() + patience, True
        if self._outbox.close(patience):
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(end - time.monotonic(), 0.0))
        if self._process.poll() is None:
            self._process.kill()  # whose end wakes a writer that waits for it
            self._process.wait()
            self._outbox.note(
                f"did not end within {patience:.0f} s and was stopped; what it has not sent is in the run's folder"
            )
        self._reader.join(1.0)
        self._outbox.close(1.0)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _put(self, message: dict[str, Any]) -> None:
        if not self._dead:
            self._outbox.put(message)

    def _send(self, message: dict[str, Any]) -> None:
        if self._dead:
            return
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            self._dead = True

    def _listen(self) -> None:
        """Takes what the process says went wrong, and its end."""
        for line in self._process.stdout:
            self._outbox.note(line.decode(errors="replace").strip())
        self._dead = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            if code != SAID and not (self._closing and code in (0, -signal.SIGKILL)):
                self._outbox.note(
                    f"ended by itself (exit code {code}), the run goes on without it; see {FOLDER}/log.txt"
                )


def main() -> NoReturn:
    """Runs the library's side: reads lines from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the library starts inherits neither end of the pipes, and what it prints goes to the log.
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(" ".join(text.split())[:_LONGEST], file=answers)

    code = serve(lines, say, SERVICES)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what a library left for the exit must not keep the run waiting; all is sent


def serve(lines: Iterable[bytes], say: Callable[[str], None], services: Mapping[str, Callable[..., Service]]) -> int:
    """Does what lines say, by a service; returns the exit code.

    Args:
      lines: the first of them the service and the run, then a call each.
      say: is told what failed, each kind once.
      services: what opens each.
    """
    calls = iter(lines)
    start = json.loads(next(calls))
    run = TrackedRun(**start["run"])
    try:
        service = services[start["service"]](run)
    except Exception as error:
        traceback.print_exc()
        say(f"did not begin, the run goes on without it: {type(error).__name__}: {error}")
        return SAID
    told = set()
    for line in calls:
        if not line.endswith(b"\n"):
            break  # the trainer was killed while it wrote
        message = json.loads(line)
        call = message.pop("call")
        try:
            getattr(service, call)(**message)
        except Exception as error:
            if (call, type(error)) not in told:
                told.add((call, type(error)))
                traceback.print_exc()
                say(f"{call} failed at step {message['step']:,}, it goes on trying: {type(error).__name__}: {error}")
    if hasattr(signal, "alarm"):
        signal.alarm(round(2 * PATIENCE))  # a trainer that was killed waits for nobody
    status = read_info(Path(run.folder)).get("status")
    service.finish(CRASHED if status == RUNNING else str(status))
    return 0
