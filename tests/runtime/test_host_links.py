"""Links between the processes of a host: who is lost, late or elsewhere is named. Threads stand for processes here."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import PATIENCE

from vk_kernels.errors import LinkError
from vk_kernels.runtime.host_links import HostLinks


def group(count: int, timeout: float = PATIENCE) -> list[HostLinks]:
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda i: HostLinks(name, i, count, timeout), range(count)))


@pytest.fixture
def links():
    made = group(3)
    yield made
    for each in made:
        each.close()


def test_nobody_passes_before_all_have_come(links):
    came, passed = [], []

    def run(each: HostLinks) -> None:
        for token in range(20):
            came.append(token)
            each.announce(token)
            each.await_all(token)
            passed.append((token, came.count(token)))

    threads = [threading.Thread(target=run, args=(each,)) for each in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 60
    assert all(count == 3 for _, count in passed)


def test_a_wait_takes_no_processor_time(links):
    def announce_late() -> None:
        time.sleep(0.3)
        for each in links[1:]:
            each.announce(5)

    thread = threading.Thread(target=announce_late)
    thread.start()
    spent = time.thread_time()  # of this thread: what others of the process do is theirs
    links[0].await_all(5)
    assert time.thread_time() - spent < 0.1
    thread.join()


def test_who_ended_is_named(links):
    links[1].close()
    with pytest.raises(LinkError, match=r"process 1 of this host ended, adding up bucket 3"):
        links[0].await_all(7, "adding up bucket 3")


def test_who_is_elsewhere_is_named(links):
    links[2].announce(8)
    links[0].announce(7)
    with pytest.raises(LinkError, match=r"process 2 of this host came to 8, and this one to 7"):
        links[1].await_all(7)


def test_who_does_not_answer_is_named():
    first, second = group(2)
    first.timeout = 0.1  # from here on: they have met
    first._sockets[1].settimeout(first.timeout)
    with pytest.raises(LinkError, match=r"process 1 of this host did not answer in 0\.1 s"):
        first.await_all(0)
    second.close()
    first.close()


def test_who_does_not_come_is_named():
    with pytest.raises(LinkError, match=r"of this host, processes 1, 2 did not come in 0\.1 s"):
        HostLinks(uuid.uuid4().hex, 0, 3, timeout=0.1)
    with pytest.raises(LinkError, match=r"process 0 of this host did not come in 0\.1 s"):
        HostLinks(uuid.uuid4().hex, 1, 2, timeout=0.1)


def test_a_stranger_that_says_nothing_is_not_counted(monkeypatch):
    name, accept, accepted = uuid.uuid4().hex, HostLinks._accept, []

    def accept_a_stranger_first(links: HostLinks, *arguments) -> None:
        if not accepted:
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(f"\0vk_kernels-{name}-0")
        accepted.append(accept(links, *arguments))

    monkeypatch.setattr(HostLinks, "_accept", accept_a_stranger_first)
    with pytest.raises(LinkError, match=r"process 1 did not come"):
        HostLinks(name, 0, 2, timeout=0.1)
    assert accepted == [None]  # the stranger, and nobody after it


def test_a_killed_process_is_named_at_once():
    name = uuid.uuid4().hex
    code = f"from vk_kernels.runtime.host_links import HostLinks\nHostLinks({name!r}, 1, 2, {PATIENCE}).await_all(1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    links = HostLinks(name, 0, 2, PATIENCE)
    threading.Timer(0.1, lambda: os.kill(process.pid, signal.SIGKILL)).start()
    with pytest.raises(LinkError, match=r"process 1 of this host ended"):  # not that it did not answer in time
        links.await_all(1)
    links.close()
    process.wait()
