"""Disks that are full, too small, read-only or gone, and limits of files: a line, whole checkpoints, and a way on."""

import contextlib
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from runs import Tiny, difference, lines, steps_saved
from zygote import Ended

Outcome = tuple[str, str]


def _mount(*arguments: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def _small_disk(place: Path, size: int) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    if not _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place):
        raise PermissionError(f"cannot mount a small disk at {place}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def can_mount(folder: Path) -> str:
    """Why no small disk can be mounted; nothing if it can."""
    try:
        with _small_disk(folder / "probe", 100_000):
            return ""
    except (OSError, PermissionError) as error:
        return str(error)


def full_disk(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    """A run on a disk that is full after so many bytes; then the disk is larger, and the run goes on."""
    for i in range(count):
        place, size = folder / f"disk-{i}", rng.randint(20, 800) * 1024
        with _small_disk(place, size):
            workdir = place / "run"
            ended = tiny.train(workdir)
            problem = ended.problem(0, 1, 2)
            if ended.code:
                saved = steps_saved(workdir)
                _mount("-o", "remount,size=100m", place)
                problem = problem or tiny.train(workdir).problem(0)
                problem = problem or difference(straight, workdir)
                if (
                    saved
                    and not problem
                    and not any(line["step"] == saved[-1] for line in lines(workdir, "metrics.jsonl"))
                ):
                    problem = f"checkpoint {saved[-1]} was not gone on from"
        yield "full disk", problem and f"{size} bytes: {problem}"


def full_cache_disk(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    for i in range(count):
        place, size = folder / f"cachedisk-{i}", rng.choice((4096, 8192, 12288, 16384))
        with _small_disk(place, size):
            ended = tiny.train(folder / f"cached-{i}", f"--config.data.cache_dir={place}/cache")
            left = [path.name for path in place.rglob("*.partial")]
            problem = ended.problem(0, 1) or (left and f"left behind: {left}") or ""
        if not problem and ended.code and (folder / f"cached-{i}").exists():
            problem = "left a run folder behind"
        yield "full disk, token cache", problem


LIMITS = {"ulimit -f": resource.RLIMIT_FSIZE, "ulimit -n": resource.RLIMIT_NOFILE}


def limits(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    """A limit from the start on, which is then lifted."""
    for i in range(count):
        for name, what in LIMITS.items():
            value = rng.randint(500, 60_000) if name == "ulimit -f" else rng.randint(12, 60)
            workdir = folder / f"limited-{what}-{i}"
            ended: Ended = tiny.train(workdir, limits=[(what, value)])
            problem = ended.problem(0, 1, 2)
            problem = problem or tiny.train(workdir).problem(0) or difference(straight, workdir)
            yield name, problem and f"{value}: {problem}"


def removed(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    """The run's folder, or its checkpoints, are removed or moved away while it runs."""
    for i in range(count):
        workdir = folder / f"removed-{i}"
        process = tiny.start(workdir, "--config.num_steps=100000", "--config.optimizer.decay_steps=100000")
        while not process.poll() and len(lines(workdir, "metrics.jsonl")) < 10:
            time.sleep(0.01)
        what = workdir if i % 2 == 0 else workdir / "checkpoints"
        os.rename(what, folder / f"moved-{i}")
        begun = time.monotonic()
        ended = process.wait(60)
        problem = (
            ended.problem(1)
            or (
                workdir.exists() and i % 2 == 0 and f"the folder was made again: {sorted(map(str, workdir.rglob('*')))}"
            )
            or ""
        )
        if time.monotonic() - begun > 30:
            problem = problem or "noticed after more than 30 s"
        yield "removed during the run", problem
        shutil.rmtree(workdir, ignore_errors=True)
