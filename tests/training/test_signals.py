"""Signals before and while there is something to save."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from waiting import PATIENCE

from gpt_jax.signals import Interrupted, StopSignal, interrupt, resend_swallowed

ROOT = Path(__file__).parents[2]
STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_before_there_is_something_to_save_a_signal_ends_the_run(number):
    with StopSignal() as stop:
        with pytest.raises(Interrupted) as caught:
            send(number)
        assert caught.value.number == number
        with pytest.raises(Interrupted):  # whatever swallowed the first one
            stop.check()
        with pytest.raises(Interrupted):
            stop.defer()


def test_a_signal_that_the_garbage_collector_swallows_is_told_later_without_a_traceback(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    def collected(phase, _):
        if phase == "start":
            send(signal.SIGHUP)

    gc.disable()  # or one of its own comes before the signal is caught, and ends all tests
    try:
        with StopSignal() as stop:
            gc.callbacks.append(collected)
            gc.collect(0)  # of all generations it would take seconds
            gc.callbacks.remove(collected)
            assert printed == []
            with pytest.raises(Interrupted):
                stop.check()
        assert sys.unraisablehook == printed.append
    finally:
        if collected in gc.callbacks:
            gc.callbacks.remove(collected)
        gc.enable()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_loading_gets_a_swallowed_signal_again_without_a_traceback(number, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    before = signal.signal(number, interrupt)

    class Collected:
        def __del__(self):
            send(number)
            time.sleep(0)  # where the handler raises

    def load():
        Collected()
        threading.Event().wait(20)  # as for a thread that opens the device

    try:
        resend_swallowed()
        with pytest.raises(Interrupted) as caught:
            load()
    finally:
        signal.signal(number, before)
    assert (caught.value.number, printed) == (number, [])


def test_what_else_is_swallowed_is_printed_as_ever(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(type(unraisable.exc_value)))

    class Broken:
        def __del__(self):
            raise ValueError

    with StopSignal():
        Broken()
    assert printed == [ValueError]


@pytest.mark.parametrize("number", STOPPING)
def test_later_it_is_noted_and_a_second_interrupt_stops_at_once(number):
    before = [signal.getsignal(number) for number in STOPPING]
    with StopSignal() as stop:
        stop.defer()
        send(number)
        assert stop.received == number
        stop.check()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_a_request_to_save_is_taken_once():
    with StopSignal() as stop:
        send(signal.SIGUSR1)
        assert stop.received is None
        assert stop.take_save_request()
        assert not stop.take_save_request()


def test_hangups_stay_ignored_under_nohup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("module", ["gpt_jax.main", "gpt_jax.sample", "gpt_jax.report"])
def test_an_interrupt_of_the_imports_is_a_line(module):
    code = f"""
import runpy, sys
class Stop:  # the first import after the package's own
    def find_spec(self, name, *_):
        if name in ("absl", "numpy", "contextlib", "itertools"):
            import os, signal
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
for name in ("absl", "numpy", "itertools", "contextlib"):
    sys.modules.pop(name, None)
import gpt_jax.signals
sys.meta_path.insert(0, Stop())
runpy.run_module({module!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_interrupt_at_any_moment_of_the_start_is_a_line(tmp_path):
    """A real start, while jax is imported; nothing is left."""
    command = [sys.executable, "-m", "gpt_jax.main", "--config=configs/chat_tiny.py", f"--workdir={tmp_path / 'run'}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        deadline = time.monotonic() + PATIENCE
        while "jaxlib" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert not (tmp_path / "run").exists()
