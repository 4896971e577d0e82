"""Connects the processes of a run: they tell each other small values and, by heartbeats, that
they are still there.

Every process has one TCP connection to process 0, which passes on. A thread of each sends a beat every second and
listens. A process whose connection ends, or that is silent for SILENCE seconds, because it was killed, hangs, was
stopped or is cut off, ends the run: process 0 tells all others its name, and each ends with that one line.

JAX's own service watches its processes too, but ends them by abort, with a C++ stack and without a name; see
docs/scaling.md. Messages are JSON, one a line: nothing that comes in can be code.
"""

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from gpt_jax.distributed.settings import Place
from gpt_jax.errors import UserError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 15.0  # seconds without one, after which a process counts as lost
SAVING = 30.0  # seconds that process 0 gets for the checkpoint on its way when another process is lost
JOIN = 120.0  # seconds that processes wait for each other at the start
LOST = 1  # exit code of a run that lost a process
_GREETING = "gpt_jax 1"  # raise the number when processes of an older program would misread the others
_END = "the end of the run"
_MOST = 2**26  # bytes of a message
_TRY_AGAIN = 0.2  # seconds


class Peer:
    """The other end of a connection, and what it said of itself in its hello: see `_is_hello`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.hello: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.said_goodbye = False
        self.unread: list[dict[str, Any]] = []  # came with the welcome, behind it
        self._received = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; nothing where the connection is gone, of which the listening thread knows."""
        with contextlib.suppress(OSError), self._sending:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None: the connection has ended.

        Raises ValueError for what no process of a run says.
        """
        try:
            data = self.connection.recv(2**16)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _MOST:
            raise ValueError("a message without an end")
        try:
            messages = [json.loads(line) for line in lines]
        except RecursionError:
            raise ValueError("a message of too many levels") from None
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("no message")
        return messages

    def __str__(self) -> str:
        return name_of(self.hello)


def name_of(hello: dict[str, Any]) -> str:
    """A process as its user finds it."""
    return f"process {hello.get('index', '?')} (pid {hello.get('pid', '?')} on {hello.get('host', '?')})"


class Channel:
    """The connections of one process to the others of its run; made by `open_channel`.

    hellos: what each process said of itself, by index.
    """

    def __init__(self, index: int, peers: dict[int, Peer], hellos: list[dict[str, Any]]) -> None:
        self.index, self.hellos = index, hellos
        self.count = len(hellos)
        self._peers = peers
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._gathering: dict[int, dict[int, Any]] = {}  # process 0: number of a gathering -> index -> value
        self._number = 0  # of the gatherings so far
        self._lock = threading.Lock()
        self._steps: dict[str, set[int]] = {"stop": set(), "save": set()}  # at which all processes do so
        self._acknowledged: set[int] = set()
        self._all_acknowledged = threading.Event()
        self._requests: set[str] = set()  # process 0: what the others asked for
        self._closing = self._ended = False
        self.on_lost: Callable[[str], str] = str  # makes the line that the process ends with of the one that names
        self._selector = selectors.DefaultSelector()
        for peer in peers.values():
            peer.heard = time.monotonic()
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch_or_end, name="processes", daemon=True)
        self._thread.start()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by index; every process calls it, in the same order."""
        self._number += 1
        if self.index:
            self._peers[0].send(kind="gather", number=self._number, value=value)
        else:
            self._add(self._number, 0, json.loads(json.dumps(value)))  # as the others see it
        return self._results.get()  # if a process is lost, the watching thread ends this one

    def share(self, value: Any = None) -> Any:
        """Process 0's value, on every process."""
        return self.gather(value if self.index == 0 else None)[0]

    def request(self, what: str) -> None:
        """Asks process 0 to have all processes stop, or save."""
        if self.index:
            self._peers[0].send(kind="request", what=what)
        else:
            self._requests.add(what)

    def take_requests(self) -> set[str]:
        """Takes what processes asked for since the last call; nothing but on process 0."""
        taken, self._requests = self._requests, set()
        return taken

    def announce(self, what: str, step: int) -> None:
        """Has all processes do something at a step; returns when all know, which is before that step."""
        self._acknowledged.clear()
        self._all_acknowledged.clear()
        for peer in self._peers.values():
            peer.send(kind="announce", what=what, step=step)
        if self._peers:
            self._all_acknowledged.wait()
        self.note(what, step)

    def note(self, what: str, step: int) -> None:
        """Keeps what was announced beside what was before: each process may have done that already."""
        with self._lock:
            self._steps[what].add(step)

    def is_time_to(self, what: str, step: int) -> bool:
        """Whether something was announced for this step or one before, since it was last asked."""
        with self._lock:
            due = {announced for announced in self._steps[what] if announced <= step}
            self._steps[what] -= due
        return bool(due)

    def fail(self, line: str) -> None:
        """Tells all other processes why this one ends, so that they end with the same line."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        for peer in self._peers.values():
            peer.send(kind="failed", line=line)

    def blame(self, seconds: float = SILENCE + 2 * BEAT) -> None:
        """Waits for the process to be named whose loss made an exchange fail here; then this process ends.

        Returns if none was lost: the error is this process's own.
        """
        time.sleep(seconds)

    def close(self) -> None:
        """Waits until all processes are at their end: from here on each may go."""
        self.gather(_END)
        self._closing = True

    def _add(self, number: int, index: int, value: Any) -> None:
        with self._lock:
            values = self._gathering.setdefault(number, {})
            values[index] = value
            if len(values) < self.count:
                return
            result = [values[i] for i in range(self.count)]
            del self._gathering[number]
        for peer in self._peers.values():
            peer.send(kind="result", value=result)
        self._results.put(result)

    def _watch_or_end(self) -> None:
        """Watches; a process that no longer does ends, since it would wait for ever for one that is lost."""
        try:
            self._watch()
        except Exception as error:
            self._lose(f"{name_of(self.hellos[self.index])} cannot listen to the others: {error!r}")

    def _watch(self) -> None:
        """Beats, listens, and ends the process when another one is lost."""
        for peer in self._peers.values():
            for message in peer.unread:
                self._take(peer, message)
        next_beat = time.monotonic()
        while not self._closing:
            before = time.monotonic()
            ready = self._selector.select(max(0.0, next_beat - before))
            now = time.monotonic()
            if now - before > SILENCE / 2:  # this process itself was stopped: give the others the time to be heard
                for peer in self._peers.values():
                    peer.heard = now
            for key, _ in ready:
                self._listen_to(key.data)
            if now >= next_beat:
                for peer in self._peers.values():
                    peer.send(kind="beat")
                next_beat = now + BEAT
            for peer in self._peers.values():
                if now - peer.heard > SILENCE and not peer.said_goodbye:
                    silent = f"{peer} was silent for {SILENCE:.0f} seconds"
                    self._lose(f"{silent}: it hangs, was stopped, or the network to it is cut")

    def _listen_to(self, peer: Peer) -> None:
        try:
            messages = peer.receive()
        except ValueError:
            messages = None
        if messages is None:
            self._selector.unregister(peer.connection)
            if not (self._closing or peer.said_goodbye):
                self._lose(f"{peer} ended without a word: it was killed, or its machine or the network failed")
            return
        for message in messages:
            self._take(peer, message)

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "gather":
            self._add(message["number"], peer.hello["index"], message["value"])
            peer.said_goodbye = message["value"] == _END
        elif kind == "result":
            peer.said_goodbye = message["value"][0] == _END
            self._results.put(message["value"])
        elif kind == "request":
            self._requests.add(message["what"])
        elif kind == "announce":
            self.note(message["what"], message["step"])
            peer.send(kind="noted")
        elif kind == "noted":
            self._acknowledged.add(peer.hello["index"])
            if len(self._acknowledged) == len(self._peers):
                self._all_acknowledged.set()
        elif kind == "failed":
            self._lose(message["line"])

    def _lose(self, line: str) -> NoReturn:
        """Ends this process, wherever its other threads are: an exchange of numbers may never return."""
        self.fail(line)
        self._closing = True
        try:
            line = self.on_lost(line)
        except Exception as error:  # a disk that fails, say; nothing may keep the process from its end
            line = f"{line}; after it: {error!r}"
        end_process(line)


def end_process(line: str, code: int = LOST) -> NoReturn:
    """Prints why, and ends at once: what runs at a normal end would wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if line:
        with contextlib.suppress(OSError):
            os.write(2, f"error: {line}\n".encode())
    os._exit(code)


def open_channel(place: Place, hello: dict[str, Any], *, join_seconds: float = JOIN) -> Channel:
    """Connects a process to process 0, or, of process 0, waits for all others.

    hello: what the others are to know: host, machine, pid.

    Raises:
      UserError: the address cannot be used, or not all processes came, or one of another run did.
    """
    hello = {**hello, "index": place.index, "count": place.count}
    until = time.monotonic() + join_seconds
    if place.index == 0:
        return _wait_for_others(place, hello, until)
    return _join(place, hello, until)


def _wait_for_others(place: Place, hello: dict[str, Any], until: float) -> Channel:
    with _listen(place) as listening:
        peers: dict[int, Peer] = {}
        while len(peers) < place.count - 1:
            listening.settimeout(max(until - time.monotonic(), 0.01))
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                missing = [i for i in range(1, place.count) if i not in peers]
                _refuse(peers, f"{_processes(missing)} did not come to {place.address} in time", place)
            peer = Peer(connection)
            problem = _greet(peer, place, peers)
            if problem is None:
                peers[peer.hello["index"]] = peer
            elif peer.hello:
                peer.send(kind="failed", line=problem)
                _refuse(peers, problem, place)
            else:
                connection.close()  # no process of ours: whoever scans ports
    hellos = [hello, *(peers[i].hello for i in range(1, place.count))]
    for peer in peers.values():
        peer.send(kind="welcome", hellos=hellos)
    return Channel(0, peers, hellos)


def _listen(place: Place) -> socket.socket:
    host, port = place.host_and_port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"config.distributed: {host} is not the name of a machine: {error.strerror}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(place.count)
    except OSError as error:
        listening.close()
        what = "another program uses it, give another port" if error.errno == 98 else error.strerror
        raise UserError(
            f"config.distributed: process 0 cannot wait at {place.address}: {what}"
            + (": it must be an address of the machine of process 0" if error.errno == 99 else "")
        ) from None
    return listening


def _greet(peer: Peer, place: Place, peers: dict[int, Peer]) -> str | None:
    """Takes a process's hello; returns why it cannot be one of this run, None if it can."""
    peer.connection.settimeout(SILENCE / 3)
    peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    until = time.monotonic() + SILENCE / 3
    try:
        messages: list[dict[str, Any]] | None = []
        while messages == [] and time.monotonic() < until:
            messages = peer.receive()
    except ValueError:
        return "not of this program"
    if not messages or messages[0].get("kind") != _GREETING or not _is_hello(hello := messages[0].get("hello")):
        return "not of this program"
    peer.connection.settimeout(SILENCE)
    peer.hello = hello
    if hello["count"] != place.count:
        return f"{name_of(hello)} was started as one of {hello['count']} processes, process 0 as one of {place.count}"
    if hello["index"] == 0 or hello["index"] in peers:
        return f"two processes were started as process {hello['index']}: the second is {name_of(hello)}"
    return None


def _is_hello(found: Any) -> bool:
    kinds = {"index": int, "count": int, "pid": int, "host": str, "machine": str}
    return isinstance(found, dict) and all(type(found.get(name)) is kind for name, kind in kinds.items())


def _refuse(peers: dict[int, Peer], problem: str, place: Place) -> NoReturn:
    for peer in peers.values():
        peer.send(kind="failed", line=problem)
    raise UserError(f"config.distributed={place.address}: {problem}")


def _join(place: Place, hello: dict[str, Any], until: float) -> Channel:
    peer = Peer(_connect(place, until))
    peer.hello = {"index": 0, "host": place.host_and_port[0]}
    peer.send(kind=_GREETING, hello=hello)
    stranger = f"config.distributed: what answers at {place.address} is not process 0 of a run of this program"
    while True:
        peer.connection.settimeout(max(until + 5 - time.monotonic(), 0.01))
        try:
            messages = peer.receive()
        except ValueError:
            raise UserError(stranger) from None
        if messages is None:
            raise UserError(f"config.distributed: process 0 at {place.address} ended before all processes had come")
        if not messages and time.monotonic() > until + 5:
            raise UserError(f"config.distributed: no process 0 answers at {place.address}, where something listens")
        for number, message in enumerate(messages, 1):
            if message.get("kind") == "failed":
                raise UserError(f"config.distributed={place.address}: {message['line']}")
            if message.get("kind") == "welcome":
                peer.connection.settimeout(SILENCE)
                peer.hello, peer.unread = message["hellos"][0], messages[number:]
                return Channel(place.index, {0: peer}, message["hellos"])
            if message.get("kind") != "beat":
                raise UserError(stranger)


def _connect(place: Place, until: float) -> socket.socket:
    host, port = place.host_and_port
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5.0)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except socket.gaierror as error:
            raise UserError(f"config.distributed: {host} is not the name of a machine: {error.strerror}") from None
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"config.distributed: nobody answers at {place.address} ({error.strerror or error}): "
                    "is it the address of process 0, and was that started?"
                ) from None
            time.sleep(_TRY_AGAIN)


@contextlib.contextmanager
def hold_port(host: str = "127.0.0.1") -> Iterator[int]:
    """Gives a port of an address of this machine that nobody uses, and keeps it from other programs.

    Whoever asks to use addresses again, as `_listen` does, may listen there meanwhile. Linux alone lets it: elsewhere
    the port is only found.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as holder:
        if sys.platform == "linux":
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


def free_port(host: str = "127.0.0.1") -> int:
    """A port of an address of this machine that nobody uses."""
    with hold_port(host) as port:
        return port


def _processes(indices: list[int]) -> str:
    return f"process {indices[0]}" if len(indices) == 1 else f"processes {', '.join(map(str, indices))}"
