"""Times `python -m gpt_jax.runs list` over many folders: copies of one run, read for the first time and by the index.

    python benchmarks/list_runs.py RUN [--runs=500] [--turns=5]

RUN is a run as every command takes one. Its folder is copied without the arrays of its checkpoints, which a list does
not read. Wall and processor time, median of `--turns`; "command" is the whole of it, from its start to its exit.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpt_jax.runs.find import find_run
from gpt_jax.runs.registry import INDEX_FILE, list_runs

LARGEST = 1 << 20  # bytes: a checkpoint's file above this holds arrays


def measure(call: Callable[[], object], turns: int) -> tuple[float, float]:
    """Seconds of a call, wall and processor, those of its child processes too: medians."""
    found = []
    for _ in range(turns):
        wall, before = time.perf_counter(), os.times()
        call()
        used = [after - earlier for after, earlier in zip(os.times()[:4], before[:4], strict=True)]
        found.append((time.perf_counter() - wall, sum(used)))
    wall, processor = (statistics.median(column) for column in zip(*found, strict=True))
    return wall, processor


def arrays(folder: str, names: list[str]) -> set[str]:
    """The files of a folder that a copy for a list does without."""
    files = (Path(folder) / name for name in names)
    return {
        file.name for file in files if "checkpoints" in file.parts and file.is_file() and file.stat().st_size > LARGEST
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    source = find_run(arguments.run, saved=False).workdir
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(arguments.runs):
            shutil.copytree(source, root / f"run_{number:04}", ignore=arrays)

        def without_index() -> None:
            (root / INDEX_FILE).unlink(missing_ok=True)
            list_runs(root)

        command = [sys.executable, "-m", "gpt_jax.runs", "list", f"--runs={root}"]
        print(f"{arguments.runs} folders, {(source / 'metrics.jsonl').stat().st_size:,} bytes of metrics in each")
        for name, call in (
            ("without the index", without_index),
            ("with the index", lambda: list_runs(root)),
            ("command", lambda: subprocess.run(command, check=True, capture_output=True)),
        ):
            wall, processor = measure(call, arguments.turns)
            print(f"{name:<18} {wall:6.3f} s, of the processor {processor:6.3f} s", flush=True)


if __name__ == "__main__":
    main()
