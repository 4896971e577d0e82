"""Two processes at once: on one run folder, and on one token cache; and output that nobody reads or that is narrow."""

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from runs import REPORT, Tiny, difference, lines
from zygote import Process

Outcome = tuple[str, str]


def two_on_a_folder(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    for i in range(count):
        workdir = folder / f"pair-{i}"
        first = tiny.start(workdir)
        while not first.poll() and not (workdir / "run.lock").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        second = tiny.start(workdir).wait()
        ended = first.wait()
        problem = ended.problem(0) or second.problem(0, 2)
        if not problem and second.code == 2 and f"in use by process {first.pid} on " not in second.err:
            problem = f"the holder is not named: {second.err}"
        yield "two processes, one folder", problem or difference(straight, workdir)


def two_on_a_cache(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    for i in range(count):
        cache = f"--config.data.cache_dir={folder}/cache-{i}"
        workdirs = [folder / f"cachepair-{i}-{j}" for j in range(2)]
        processes = [tiny.start(workdir, cache) for workdir in workdirs]
        ended = [process.wait() for process in processes]
        problem = ended[0].problem(0) or ended[1].problem(0)
        built = sum("data: preparing" in end.out for end in ended)
        if not problem and built != 1:
            problem = f"built {built} times"
        for workdir in workdirs:
            problem = problem or difference(straight, workdir)
        yield "two processes, one cache", problem


def _closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    _open_stdout()


def _full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    _open_stdout()


def _open_stdout() -> None:
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 as Python does when it starts


def _closed() -> None:
    os.close(1)
    sys.stdout = None


OUTPUTS = {
    "closed pipe": (_closed_pipe, (141,)),
    "/dev/full": (_full, (1,)),
    "closed": (_closed, (0,)),
    "ascii": (lambda: sys.stdout.reconfigure(encoding="ascii"), (0,)),
    "cp1252": (lambda: sys.stdout.reconfigure(encoding="cp1252"), (0,)),
}


def outputs(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    """Training goes on whatever stands behind standard output; a report ends quietly, or in a line."""
    for i in range(count):
        name = list(OUTPUTS)[i % len(OUTPUTS)]
        prepare, codes = OUTPUTS[name]
        workdir = folder / f"output-{i}"
        ended = tiny.start(workdir, prepare=prepare).wait()
        problem = ended.problem(0) or difference(straight, workdir)
        log = "" if problem else (workdir / "log.txt").read_text(encoding="utf-8")
        if not problem and ("step     60/60" not in log or not lines(workdir, "samples.jsonl")):
            problem = "log.txt lacks lines"
        yield f"output: {name}", problem
        yield f"output of report: {name}", Process(REPORT, [str(straight)], prepare=prepare).wait().problem(*codes)
