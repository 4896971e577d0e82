"""Faults by the hundred, and what became of each: `make campaign`, or with arguments

    python tests/campaign/campaign.py --kills=100 --vulkan-kills=20 --inputs=1000 --minutes=60 --seed=1

Every run that a fault met is resumed and must end with the metrics, samples and parameters of one that was never
touched, to the last bit; every failure must be one line. Exits 1 if one was not survived, and keeps what is left then;
the seed draws the same faults again (not at the same microsecond).
"""

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
os.chdir(ROOT)
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for compiler in ("JAX_DISABLE_MOST_OPTIMIZATIONS=1", "GALLIVM_PERF=nopt"):  # programs run for seconds: compile fast
    os.environ.setdefault(*compiler.split("="))

COUNTS = {  # of a night
    "kills": 100,
    "vulkan-kills": 20,
    "signals": 4,
    "damage": 1000,
    "full-disk": 20,
    "full-cache": 6,
    "limits": 8,
    "removed": 4,
    "folder-pairs": 4,
    "cache-pairs": 4,
    "outputs": 5,
    "inputs": 1000,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default {count}, or 0 with --only")
    parser.add_argument("--only", action="store_true", help="nothing but what is named")
    parser.add_argument("--minutes", type=float, default=600, help="after which each kind of fault is met but once")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = vars(parser.parse_args())
    counts = {name: options[name.replace("-", "_")] for name in COUNTS}
    counts = {name: (0 if options["only"] else COUNTS[name]) if n is None else n for name, n in counts.items()}

    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # What Python keeps beside a config file is nothing that a command left. Commands are forks of this process, which
    # has read the variable of that name already.
    sys.dont_write_bytecode = True
    os.environ["VK_KERNELS_DEVICE"] = os.environ.get("VK_KERNELS_DEVICE", "cpu")
    print(f"seed {options['seed']}, in {folder}", flush=True)
    outcomes: list[tuple[str, str]] = []
    deadline = time.monotonic() + 60 * options["minutes"]
    try:
        for outcome in run_all(folder, counts, random.Random(options["seed"]), deadline):
            outcomes.append(outcome)
            if len(outcomes) % 20 == 0:
                print(f"{len(outcomes)} faults, last: {outcome[0]}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    print(table(outcomes), flush=True)
    failed = [outcome for outcome in outcomes if outcome[1]]
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


def run_all(folder: Path, counts: dict[str, int], rng: random.Random, deadline: float) -> Iterator[tuple[str, str]]:
    import disks
    import pairs
    from damage import damage
    from inputs import inputs
    from interruptions import kills, signals
    from runs import Tiny

    unmountable = disks.can_mount(folder)
    faults: dict[str, Callable] = {
        "inputs": inputs,
        "kills": kills,
        "signals": signals,
        "damage": damage,
        "full-disk": disks.full_disk,
        "full-cache": disks.full_cache_disk,
        "limits": disks.limits,
        "removed": disks.removed,
        "folder-pairs": pairs.two_on_a_folder,
        "cache-pairs": pairs.two_on_a_cache,
        "outputs": pairs.outputs,
        "vulkan-kills": kills,
    }
    straights: dict[str, Path] = {}
    for name, fault in faults.items():
        if not counts[name]:
            continue
        if name.startswith("full-") and unmountable:
            print(f"skipped {name}: {unmountable}", flush=True)
            continue
        backend = "vulkan" if name == "vulkan-kills" else "xla"
        tiny = Tiny(folder, backend)
        if backend not in straights:
            straights[backend] = folder / f"straight-{backend}"
            problem = tiny.train(straights[backend]).problem(0)
            if problem:
                print(f"a run without a fault failed: {problem}", flush=True)
                yield f"a run without a fault, {backend}", problem
                return
        for kind, problem in fault(tiny, straights[backend], folder, rng, counts[name]):
            if problem:
                print(f"NOT SURVIVED {kind}: {problem}", flush=True)
            yield kind, problem
            if time.monotonic() > deadline:
                print(f"out of time in {name}: the rest of its faults is left out", flush=True)
                break


def table(outcomes: list[tuple[str, str]]) -> str:
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for kind, problem in outcomes:
        counts[kind][bool(problem)] += 1
    rows = [f"| {kind} | {survived} | {lost} |" for kind, (survived, lost) in sorted(counts.items())]
    total = [sum(column) for column in zip(*counts.values(), strict=True)] or [0, 0]
    return "\n".join(["| fault | survived | not |", "| --- | --- | --- |", *rows, f"| all | {total[0]} | {total[1]} |"])


if __name__ == "__main__":
    sys.exit(main())
