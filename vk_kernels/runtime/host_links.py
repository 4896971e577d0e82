"""Links between the processes of one host: each has a socket to every other one, and a wait sleeps in the kernel.

A process that ends, by whatever means, ends its links with it, so that all others know at once.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence

from vk_kernels.errors import FeatureError, LinkError

TIMEOUT = 120.0  # seconds that a wait for another process takes at most
_RETRY = 0.02  # seconds between two attempts to reach a process that is not there yet
_TOKEN = struct.Struct("<Q")


class HostLinks:
    """This process's links to the other processes of its host, which are numbered from 0 to `count` - 1.

    name: the same in all of them, and unlike any other group's on the host. timeout: seconds, of each wait.
    """

    def __init__(self, name: str, index: int, count: int, timeout: float = TIMEOUT):
        """Returns when all are linked. Raises LinkError, naming a process that did not come in time."""
        if not hasattr(socket, "SO_PEERCRED"):
            raise FeatureError("the processes of a host are linked by what only Linux has: abstract sockets")
        self.index, self.count, self.timeout = index, count, timeout
        self.peers = [i for i in range(count) if i != index]
        self._sockets: dict[int, socket.socket] = {}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(_address(name, index))
            listening.listen(count)
            deadline = time.monotonic() + timeout
            try:
                for other in range(index):
                    self._sockets[other] = self._connect(name, other, deadline)
                while len(self._sockets) < len(self.peers):
                    self._accept(listening, deadline)
            except BaseException:
                self.close()
                raise

    def _connect(self, name: str, other: int, deadline: float) -> socket.socket:
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link.connect(_address(name, other))
            except ConnectionRefusedError:  # it does not listen yet
                link.close()
                if time.monotonic() > deadline:
                    raise LinkError(f"process {other} of this host did not come in {self.timeout:g} s") from None
                time.sleep(_RETRY)
                continue
            link.settimeout(self.timeout)
            link.sendall(_TOKEN.pack(self.index))
            return link

    def _accept(self, listening: socket.socket, deadline: float) -> None:
        listening.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            link, _ = listening.accept()
        except TimeoutError:
            missing = [i for i in self.peers if i not in self._sockets]
            raise LinkError(f"of this host, {_processes(missing)} did not come in {self.timeout:g} s") from None
        link.settimeout(self.timeout)
        uid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        with contextlib.suppress(OSError):
            number = self._read(link, _TOKEN.size) if uid == os.getuid() else b""
            if len(number) == _TOKEN.size:
                self._sockets[_TOKEN.unpack(number)[0]] = link
                return
        link.close()  # another user's, or one that says nothing: none of ours

    @staticmethod
    def _read(link: socket.socket, nbytes: int) -> bytes:
        """The next bytes; fewer where the other side has closed."""
        found = b""
        while len(found) < nbytes:
            more = link.recv(nbytes - len(found))
            if not more:
                break
            found += more
        return found

    def announce(self, token: int) -> None:
        """Tells all others that this process has come to a point of its work, a number.

        One that has ended is no error here: it may have done all that it had to. Who waits for it hears of it.
        """
        message = _TOKEN.pack(token)
        for other in self.peers:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._sockets[other].sendall(message)

    def await_all(self, token: int, doing: str = "") -> None:
        """Returns when every other process has announced this number, which must be its next.

        doing: what is waited for, for the error. Raises LinkError for a process that ended, did not answer in time, or
        came to another point.
        """
        for other in self.peers:
            self.await_from(other, token, doing)

    def await_from(self, other: int, token: int, doing: str = "") -> None:
        """Returns when one other process has announced this number; otherwise as `await_all`."""
        with self._naming(other, doing):
            message = self._read(self._sockets[other], _TOKEN.size)
        if len(message) < _TOKEN.size:
            raise LinkError(self._text(other, "ended", doing))
        (found,) = _TOKEN.unpack(message)
        if found != token:
            raise LinkError(self._text(other, f"came to {found}, and this one to {token}", doing))

    def send_handle(self, handle: int) -> None:
        """Sends a file descriptor to all others."""
        for other in self.peers:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._sockets[other], [b"h"], [handle])

    def receive_handle(self, other: int) -> int:
        """The file descriptor, now one of this process too, that a process sent."""
        with self._naming(other, "sharing memory"):
            _, handles, _, _ = socket.recv_fds(self._sockets[other], 1, 1)
        if not handles:
            raise LinkError(self._text(other, "ended", "sharing memory"))
        return handles[0]

    @contextlib.contextmanager
    def _naming(self, other: int, doing: str) -> Iterator[None]:
        """Names the other process in what goes wrong with its link."""
        try:
            yield
        except TimeoutError:
            raise LinkError(self._text(other, f"did not answer in {self.timeout:g} s", doing)) from None
        except ConnectionResetError:
            raise LinkError(self._text(other, "ended", doing)) from None

    @staticmethod
    def _text(other: int, what: str, doing: str) -> str:
        return f"process {other} of this host {what}{f', {doing}' if doing else ''}"

    def close(self) -> None:
        """Ends the links; the others see this process as ended."""
        for link in self._sockets.values():
            link.close()
        self._sockets.clear()


def _address(name: str, index: int) -> str:
    """An abstract one, which leaves no file behind."""
    return f"\0vk_kernels-{name}-{index}"


def _processes(numbers: Sequence[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
