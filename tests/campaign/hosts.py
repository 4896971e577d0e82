"""Hosts on one machine: a network with an address of its own each, and a cable between them. Root on Linux makes them.

A process that enters one has that host's name too, and finds the others' addresses by theirs.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

HOSTS = {"gpt-jax-a": "10.77.0.1", "gpt-jax-b": "10.77.0.2"}
CABLE = ("gpt-jax-0", "gpt-jax-1")  # its ends
_NEW_MOUNTS, _NEW_NAME = 0x00020000, 0x04000000  # CLONE_NEWNS, CLONE_NEWUTS
_BIND, _PRIVATE = 0x1000, 0x4000 | 0x40000  # MS_BIND, MS_REC | MS_PRIVATE


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[Callable[[str], None]]:
    """Makes them; what it yields takes the calling process, which must have one thread, to the host of a name."""
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="hosts-"))
        names.write("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items()))
        names.flush()
        for host in HOSTS:
            if Path("/run/netns", host).exists():  # of a campaign that was killed
                ip("netns", "delete", host)
            ip("netns", "add", host)
            stack.callback(ip, "netns", "delete", host)
        ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for end, (host, address) in zip(CABLE, HOSTS.items(), strict=True):
            ip("link", "set", end, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", host, "link", "set", end, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield lambda host: _enter(host, names.name)


def set_cable(up: bool) -> None:
    """Cuts the cable between the hosts, or mends it."""
    ip("-n", [*HOSTS][1], "link", "set", CABLE[1], "up" if up else "down")


def _enter(host: str, names: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    network = os.open(f"/run/netns/{host}", os.O_RDONLY)
    call("setns", network, 0)
    os.close(network)
    call("unshare", _NEW_MOUNTS | _NEW_NAME)
    call("mount", None, b"/", None, ctypes.c_ulong(_PRIVATE), None)
    call("mount", names.encode(), b"/etc/hosts", None, ctypes.c_ulong(_BIND), None)
    socket.sethostname(host)
