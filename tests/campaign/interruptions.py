"""Kills and signals at random moments of a run, which is then resumed and must end as one that was never touched."""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from runs import Tiny, difference, lines, status
from zygote import Process

Outcome = tuple[str, str]  # kind of fault, and what went wrong; nothing if it was survived


def _wait_for_moment(process: Process, workdir: Path, rng: random.Random) -> None:
    """Waits for a random time from the start on, or from the first step on, where most of the writing is."""
    if rng.random() < 0.7:
        while not process.poll() and not lines(workdir, "metrics.jsonl"):
            time.sleep(0.01)
        time.sleep(rng.expovariate(1 / 0.5))
    else:
        time.sleep(rng.uniform(0, 4))


def kills(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    """kill -9, up to five times in a run's life."""
    kind = f"kill -9, {tiny.backend}"
    done = 0
    while done < count:
        workdir = folder / f"killed-{tiny.backend}-{done}"
        planned = min(rng.randint(1, 5), count - done)
        killed, problem = 0, ""
        for _ in range(planned):
            process = tiny.start(workdir)
            _wait_for_moment(process, workdir, rng)
            process.send(signal.SIGKILL)
            ended = process.wait()
            killed += ended.code == -signal.SIGKILL
            if ended.code != -signal.SIGKILL:
                problem = problem or ended.problem(0)
        problem = problem or tiny.train(workdir).problem(0) or difference(straight, workdir)
        for i in range(max(killed, 1)):
            yield kind, problem if i == 0 else ""
        done += max(killed, 1)
        if not problem:
            shutil.rmtree(workdir)


STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def signals(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, rounds: int) -> Iterator[Outcome]:
    """Each signal at a random moment: those that stop are resumed, the others let the run go on."""
    for i in range(rounds):
        for number in (*STOPPING, signal.SIGUSR1, signal.SIGSTOP):
            workdir = folder / f"signalled-{number.name}-{i}"
            process = tiny.start(workdir)
            _wait_for_moment(process, workdir, rng)
            process.send(number)
            if number == signal.SIGSTOP:
                time.sleep(0.5)
                process.send(signal.SIGCONT)
            ended = process.wait()
            stops = number in STOPPING
            problem = ended.problem(*((0, 128 + number, -number) if stops else (0,)))
            if not problem and ended.code == -number and (workdir / "run.json").exists():
                problem = "it died of the signal in the middle of the run"
            if not problem and stops and (workdir / "run.json").exists():
                wanted = "completed" if ended.code == 0 else "interrupted"
                problem = "" if status(workdir) == wanted else f"run.json says {status(workdir)}, not {wanted}"
            problem = problem or tiny.train(workdir).problem(0) or difference(straight, workdir)
            yield f"signal {number.name}", problem
            if not problem:
                shutil.rmtree(workdir)
