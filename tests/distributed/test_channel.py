"""Processes that meet, agree and watch each other, as threads of the test's own process."""

import contextlib
import json
import socket
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from meeting import everywhere, meet, part
from waiting import PATIENCE, wait_for

from gpt_jax.distributed import channel
from gpt_jax.distributed.processes import Processes, join
from gpt_jax.distributed.settings import Place, parse_devices, parse_distributed
from gpt_jax.errors import UserError


@pytest.fixture
def ended(monkeypatch):
    """Lines with which processes would have ended. None is lost for its silence, which may be the machine's."""
    lines: list[str] = []
    part()
    monkeypatch.setattr(channel, "end_process", lines.append)
    monkeypatch.setattr(channel, "BEAT", 0.05)
    monkeypatch.setattr(channel, "SILENCE", 3 * PATIENCE)
    yield lines
    part()


def cut(process: Processes, index: int = 0) -> None:
    """Ends a connection as a killed process does."""
    process.channel._peers[index].connection.shutdown(socket.SHUT_RDWR)


def test_processes_meet_gather_and_agree(ended):
    processes = meet(3)
    assert [(p.index, p.count, p.local_index, p.local_count, p.host_count) for p in processes] == [
        (i, 3, i, 3, 1) for i in range(3)
    ]
    assert len({p.name for p in processes}) == len({p.address for p in processes}) == 1
    for _ in range(3):
        assert everywhere(processes, lambda p: p.gather({"of": p.index})) == [[{"of": i} for i in range(3)]] * 3
    assert everywhere(processes, lambda p: p.share(p.index)) == [0, 0, 0]
    everywhere(processes, lambda p: p.agree({"config.seed": 1}))

    def disagree(process):
        with pytest.raises(UserError) as caught:
            process.agree({"jax": "0.10", "config.seed": 7 if process.index == 2 else 1})
        return str(caught.value)

    (line,) = set(everywhere(processes, disagree))
    assert "config.seed is 1 for process 0 (pid " in line
    assert "and 7 for process 2 (pid " in line
    everywhere(processes, lambda p: p.channel.close())
    time.sleep(0.2)
    assert ended == []


def test_a_step_that_is_announced_is_known_to_all_when_that_returns(ended):
    first, *others = processes = meet(3)
    others[1].channel.request("stop")
    wait_for(lambda: "stop" in first.channel._requests)
    assert first.channel.take_requests() == {"stop"}
    first.channel.announce("stop", 7)
    for step in (3, 5):  # a second one before the first is done
        first.channel.announce("save", step)
    for process in processes:
        told = process.channel
        assert [told.is_time_to("stop", step) for step in (6, 7, 8)] == [False, True, False]
        assert [told.is_time_to("save", step) for step in (2, 3, 4, 5, 6)] == [False, True, False, True, False]
    everywhere(processes, lambda p: p.channel.close())


def test_a_process_whose_connection_ends_is_named_by_all(ended):
    first, second, third = meet(3)
    first.when_lost(lambda line: f"{line}; go on")
    cut(third)
    wait_for(lambda: len(ended) == 3)
    (told,) = (line for line in ended if line.endswith("; go on"))
    assert told.startswith("process 2 (pid ")
    assert "ended without a word" in told
    assert told.removesuffix("; go on") in ended  # the third, which was cut off, names process 0
    assert second.channel._ended


def test_a_process_that_can_no_longer_watch_ends_with_a_line(ended):
    first, second = meet(2)
    first.when_lost(lambda line: [][0])  # what is to be done before the end fails: it ends all the same
    second.channel._peers[0].send(kind="gather")  # a message without what belongs to it
    wait_for(lambda: len(ended) == 2)
    for line in ended:
        assert line.startswith("process 0 (pid ")
        assert "cannot listen to the others: KeyError('number')" in line
    assert [line for line in ended if line.endswith("; after it: IndexError('list index out of range')")]


def test_a_silent_process_is_named(ended, monkeypatch):
    meet(2)
    monkeypatch.setattr(channel, "SILENCE", 0.6)
    monkeypatch.setattr(channel.Peer, "send", lambda self, **message: None)
    wait_for(lambda: len(ended) == 2)
    assert {line.split(" (")[0] for line in ended} == {"process 0", "process 1"}
    assert all("was silent for" in line for line in ended)


def test_an_error_that_comes_right_behind_the_welcome_is_told(ended):
    hellos = [{"index": i, "count": 2, "pid": 10 + i, "host": "here", "machine": "m"} for i in range(2)]
    messages = [{"kind": "welcome", "hellos": hellos}, {"kind": "failed", "line": "process 0 ended: no config"}]
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def welcome():
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

        told = pool.submit(welcome)
        place = Place(f"127.0.0.1:{listening.getsockname()[1]}", 2, 1)
        channel.open_channel(place, {"host": "here", "machine": "m", "pid": 11}, join_seconds=PATIENCE)
        told.result()
        wait_for(lambda: ended)
    assert ended[0] == "process 0 ended: no config"


def test_the_error_of_one_process_ends_the_others_with_its_line(ended):
    processes = meet(2)
    with pytest.raises(UserError), processes[1]:
        raise UserError("no such file")
    wait_for(lambda: ended)
    assert "process 1 (pid " in ended[0]
    assert ended[0].endswith("ended: no such file")


def refusals(places: list[str]) -> list[str]:
    """The lines with which processes of these places end, each in a thread."""

    def start(place: str) -> str:
        with pytest.raises(UserError) as caught:
            join(f"127.0.0.1:{port},{place}", join_seconds=PATIENCE)
        return str(caught.value)

    with channel.hold_port() as port, ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(start, places))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["2,0", "3,1"], "was started as one of 3 processes, process 0 as one of 2"),
        (["3,0", "3,1", "3,1"], "two processes were started as process 1"),
    ],
)
def test_processes_that_are_not_of_one_run_are_told_apart(ended, places, said):
    lines = refusals(places)
    assert all(said in line for line in lines), lines


def test_who_does_not_come_is_named_by_those_who_did(ended, monkeypatch):
    """Process 0's time is over as soon as one of the two others has come."""
    greet, over = channel._greet, set()

    def greet_once(*arguments):
        problem = greet(*arguments)
        over.add(threading.get_ident())
        return problem

    clock = types.SimpleNamespace(
        monotonic=lambda: time.monotonic() + 2 * PATIENCE * (threading.get_ident() in over), sleep=time.sleep
    )
    monkeypatch.setattr(channel, "_greet", greet_once)
    monkeypatch.setattr(channel, "time", clock)
    lines = refusals(["3,0", "3,1"])
    assert all("process 2 did not come to" in line for line in lines), lines


def test_a_port_that_is_held_is_process_0s_alone(ended):
    with channel.hold_port() as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda i: join(f"127.0.0.1:{port},2,{i}", join_seconds=PATIENCE), range(2)))
    everywhere(both, lambda process: process.channel.close())


def test_a_port_in_use_and_a_stranger_behind_it_are_said(ended):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot wait at {address}: another program uses it"):
            join(f"{address},2,0")

        def answer():
            connection, _ = other.accept()
            with contextlib.closing(connection):
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                connection.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match="is not process 0 of a run of this program"):
            join(f"{address},2,1")
        thread.join()
    with channel.hold_port() as port, pytest.raises(UserError, match=r"nobody answers at"):
        join(f"127.0.0.1:{port},2,1", join_seconds=0)
    with pytest.raises(UserError, match=r"192\.0\.2\.1:1234: .* must be an address of the machine of process 0"):
        join("192.0.2.1:1234,2,0")


def test_who_only_scans_the_port_of_process_0_keeps_nobody_from_it(ended):
    greeting = json.dumps({"kind": channel._GREETING, "hello": {"index": "1", "count": 2}}).encode()
    with channel.hold_port() as port, ThreadPoolExecutor(1) as pool:
        first = pool.submit(join, f"127.0.0.1:{port},2,0", join_seconds=PATIENCE)
        for said in (b"GET / HTTP/1.1", b"[" * 60_000, b"1", greeting[: greeting.index(b",")] + b"}", greeting):
            connection = channel._connect(Place(f"127.0.0.1:{port}", 2, 1), time.monotonic() + PATIENCE)
            with contextlib.closing(connection):
                connection.sendall(said + b"\n")
                assert connection.recv(1) == b""  # it hangs up
        second = join(f"127.0.0.1:{port},2,1", join_seconds=PATIENCE)
        everywhere([first.result(), second], lambda p: p.channel.close())


@pytest.mark.parametrize("text", ["here", "a:b,1,2", "a:1,2", "a:0,2,0", "a:70000,2,0", "a:1,2,2", "a:1,0,0"])
def test_a_place_that_is_none_is_said(text):
    with pytest.raises(ValueError, match=r"must be empty|a port is from|processes are numbered"):
        parse_distributed(text)
    with pytest.raises(UserError, match=r"config\.distributed="):
        join(text)


def test_devices_are_all_the_first_or_by_number():
    asked = {"all": (0, 1, 2, 3), "3": (0, 1, 2), "1": (0,), "0,2": (0, 2), "3,": (3,), "0,0": (0, 0)}
    assert {text: parse_devices(text, 4) for text in asked} == asked
    for text, said in {"5": "names device 4", "0,4": "has 4", "0": "1 device or more", "x": "must be empty"}.items():
        with pytest.raises(ValueError, match=said):
            parse_devices(text, 4)
    pair = [Processes(i, 2, i, 2, ("a", "a"), devices="1,0") for i in (0, 1)]
    assert [process.device(2) for process in pair] == [1, 0]
    with pytest.raises(UserError, match="names 1 devices for 2 processes on a"):
        Processes(0, 2, 0, 2, ("a", "a"), devices="1").device(2)
    assert Processes().device(4) is None
