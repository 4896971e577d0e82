"""Hosts on one machine: a network with an address of its own each, and a cable between them. Root on Linux makes them.

A process that enters one has that host's name too, and finds the others' addresses by theirs.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import tempfile

HOSTS = {"gpt-jax-a": "10.77.0.1", "gpt-jax-b": "10.77.0.2"}
_NEW_MOUNTS, _NEW_NAME = 0x00020000, 0x04000000  # CLONE_NEWNS, CLONE_NEWUTS
_BIND, _PRIVATE = 0x1000, 0x4000 | 0x40000  # MS_BIND, MS_REC | MS_PRIVATE


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class TwoHosts:
    """The hosts, as long as it is entered."""

    def __init__(self) -> None:
        self._name = f"gj{os.getpid()}"  # of their networks, and of the cable's ends: at most 15 characters
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "TwoHosts":
        with self._stack:
            self._names = self._stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="hosts-"))
            self._names.write(
                "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items())
            )
            self._names.flush()
            networks = [self._network(host) for host in HOSTS]
            for network in networks:
                ip("netns", "add", network)
                self._stack.callback(ip, "netns", "delete", network)
            ip("link", "add", networks[0], "type", "veth", "peer", "name", networks[1])
            for network, address in zip(networks, HOSTS.values(), strict=True):
                ip("link", "set", network, "netns", network)
                ip("-n", network, "addr", "add", f"{address}/24", "dev", network)
                ip("-n", network, "link", "set", network, "up")
                ip("-n", network, "link", "set", "lo", "up")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _network(self, host: str) -> str:
        return self._name + host[-1]

    def set_cable(self, up: bool) -> None:
        """Cuts the cable between the hosts, or mends it."""
        network = self._network([*HOSTS][1])
        ip("-n", network, "link", "set", network, "up" if up else "down")

    def enter(self, host: str) -> None:
        """Takes the calling process, which must have one thread, to a host."""
        network = os.open(f"/run/netns/{self._network(host)}", os.O_RDONLY)
        _call("setns", network, 0)
        os.close(network)
        _call("unshare", _NEW_MOUNTS | _NEW_NAME)
        _call("mount", None, b"/", None, ctypes.c_ulong(_PRIVATE), None)
        _call("mount", self._names.name.encode(), b"/etc/hosts", None, ctypes.c_ulong(_BIND), None)
        socket.sethostname(host)


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
