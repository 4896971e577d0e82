"""The processes of a run: which one this is, and what they agree on before the first step."""

import atexit
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gpt_jax.distributed.channel import JOIN, LOST, Channel, end_process, free_port, name_of, open_channel
from gpt_jax.distributed.settings import AUTO, Place, parse_devices, parse_distributed
from gpt_jax.errors import UserError

_OPEN_MPI = frozenset(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # where process 0 is; newer ones do not say it
_JAX_SILENCE = 600  # seconds: JAX's own watch ends processes by abort, so ours, which names the lost one, comes first


@dataclass(frozen=True)
class Processes:
    """A process among those of its run. Without arguments: the only one.

    index, count: among all processes. local_index, local_count: among those of its host. hosts: the name of each
    process's host, which two of the `host_count` may share. devices: `config.devices`. address: where JAX's own service
    is, on process 0. name: of the run, unlike any other's. channel: to the others; None: there are none.

    As a context manager it ends with the others, or ends them, with the line of its error, where it fails.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1
    hosts: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()  # of each process: the same text for those of one host
    host_count: int = 1
    devices: str = ""
    address: str = ""
    name: str = ""
    channel: Channel | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which alone writes, prints and answers."""
        return self.index == 0

    def device(self, available: int) -> int | None:
        """The number of this process's device, of so many that its host has; None: the default one.

        Raises:
          UserError: `config.devices` names devices that are not there, or fewer than the host has processes.
        """
        if not self.devices and self.local_count == 1:
            return None
        numbers = self.device_numbers(available) if self.devices else tuple(range(available))
        if len(numbers) < self.local_count:
            given = f"config.devices={self.devices} names" if self.devices else "there are"
            raise UserError(
                f"{given} {len(numbers)} devices for {self.local_count} processes on {self.hosts[self.index]}: each "
                "needs one, and one that several are to share stands in config.devices several times, as 0,0"
            )
        return numbers[self.local_index]

    def device_numbers(self, available: int) -> tuple[int, ...]:
        """The devices of the host that `config.devices` names. Raises UserError as `device`."""
        return device_numbers(self.devices, available)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by index. Values are what JSON can hold; all processes call it, in one order."""
        return [value] if self.channel is None else self.channel.gather(value)

    def share(self, value: Any = None) -> Any:
        """Process 0's value, on every process."""
        return value if self.channel is None else self.channel.share(value)

    def barrier(self) -> None:
        """Returns when all processes have come here."""
        self.gather(None)

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raises UserError, on all processes, if they have different values: it names the first, and who has which."""
        if self.channel is None:
            return
        everyone = self.gather(dict(values))
        first = everyone[0]
        for index, other in enumerate(everyone):
            for name in first | other:
                if first.get(name) != other.get(name):
                    raise UserError(
                        f"{name} is {_short(first.get(name))} for {name_of(self.channel.hellos[0])} and "
                        f"{_short(other.get(name))} for {name_of(self.channel.hellos[index])}: all processes of a run "
                        "need the same"
                    )

    def blame(self) -> None:
        """Waits for a lost process to be named, see `Channel.blame`."""
        if self.channel is not None:
            self.channel.blame()

    def when_lost(self, act: Callable[[str], str]) -> None:
        """Has `act(line)` called, in another thread, before this process ends because another one was lost.

        It returns the line to end with.
        """
        if self.channel is not None:
            self.channel.on_lost = act

    def join_jax(self) -> None:
        """Makes the devices of all processes JAX's devices. Before anything asks JAX for one."""
        if self.count == 1:
            return
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                self.address,
                self.count,
                self.index,
                cluster_detection_method="deactivate",  # what it would find is known
                coordinator_bind_address=self.address,
                heartbeat_timeout_seconds=_JAX_SILENCE,
            )
        except RuntimeError as error:
            raise UserError(f"JAX's service at {self.address} cannot be used: {' '.join(str(error).split())}") from None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.channel is None:
            return
        if error is not None:
            self.channel.fail(f"{name_of(self.channel.hellos[self.index])} ended: {_line(error)}")
            if _is_in_jax():  # at its exit JAX would wait for processes that are gone
                atexit.register(end_process, "", _exit_code(error))
            return
        self.channel.close()
        if _is_in_jax():
            sys.modules["jax"].distributed.shutdown()  # all are here, so none waits for long


ALONE = Processes()


def device_numbers(devices: str, available: int) -> tuple[int, ...]:
    """The devices that `config.devices` names. Raises UserError if it names none that are there."""
    try:
        return parse_devices(devices, available)
    except ValueError as error:
        raise UserError(f"config.devices={devices} {error}") from None


def join(distributed: str, devices: str = "", *, join_seconds: float = JOIN) -> Processes:
    """Meets the other processes of the run that `config.distributed` names; without one, this is the only process.

    Raises:
      UserError: it is not of its form, nobody is there, or the processes are not of one run.
    """
    if not distributed:
        return Processes(devices=devices)
    place = place_of(distributed)
    hello = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
    channel = open_channel(place, hello, join_seconds=join_seconds)
    machines = [each["machine"] for each in channel.hellos]
    host, _ = place.host_and_port
    shared = {"name": secrets.token_hex(8), "port": free_port(host)} if place.index == 0 else None
    shared = channel.share(shared)
    mine = machines[place.index]
    return Processes(
        index=place.index,
        count=place.count,
        local_index=machines[: place.index].count(mine),
        local_count=machines.count(mine),
        hosts=tuple(each["host"] for each in channel.hellos),
        machines=tuple(machines),
        host_count=len(set(machines)),
        devices=devices,
        address=f"{f'[{host}]' if ':' in host else host}:{shared['port']}",
        name=shared["name"],
        channel=channel,
    )


def place_of(distributed: str) -> Place:
    """The place that `config.distributed` names. Raises UserError if it is of no form, or no launcher says."""
    try:
        if distributed != AUTO:
            return parse_distributed(distributed)
    except ValueError as error:
        raise UserError(f"config.distributed={distributed} {error}") from None
    return _place_of_launcher()


def _place_of_launcher() -> Place:
    """The place that SLURM's variables name, or Open MPI's or another launcher's that `jax.distributed` reads."""
    from vk_kernels.jax_compat import place_in_cluster

    by_hand = "give HOST:PORT,PROCESSES,ID"
    found, unread = None, ""
    try:
        found = place_in_cluster()
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        unread = f"{type(error).__name__}: {error}"
    if found is None and _OPEN_MPI.issubset(os.environ) and _OPEN_MPI_4 not in os.environ:  # jax 0.12 asks for mpi4py
        raise UserError(
            "config.distributed=auto: this Open MPI does not say where process 0 is: give HOST:PORT,$"
            "OMPI_COMM_WORLD_SIZE,$OMPI_COMM_WORLD_RANK, as mpirun sh -c '...' sees them"
        )
    if unread:
        raise UserError(f"config.distributed=auto cannot read the launcher's variables ({unread}): {by_hand}")
    if found is None:
        raise UserError(
            "config.distributed=auto finds neither SLURM's nor Open MPI's variables: start with srun or mpirun, or "
            + by_hand
        )
    return Place(*found)


def _machine() -> str:
    """The same text for processes that can share memory, devices and local sockets, and no others."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/net"))  # of a container, or a test
    return " ".join(found)


def _is_in_jax() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT)
    return getattr(error, "exit_code", LOST)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
