"""Reads `config.devices` and `config.distributed`: which devices a host uses, and which processes a run has."""

import re
from dataclasses import dataclass

AUTO = "auto"
ALL = "all"


@dataclass(frozen=True)
class Place:
    """A process among those of its run: `address`, HOST:PORT, is where process 0 waits for the others."""

    address: str
    count: int
    index: int

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def parse_distributed(text: str) -> Place:
    """The place that HOST:PORT,PROCESSES,ID names.

    Raises:
      ValueError: the text is not of that form; the message says what is wrong.
    """
    found = re.fullmatch(r"(\S+:(\d{1,5})),(\d{1,6}),(\d{1,6})", text)
    if not found:
        raise ValueError("must be empty, auto or HOST:PORT,PROCESSES,ID")
    address, port, count, index = found[1], *map(int, found.groups()[1:])
    if not 0 < port < 65536:
        raise ValueError(f"names port {port}, and a port is from 1 to 65535")
    if index >= count:
        raise ValueError(f"names process {index} of {count}: processes are numbered from 0 to PROCESSES - 1")
    return Place(address, count, index)


def parse_devices(text: str, available: int) -> tuple[int, ...]:
    """The numbers of the devices of a host that `config.devices` names: all, the first N, or a list as 0,1.

    A list may name a device several times: as many processes then share it.

    available: how many there are.

    Raises:
      ValueError: the text is of no such form, or names what is not there; the message says which.
    """
    if text == ALL:
        return tuple(range(available))
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*,?", text):
        raise ValueError("must be empty, all, a number of devices, or their numbers as 0,1 (one: 0,)")
    numbers = tuple(int(number) for number in text.split(",") if number)
    if "," not in text:
        count = numbers[0]
        if count == 0:
            raise ValueError("must be 1 device or more")
        numbers = tuple(range(count))
    if max(numbers) >= available:
        raise ValueError(f"names device {max(numbers)}, and this host has {available} (0 to {available - 1})")
    return numbers
