"""Several processes of one run: the losses of one device, and what becomes of them when one is lost.

    PYTHONPATH=tests:. python tests/campaign/processes.py FOLDER [--steps 100] [--moments 30]
        [--only losses|hosts|faults] [--backend xla|vulkan]

losses: a run in 1, 2 and 4 processes, each with a device of its own, has the same losses, and the same parameters bit
for bit in all processes; one of 4 goes on with 2, then with 1. XLA also on 8 devices of one process, replicated and
split. hosts: the same with two processes on two hosts, which are networks with an address each (root on Linux makes
them). faults: a process is killed, stopped or cut off at random moments, the start among them; the others end in time,
each with one line that names it; the run is begun again each time, until it is complete and as one without a fault.

VK_KERNELS_DEVICE=cpu for the Vulkan device of a machine without a GPU.
"""

import argparse
import functools
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from hosts import HOSTS, TwoHosts
from tiny_run import write_chats, written
from zygote import LIMIT, Ended, Process

from gpt_jax.distributed.channel import JOIN, SILENCE

CONFIG = """
from pathlib import Path
from tiny_run import tiny
def get_config():
    return tiny(Path({corpus!r}), batch_size=8, num_steps={steps}, optimizer__decay_steps={steps},
                data__targets="assistant", eval__every=20, sample__every=0, checkpoint__every={every},
                log__diagnostics_every=0, log__every=1)
"""
ROUNDING = 1e-5  # how far losses of another number of devices may be apart, relative
AT_ONCE = 10.0  # seconds in which the others end when one was killed, on a busy machine
CHECKPOINT = 10.0  # seconds that the checkpoint on its way may take beside
BACKENDS = ("xla", "vulkan")
EVERY = 10  # steps between checkpoints
AHEAD = 15  # steps within which a fault comes
Enter = Callable[[], None]  # takes a process to its host


class Table:
    """Prints what was tried and what came of it, as it comes."""

    def __init__(self) -> None:
        self.rows = self.failed = 0

    def add(self, name: str, good: bool, found: str) -> None:
        self.rows += 1
        self.failed += not good
        print(f"{time.strftime('%H:%M:%S')} {'ok    ' if good else 'FAILED'} {name:<54} {found}", flush=True)


class Runs:
    """Runs of the tiny config, in a folder, by name."""

    def __init__(self, folder: Path, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        corpus = write_chats(folder / "chats.jsonl")
        self.folder, self.steps, self.config = folder, steps, folder / "processes_config.py"
        self.config.write_text(CONFIG.format(corpus=str(corpus), steps=steps, every=EVERY))
        self._ports = itertools.count(10_000 + os.getpid() % 10_000)

    def start(self, name: str, *flags: str, enter: Enter = lambda: None, fake: int = 1) -> Process:
        """A process of a run. fake: devices that XLA has of the processor."""

        def prepare() -> None:
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={fake}"
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_compilation_cache_dir", str(self.folder / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            enter()

        arguments = f"--config={self.config}", f"--workdir={self.folder / name}", *flags
        return Process("gpt_jax.main", arguments, prepare=prepare)

    def start_all(self, name: str, count: int, *flags: str, hosts: Sequence[Enter] = ()) -> list[Process]:
        """All processes of a run: of one host, which share its device, or one on each of some hosts."""
        address = next(iter(HOSTS.values())) if hosts else "127.0.0.1"
        place = f"--config.distributed={address}:{next(self._ports)},{count}"
        shared = () if hosts else (f"--config.devices={','.join('0' * count)}",)
        enters = hosts or [lambda: None] * count
        return [self.start(name, *flags, *shared, f"{place},{i}", enter=enter) for i, enter in enumerate(enters)]

    def losses(self, name: str) -> dict[tuple[str, int], float]:
        """All losses by split and step."""
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return {(line["split"], line["step"]): line["loss"] for line in lines if "loss" in line}

    def steps_since(self, name: str, began: float) -> list[int]:
        """The steps that a run has made, and written, since a time of `time.time`."""
        try:
            lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):  # a line that is being written
            return []
        return [line["step"] for line in lines if line["split"] == "train" and line["time"] >= began]


def ends(processes: Sequence[Process], limit: float = LIMIT) -> list[Ended]:
    until = time.monotonic() + limit
    return [process.wait(until - time.monotonic()) for process in processes]


def is_whole(ended: Sequence[Ended]) -> bool:
    return not any(each.problem(0) for each in ended)


def said(ended: Sequence[Ended]) -> str:
    return "; ".join(dict.fromkeys(line for each in ended for line in [each.problem(0), *each.errors] if line))


def compare(table: Table, runs: Runs, what: str, one: str, other: str) -> None:
    """Adds how far the losses of two runs are apart; the other may have evaluated more often, where it ended."""
    expected, found = runs.losses(one), runs.losses(other)
    missing = expected.keys() - found.keys()
    apart = max((abs(found[key] - loss) / abs(loss) for key, loss in expected.items() if key in found), default=1.0)
    line = f"{len(expected)} losses, apart by {apart:.1e} at most, relative" + f"; {len(missing)} missing" * bool(
        missing
    )
    table.add(what, apart < ROUNDING and not missing, line)


def show_losses(table: Table, runs: Runs, backend: str, steps: int) -> None:
    asked, one = f"--config.backend={backend}", f"{backend}-1"
    ended = [runs.start(one, asked).wait()]
    table.add(f"{backend}: 1 process", is_whole(ended), said(ended))
    for count in (2, 4):
        name = f"{backend}-{count}"
        ended = ends(runs.start_all(name, count, asked))
        equal = f"parameters bit-equal at {steps // EVERY} checkpoints"  # else `placement.check` had ended the run
        table.add(f"{backend}: {count} processes", is_whole(ended), said(ended) or equal)
        compare(table, runs, f"{backend}: {count} processes against 1 device", one, name)
    for shard in ("replicated", "fsdp") if backend == "xla" else ():
        name = f"xla-8-{shard}"
        ended = [runs.start(name, asked, "--config.devices=all", f"--config.shard={shard}", fake=8).wait()]
        table.add(f"xla: 8 devices of one process, {shard}", is_whole(ended), said(ended))
        compare(table, runs, f"xla: 8 devices, {shard}, against 1", one, name)
    name = f"{backend}-fewer"
    for count, until in ((4, steps // 3), (2, 2 * steps // 3), (1, steps)):
        flags = asked, f"--config.num_steps={until}"
        ended = ends(runs.start_all(name, count, *flags) if count > 1 else [runs.start(name, *flags)])
        table.add(f"{backend}: {count} processes until step {until}", is_whole(ended), said(ended))
    compare(table, runs, f"{backend}: 4, then 2, then 1 process against 1 device", one, name)


def enters(two: TwoHosts) -> list[Enter]:
    return [functools.partial(two.enter, host) for host in HOSTS]


def show_hosts(table: Table, runs: Runs, backend: str, two: TwoHosts) -> None:
    asked, one, name = f"--config.backend={backend}", f"{backend}-1", f"{backend}-hosts"
    if not (runs.folder / one).exists():
        runs.start(one, asked).wait()
    ended = ends(runs.start_all(name, 2, asked, hosts=enters(two)))
    table.add(f"{backend}: 2 hosts", is_whole(ended), said(ended))
    compare(table, runs, f"{backend}: 2 hosts against 1 device", one, name)


class Faults:
    """A run of two processes that meets a fault again and again, beside one that meets none."""

    def __init__(self, table: Table, runs: Runs, backend: str, two: TwoHosts | None, drawn: random.Random) -> None:
        """two: hosts for the processes; None: both are on this one."""
        self.table, self.runs, self.two, self.drawn = table, runs, two, drawn
        self.hosts = enters(two) if two else ()
        self.asked = f"--config.backend={backend}"
        self.name = f"{backend} on {'2 hosts' if two else '1 host'}"
        self.faulty, self.straight = (f"{backend}-{2 if two else 1}-{kind}" for kind in ("faulty", "straight"))
        self.kinds = ("kill", "stop", "cut") if two else ("kill", "stop")
        processes, began = self.begin(self.straight), time.time()
        while not self.runs.steps_since(self.straight, began) and not any(process.poll() for process in processes):
            time.sleep(0.002)
        self.start_seconds = time.time() - began
        ended = ends(processes)
        table.add(f"{self.name}: a run without a fault", is_whole(ended), said(ended))

    def begin(self, name: str) -> list[Process]:
        return self.runs.start_all(name, 2, self.asked, hosts=self.hosts)

    def meet(self, number: int) -> None:
        """Begins the run again, waits for a random moment of it, and has one of its processes be lost."""
        fault, victim = self.drawn.choice(self.kinds), self.drawn.randrange(2)
        in_start = self.drawn.random() < 0.2
        steps, seconds = self.drawn.randrange(1, AHEAD), self.drawn.uniform(0, self.start_seconds)
        if self.runs.steps - max(self.runs.steps_since(self.faulty, 0), default=0) <= AHEAD:  # too near its end
            self.finish()
            self.faulty += "-"
        processes = self.begin(self.faulty)
        began, until = time.time(), time.time() + LIMIT
        made: list[int] = []
        while not any(process.poll() for process in processes) and time.time() < until:
            made = self.runs.steps_since(self.faulty, began)
            if time.time() - began > seconds if in_start else len(made) >= steps:
                break
            time.sleep(0.002)
        what = f"{self.name}, {number}: {fault} of {victim}, "
        what += f"{time.time() - began:.1f} s after the start" if in_start else f"step {max(made, default=0)}"
        if any(process.poll() for process in processes):
            self.table.add(what, False, f"ended before its fault: {said(ends(processes, 60))}")
            return
        begin = time.monotonic()
        if fault == "cut":
            self.two.set_cable(up=False)
        else:
            processes[victim].send(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        left = processes if fault == "cut" else [processes[1 - victim]]
        limit = JOIN if in_start else AT_ONCE if fault == "kill" else SILENCE + AT_ONCE
        ended = ends(left, limit + CHECKPOINT)
        took = time.monotonic() - begin
        if fault == "cut":
            self.two.set_cable(up=True)
        problems = [problem for each in ended if (problem := each.problem(1, 2))]
        problems += [f"no process named: {said(ended)}"] * (not all("process " in said([each]) for each in ended))
        if fault == "stop":  # it goes on, finds itself alone, and ends too
            processes[victim].send(signal.SIGCONT)
            [woken] = ends([processes[victim]], JOIN + CHECKPOINT if in_start else AT_ONCE)
            problems += [f"the stopped one: {problem}"] if (problem := woken.problem(1, 2)) else []
        ends(processes)
        lines = "; ".join(dict.fromkeys(line for each in ended for line in each.errors))
        line = f"{took:.1f} s; {lines}" if not problems else "; ".join(problems)
        self.table.add(what, not problems and took < limit + CHECKPOINT, line)

    def finish(self) -> None:
        ended = ends(self.begin(self.faulty))
        self.table.add(f"{self.name}: goes on to its end", is_whole(ended), said(ended))
        one, other = (written(self.runs.folder / name) for name in (self.straight, self.faulty))
        what = f"{len(one)} lines of metrics, losses and norms bit for bit"
        self.table.add(f"{self.name}: as the run without a fault", one == other and len(one) > 1, what)


def show_faults(
    table: Table, runs: Runs, backends: Sequence[str], moments: int, drawn: random.Random, two: TwoHosts
) -> None:
    kinds = [(backend, two) for backend in backends] + [("vulkan", None)] * ("vulkan" in backends)
    faults = [Faults(table, runs, backend, where, drawn) for backend, where in kinds]
    for number in range(moments):
        faults[number % len(faults)].meet(number)
    for each in faults:
        each.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("losses", "hosts", "faults"))
    parser.add_argument("--backend", choices=BACKENDS)
    options = parser.parse_args()
    table, runs = Table(), Runs(options.folder.resolve(), options.steps)
    backends = (options.backend,) if options.backend else BACKENDS
    parts = (options.only,) if options.only else ("losses", "hosts", "faults")
    if "losses" in parts:
        for backend in backends:
            show_losses(table, runs, backend, options.steps)
    if parts != ("losses",):
        with TwoHosts() as two:
            for backend in backends if "hosts" in parts else ():
                show_hosts(table, runs, backend, two)
            if "faults" in parts:
                show_faults(table, runs, backends, options.moments, random.Random(options.seed), two)
    print(f"{table.rows} rows, {table.failed} failed", flush=True)
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
