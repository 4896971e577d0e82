"""Several processes of one run: the losses of one device, and what becomes of them when one is lost.

    PYTHONPATH=tests:. python tests/campaign/processes.py FOLDER [--steps 100] [--moments 30] [--only PART]

PART `losses`: a run of XLA:CPU in 1, 2 and 4 processes, and on 8 devices of one, replicated and split, has the same
losses; one of 4 goes on with 2, then with 1. `hosts`: the same with each process in a network of its own (root on
Linux). `faults`: a run of two processes, of which one is killed, stopped or cut off at random moments, and begun again
each time, until it is complete.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tiny_run import write_chats

from gpt_jax.distributed.channel import SILENCE

ROOT = Path(__file__).parents[2]
CONFIG = """
from pathlib import Path
from tiny_run import tiny
def get_config():
    return tiny(Path({corpus!r}), batch_size=8, num_steps={steps}, optimizer__decay_steps={steps},
                data__targets="assistant", eval__every=20, sample__every=0, checkpoint__every=10,
                log__diagnostics_every=0, log__every=1)
"""
ENDS = SILENCE + 15  # seconds in which the others must have ended, the last checkpoint whole
STARTS = 600  # seconds that a start may take on a busy machine
HOSTS = ("gpt-jax-a", "gpt-jax-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Table:
    """Prints what was tried and what came of it, as it comes."""

    def __init__(self) -> None:
        self.failed = 0

    def add(self, name: str, good: bool, found: str) -> None:
        self.failed += not good
        print(f"{'ok    ' if good else 'FAILED'} {name:<44} {found}", flush=True)


def command(folder: Path, name: str, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "gpt_jax.main", f"--config={folder / 'processes_config.py'}"),
        *(f"--workdir={folder / name}", *flags),
    ]


def environment(folder: Path, fake: int = 0) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={fake}" if fake else ""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(folder: Path, name: str, *flags: str, fake: int = 0, host: str | None = None) -> subprocess.Popen[str]:
    inside = ["ip", "netns", "exec", host] if host else []
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*inside, *command(folder, name, *flags)], env=environment(folder, fake), cwd=ROOT, **pipes)


def finish(process: subprocess.Popen[str], seconds: float = STARTS) -> tuple[int, str]:
    """Exit code and the error lines of ours, which are to be one at most."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, f"did not end in {seconds:.0f} s"
    return process.returncode, "; ".join(line for line in said.splitlines() if line.startswith("error:"))


def losses(folder: Path, name: str) -> dict[tuple[str, int], float]:
    """All losses by split and step."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {(line["split"], line["step"]): line["loss"] for line in lines if "loss" in line}


def compare(table: Table, what: str, one: dict, other: dict, exact: bool = False) -> None:
    if one.keys() != other.keys():
        table.add(what, False, f"{len(one)} losses and {len(other)}")
        return
    worst = max(abs(one[key] - other[key]) / abs(one[key]) for key in one)
    table.add(what, worst == 0 if exact else worst < 1e-5, f"{len(one)} losses, apart by {worst:.1e} at most")


def show_losses(folder: Path, table: Table, steps: int) -> None:
    runs = {"one": ((), 0), "two": (("--config.devices=0,0",), 0), "four": (("--config.devices=0,0,0,0",), 0)}
    runs |= {shard: (("--config.devices=all", f"--config.shard={shard}"), 8) for shard in ("replicated", "fsdp")}
    for name, (flags, fake) in runs.items():
        code, said = finish(start(folder, name, *flags, fake=fake))
        if code:
            table.add(f"{name}: trains", False, f"exit code {code} {said}")
        else:
            compare(table, f"losses of {name} against one", losses(folder, "one"), losses(folder, name))
    for devices, until in (("0,0,0,0", steps // 3), ("0,0", 2 * steps // 3), ("0,", steps)):
        flags = f"--config.devices={devices}", f"--config.num_steps={until}"
        code, said = finish(start(folder, "fewer", *flags))
        table.add(f"devices={devices} until step {until}", code == 0, said)
    compare(table, "losses of 4, then 2, then 1 against one", losses(folder, "one"), losses(folder, "fewer"))


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Two networks with an address each, and a cable between them; each knows its own name by its own address."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    with contextlib.ExitStack() as stack:
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("netns", "add", host)
            stack.callback(subprocess.run, ["ip", "netns", "delete", host])
            settings = Path("/etc/netns") / host
            settings.mkdir(parents=True, exist_ok=True)
            (settings / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            stack.callback(settings.rmdir)
            stack.callback((settings / "hosts").unlink)
        ip("link", "add", "gpt-jax-0", "type", "veth", "peer", "name", "gpt-jax-1")
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            ip("link", "set", f"gpt-jax-{number}", "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", f"gpt-jax-{number}")
            ip("-n", host, "link", "set", f"gpt-jax-{number}", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield


def start_on_hosts(folder: Path, name: str, port: int) -> list[subprocess.Popen[str]]:
    place = f"--config.distributed={ADDRESSES[0]}:{port},2"
    return [start(folder, name, f"{place},{index}", host=host) for index, host in enumerate(HOSTS)]


def show_hosts(folder: Path, table: Table) -> None:
    with two_hosts():
        ended = [finish(process) for process in start_on_hosts(folder, "hosts", 4711)]
    table.add("two hosts train", all(code == 0 for code, _ in ended), str(ended))
    if not (folder / "one").exists():
        finish(start(folder, "one"))
    compare(table, "losses of two hosts against one device", losses(folder, "one"), losses(folder, "hosts"))


def steps_done(folder: Path, name: str) -> int:
    try:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def process_of(index: int, name: str) -> int:
    """The process id of a process of a run, found by its command line."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
            mine = name in words and words.rstrip("\0").endswith(f",2,{index}") and "netns" not in words
            if mine and "gpt_jax.main" in words:
                return int(entry.name)
    raise ProcessLookupError(f"process {index} of {name}")


def show_faults(folder: Path, table: Table, moments: int, seed: int) -> None:
    drawn = random.Random(seed)
    with two_hosts():
        ended = [finish(process) for process in start_on_hosts(folder, "straight", 4712)]
        table.add("a run without a fault", all(code == 0 for code, _ in ended), str(ended))
        for moment in range(moments):
            fault, index = drawn.choice(("kill", "stop", "cut")), drawn.randrange(2)
            port, before = 4800 + moment, steps_done(folder, "faulty")
            processes = start_on_hosts(folder, "faulty", port)
            until = time.monotonic() + STARTS
            after = drawn.randrange(1, 15)
            while time.monotonic() < until and all(p.poll() is None for p in processes):
                done = steps_done(folder, "faulty")
                if done != before and done % 15 >= after % 15:
                    break
                time.sleep(0.02)
            if any(p.poll() is not None for p in processes):
                table.add(f"moment {moment}", False, f"ended before its fault: {[finish(p, 60) for p in processes]}")
                continue
            victim = process_of(index, str(folder / "faulty"))
            began = time.monotonic()
            if fault == "cut":
                subprocess.run(["ip", "-n", HOSTS[1], "link", "set", "gpt-jax-1", "down"], check=True)
            else:
                os.kill(victim, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            others = processes if fault == "cut" else [processes[1 - index]]
            ended = [finish(process, ENDS) for process in others]
            seconds = time.monotonic() - began
            if fault == "stop":
                os.kill(victim, signal.SIGKILL)
            if fault == "cut":
                subprocess.run(["ip", "-n", HOSTS[1], "link", "set", "gpt-jax-1", "up"], check=True)
            for process in processes:
                process.wait()
            names = f"process {index} (" if fault != "cut" else "process "
            good = all(code == 1 and said.count("error:") == 1 and names in said for code, said in ended)
            what = f"moment {moment}: {fault} of process {index} at step {steps_done(folder, 'faulty')}"
            table.add(what, good and seconds < ENDS, f"{seconds:.1f} s; {ended[0][1]}")
        ended = [finish(process) for process in start_on_hosts(folder, "faulty", 4799)]
    table.add("goes on to its end", all(code == 0 for code, _ in ended), str(ended))
    compare(table, "its losses, bit for bit", losses(folder, "straight"), losses(folder, "faulty"), exact=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("losses", "hosts", "faults"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_chats(folder / "chats.jsonl")
    (folder / "processes_config.py").write_text(CONFIG.format(corpus=str(corpus), steps=options.steps))
    table = Table()
    if options.only in (None, "losses"):
        show_losses(folder, table, options.steps)
    if options.only in (None, "hosts"):
        show_hosts(folder, table)
    if options.only in (None, "faults"):
        show_faults(folder, table, options.moments, options.seed)
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
