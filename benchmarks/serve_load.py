"""Loads a server with many clients at once: patient ones, slow readers, some that vanish, and nonsense.

    python benchmarks/serve_load.py RUN [--clients=200] [--seconds=60] [--kill]

Starts `python -m gpt_jax.serve RUN` on a free port of this machine, and ends it. Prints how many answers came and how
many were lost, latencies by percentile, and the server's memory by time; with --kill, it kills the server under load
(SIGKILL) and says whether a file of the run's folder changed. Exits with 1 if an answer was lost or a file changed.

A patient client asks again as soon as it has its answer, half of them streamed. A slow reader takes 500 bytes ten times
a second. A vanishing client closes its connection after the first bytes of a stream. A wrong one sends what is no
request.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from gpt_jax.runs.find import find_run

ASK = {"messages": [{"role": "user", "content": "What does it mean to live well?"}]}
JSON = {"content-type": "application/json"}
WRONG = [  # (body, headers, the status that must come)
    (b"{", JSON, 400),
    (b'{"messages": 5}', JSON, 400),
    (b"[" * 100_000, JSON, 400),
    (b"\xff\xfe\x00", JSON, 400),
    (b"x" * 2**21, JSON, 413),
    (b"{}", {"content-type": "text/plain"}, 415),
    (json.dumps({**ASK, "temperature": "hot"}).encode(), JSON, 400),
    (json.dumps({**ASK, "tools": [{}]}).encode(), JSON, 400),
]


class Load:
    """Clients that ask until a time, and what came of it."""

    def __init__(self, url: str, until: float) -> None:
        self.url, self.until = url, until
        # One for all, each request with a connection of its own: to make one takes long, for its TLS certificates.
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.AsyncClient(base_url=url, timeout=300, limits=unlimited)
        self.counts: collections.Counter[str] = collections.Counter()
        self.lost: list[str] = []
        self.latencies: dict[str, list[float]] = collections.defaultdict(list)

    async def patient(self, number: int) -> None:
        """Asks, reads, asks again; every answer must come, whole."""
        draw = random.Random(number)
        while time.monotonic() < self.until:
            asked = {**ASK, "max_tokens": draw.randint(4, 48), "stream": bool(number % 2)}
            begun = time.monotonic()
            try:
                await (self._stream if asked["stream"] else self._whole)(asked, begun)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.lost.append(
                    f"a {'stream' if asked['stream'] else 'whole answer'}: {type(error).__name__}: {error}"
                )
                continue
            self.latencies["whole answer"].append(time.monotonic() - begun)
            self.counts["answered"] += 1

    async def _whole(self, asked: dict, begun: float) -> None:
        answer = (await self.client.post("/v1/chat/completions", json=asked)).raise_for_status().json()
        if answer["choices"][0]["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"ended by {answer['choices'][0]['finish_reason']}")

    async def _stream(self, asked: dict, begun: float) -> None:
        last, is_first = "", True
        async with self.client.stream("POST", "/v1/chat/completions", json=asked) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line and is_first and '"content":"' in line and '"content":""' not in line:
                    is_first = False
                    self.latencies["first token of a stream"].append(time.monotonic() - begun)
                last = line or last
        if last != "data: [DONE]":
            raise ValueError(f"a stream ended with {last!r}")

    async def slow(self, number: int) -> None:
        """Reads a stream by 500 bytes, ten times a second, to its end."""
        while time.monotonic() < self.until:
            reader, writer = await self._open({**ASK, "stream": True, "logprobs": True, "top_logprobs": 5})
            received = b""
            while piece := await reader.read(500):
                received = (received + piece)[-200:]
                if b"data: [DONE]" in received:
                    self.counts["read slowly to the end"] += 1
                    break
                await asyncio.sleep(0.1)
            else:
                self.lost.append("a slow reader's stream ended early")
            writer.close()

    async def vanishing(self, number: int) -> None:
        """Leaves after the first bytes."""
        while time.monotonic() < self.until:
            reader, writer = await self._open({**ASK, "stream": True, "max_tokens": 500})
            await reader.read(50)
            writer.transport.abort()
            self.counts["vanished"] += 1
            await asyncio.sleep(0.2)

    async def wrong(self, number: int) -> None:
        """Sends what is no request; each must be refused as it should."""
        draw = random.Random(number)
        while time.monotonic() < self.until:
            body, headers, status = draw.choice(WRONG)
            try:
                found = (await self.client.post("/v1/chat/completions", content=body, headers=headers)).status_code
            except httpx.HTTPError as error:
                found = repr(error)
            if found != status:
                self.lost.append(f"a wrong request was answered by {found} for {status}")
            self.counts["refused"] += 1
            await asyncio.sleep(0.1)

    async def _open(self, asked: dict) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**12)
        body = json.dumps(asked).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer


def digests(folder: Path) -> dict[str, str]:
    """Name, size and content of every file, and when it was changed."""
    return {
        str(file.relative_to(folder)): f"{file.stat().st_mtime_ns} {hashlib.sha256(file.read_bytes()).hexdigest()}"
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def memory_of(process: int) -> float:
    """Megabytes of a process that are in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def watch(process: int, until: float, begun: float, memory: list[tuple[float, float]]) -> None:
    while time.monotonic() < until:
        memory.append((time.monotonic() - begun, memory_of(process)))
        await asyncio.sleep(2)


async def load(url: str, process: int, arguments: argparse.Namespace) -> tuple[Load, list[tuple[float, float]]]:
    begun = time.monotonic()
    done, memory = Load(url, begun + arguments.seconds), []
    kinds = [done.slow] * 2 + [done.vanishing] + [done.wrong] + [done.patient] * 16  # of 20 clients
    tasks = [kinds[number % len(kinds)](number) for number in range(arguments.clients)]
    results = await asyncio.gather(*tasks, watch(process, done.until, begun, memory), return_exceptions=True)
    await done.client.aclose()
    done.lost += [f"{type(error).__name__}: {error}" for error in results if isinstance(error, Exception)]
    return done, memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    folder = find_run(arguments.run).workdir
    before = digests(folder)
    flags = ["--port=0", f"--slots={arguments.slots}", "--max_waiting=1000"]
    command = [sys.executable, "-m", "gpt_jax.serve", arguments.run, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if " at http" in line)
        url = line.split(" at ")[1].split("/ ")[0]
        print(line.strip())
        if arguments.kill:
            asyncio.run(kill_under_load(url, server, arguments))
            done, memory = Load(url, 0), []
        else:
            done, memory = asyncio.run(load(url, server.pid, arguments))
            print(httpx.get(f"{url}/health").text)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    report(done, memory)
    changed = [name for name in before | digests(folder) if before.get(name) != digests(folder).get(name)]
    print(f"{len(before)} files of {folder}: " + (f"CHANGED {changed}" if changed else "none changed"))
    return int(bool(done.lost or changed))


async def kill_under_load(url: str, server: subprocess.Popen, arguments: argparse.Namespace) -> None:
    """Kills the server in the middle of the load, by the signal that it cannot see."""
    task = asyncio.ensure_future(load(url, server.pid, arguments))
    await asyncio.sleep(arguments.seconds / 2)
    server.kill()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    print(f"killed with {arguments.clients} clients open: exit code {server.wait()}")


def report(done: Load, memory: list[tuple[float, float]]) -> None:
    print(", ".join(f"{count} {what}" for what, count in sorted(done.counts.items())), f"- {len(done.lost)} lost")
    for line, count in collections.Counter(done.lost).most_common(5):
        print(f"  lost {count}: {line}")
    for what, found in done.latencies.items():
        found.sort()
        ranks = {rank: found[min(len(found) - 1, int(len(found) * rank / 100))] for rank in (50, 90, 99)}
        print(
            f"{what}, s: "
            + ", ".join(f"p{rank} {value:.2f}" for rank, value in ranks.items())
            + f", max {found[-1]:.2f}"
        )
    if memory:
        steps = memory[:: max(1, len(memory) // 8)]
        print("memory, MB: " + ", ".join(f"{megabytes:.0f} at {seconds:.0f} s" for seconds, megabytes in steps))


if __name__ == "__main__":
    sys.exit(main())
